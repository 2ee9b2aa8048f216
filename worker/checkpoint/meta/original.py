"""Meta's original format of LLaMA: `consolidated.*.pth`, one file a GPU, beside params.json.

Each file holds a slice of every matrix, as FairScale's parallel layers cut it. The rows of the
query and key projections stand in the order of the paper's rotary embedding (pairs of neighbours),
where transformers rotates halves, so they are put into its order. Read by mmap: what is in memory
is one merged tensor at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nightherd.errors import CheckpointError
from worker.checkpoint.files import FLOATS

_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_ROWS, _COLUMNS, _WHOLE = 0, 1, None
# Name in Meta's files, name in transformers', and the dimension along which the files are joined.
_LAYER = (
    ("attention.wq.weight", "self_attn.q_proj.weight", _ROWS),
    ("attention.wk.weight", "self_attn.k_proj.weight", _ROWS),
    ("attention.wv.weight", "self_attn.v_proj.weight", _ROWS),
    ("attention.wo.weight", "self_attn.o_proj.weight", _COLUMNS),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", _ROWS),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", _COLUMNS),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", _ROWS),
    ("attention_norm.weight", "input_layernorm.weight", _WHOLE),
    ("ffn_norm.weight", "post_attention_layernorm.weight", _WHOLE),
)
_IGNORED = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs")

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor to be written: made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Params:
    """What params.json says."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    norm_eps: float
    rope_theta: float
    scaled_rope: bool
    """Llama 3.1 and later stretch the wave lengths for their long context."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @classmethod
    def read(cls, folder: Path) -> Params:
        path = folder / "params.json"
        try:
            values = json.loads(path.read_bytes())
            values = values.get("model", values)
            return cls(
                dim=int(values["dim"]),
                layers=int(values["n_layers"]),
                heads=int(values["n_heads"]),
                kv_heads=int(values.get("n_kv_heads") or values["n_heads"]),
                norm_eps=float(values["norm_eps"]),
                rope_theta=float(values.get("rope_theta") or 10_000.0),
                scaled_rope=bool(values.get("use_scaled_rope")),
            )
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not that of a LLaMA: {type(error).__name__} {error}"
            ) from None


class MetaWeights:
    """The tensors of a folder in Meta's format, joined and in transformers' order and names."""

    def __init__(self, folder: Path, params: Params) -> None:
        self._folder = folder
        self._params = params
        self._shards = [open_pickle(path) for path in shard_files(folder)]
        self._check_names()
        embedding = self._first("tok_embeddings.weight")
        by_rows = embedding.shape[1] == params.dim
        self._embedding_dim = _ROWS if by_rows else _COLUMNS
        count = len(self._shards)
        self.vocab_size = int(embedding.shape[0]) * (count if by_rows and count > 1 else 1)
        inner = self._first("layers.0.feed_forward.w1.weight")
        self.intermediate_size = int(inner.shape[0]) * count
        self.dtype = embedding.dtype
        self.tied = self._tied()

    def entries(self) -> list[TensorEntry]:
        """All tensors in the order of the model. Raises `CheckpointError` for a wrong shape."""
        p = self._params
        found = [
            self._entry(
                "tok_embeddings.weight", "model.embed_tokens.weight", self._embedding_dim,
                (self.vocab_size, p.dim),
            )
        ]  # fmt: skip
        width = {"wq": p.dim, "wk": p.kv_heads * p.head_dim, "wv": p.kv_heads * p.head_dim}
        for layer in range(p.layers):
            for theirs, ours, dim in _LAYER:
                short = theirs.split(".")[-2]
                if dim is _WHOLE:
                    shape: tuple[int, ...] = (p.dim,)
                elif short in ("w1", "w3"):
                    shape = (self.intermediate_size, p.dim)
                elif short == "w2":
                    shape = (p.dim, self.intermediate_size)
                else:
                    shape = (width.get(short, p.dim), p.dim)
                name = f"layers.{layer}.{theirs}"
                found.append(self._entry(name, f"model.layers.{layer}.{ours}", dim, shape))
        found.append(self._entry("norm.weight", "model.norm.weight", _WHOLE, (p.dim,)))
        if not self.tied:
            shape = (self.vocab_size, p.dim)
            found.append(self._entry("output.weight", "lm_head.weight", _ROWS, shape))
        return found

    def _entry(
        self, theirs: str, ours: str, dim: int | None, shape: tuple[int, ...]
    ) -> TensorEntry:
        parts = self._parts(theirs, dim, shape)
        joined = list(parts[0].shape)
        if dim is not None:
            joined[dim] = sum(int(part.shape[dim]) for part in parts)
        if tuple(joined) != shape:
            raise CheckpointError(
                f"{self._folder}: {theirs} has the shape {tuple(joined)}, params.json says {shape};"
                " a file is missing, or they are not of one model"
            )
        heads = {"wq": self._params.heads, "wk": self._params.kv_heads}.get(theirs.split(".")[-2])

        def make() -> torch.Tensor:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim or 0)
            return (whole if heads is None else _halves(whole, heads)).contiguous()

        return TensorEntry(ours, shape, parts[0].dtype, make)

    def _parts(self, name: str, dim: int | None, shape: tuple[int, ...]) -> list[torch.Tensor]:
        parts = [shard[name] for shard in self._shards]
        if dim is None:
            return parts[:1]
        # With more files than key and value heads each of those stands in several files.
        copies = sum(int(part.shape[dim]) for part in parts) // shape[dim]
        if name.endswith(("wk.weight", "wv.weight")) and copies > 1:
            return parts[::copies]
        return parts

    def _first(self, name: str) -> torch.Tensor:
        return self._shards[0][name]

    def _tied(self) -> bool:
        """Whether the output layer is the embedding, as in the small models of Llama 3.2."""
        if "output.weight" not in self._shards[0]:
            return True
        if self._embedding_dim != _ROWS:
            return False
        return all(
            torch.equal(shard["tok_embeddings.weight"], shard["output.weight"])
            for shard in self._shards
        )

    def _check_names(self) -> None:
        layers = range(self._params.layers)
        wanted = {f"layers.{layer}.{theirs}" for layer in layers for theirs, _, _ in _LAYER}
        wanted |= {"tok_embeddings.weight", "norm.weight"}
        for index, shard in enumerate(self._shards):
            missing = sorted(wanted - shard.keys())
            if missing:
                raise CheckpointError(
                    f"{self._folder}: file {index} of {len(self._shards)} lacks {missing[0]}; "
                    "download or copy it again"
                )
            for name in sorted(shard.keys() - wanted - {"output.weight"}):
                if not _IGNORED.fullmatch(name):
                    raise CheckpointError(
                        f"{self._folder} holds {name}, which a LLaMA for text does not have; use "
                        "a repository in the format of transformers"
                    )
            kinds = {_NAMES.get(shard[name].dtype) for name in wanted}
            if not kinds <= set(FLOATS):
                raise CheckpointError(
                    f"{self._folder} is quantised in a format of its own; use a repository in the "
                    "format of transformers"
                )


def shard_files(folder: Path) -> list[Path]:
    """The files in order; raises `CheckpointError` where one of them is missing."""
    numbered = {
        int(match[1]): path
        for path in sorted(folder.glob("consolidated.*.pth"))
        if (match := _SHARD.fullmatch(path.name))
    }
    if not numbered:
        raise CheckpointError(f"no consolidated.00.pth in {folder}")
    for index in range(max(numbered) + 1):
        if index not in numbered:
            raise CheckpointError(f"{folder} lacks consolidated.{index:02}.pth; download it again")
    return [numbered[index] for index in sorted(numbered)]


def open_pickle(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a file that torch saved, left on disk; no code in it is run.

    Raises `CheckpointError` for a file that is broken or holds other things.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever zip and pickle raise
        reason = " ".join(str(error).split())
        if "mmap can only be used" in reason:
            return _in_memory(path)
        raise _broken(path, reason) from None
    return _tensors(path, found)


def _in_memory(path: Path) -> Mapping[str, torch.Tensor]:
    # Saved by a torch before 1.6.
    try:
        return _tensors(path, torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise _broken(path, " ".join(str(error).split())) from None


def _broken(path: Path, reason: str) -> CheckpointError:
    if "weights_only" in reason or "Unsupported" in reason:
        return CheckpointError(f"{path} holds more than tensors, which could be code: refused")
    return CheckpointError(f"{path} cannot be read: {reason[:200]}; download or copy it again")


def _tensors(path: Path, found: Any) -> Mapping[str, torch.Tensor]:
    if not isinstance(found, dict) or not all(
        isinstance(one, torch.Tensor) for one in found.values()
    ):
        raise CheckpointError(f"{path} does not hold the tensors of a model")
    return found


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of rotary pairs (0, 1), (2, 3), … as first halves, then second halves, head by head."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def rope_scaling(params: Params) -> dict[str, Any] | None:
    """The stretching of Llama 3.1 (factor 8) and of the small models of 3.2 (factor 32)."""
    if not params.scaled_rope:
        return None
    return {
        "rope_type": "llama3",
        "factor": 32.0 if params.dim <= 3072 else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def context_length(params: Params, tiktoken: bool) -> int:
    """What the generation was trained for; params.json does not say it."""
    if params.scaled_rope:
        return 131_072
    if tiktoken:
        return 8192
    if params.rope_theta > 10_000.0:
        return 16_384  # Code Llama
    # LLaMA 1 has no grouped heads at any size; where its norm has Llama 2's epsilon it is the 65B.
    first = params.norm_eps < 1e-5 or (params.dim == 8192 and params.kv_heads == params.heads)
    return 2048 if first else 4096
