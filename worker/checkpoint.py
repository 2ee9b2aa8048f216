"""Checkpoints on this machine: find, download, load, and say exactly which one it was."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
import transformers
from huggingface_hub import errors as hub
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

import nightherd
from nightherd.catalogue import hub_name, local_folder
from nightherd.errors import CheckpointError
from nightherd.text import TextProcessor, read_json

_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
# Folders within a repository hold other formats of the same weights; `consolidated` files too.
_UNWANTED = ("*/*", "*.bin", "*.pth", "consolidated*")

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}

HASHED_WHOLE = 1 << 30
"""Bytes of weights up to which `weights_hash` reads all of them."""
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, ready to generate: in eval mode, on its device."""

    model: PreTrainedModel
    folder: Path
    device: torch.device
    dtype: str
    """`bfloat16`, `float16` or `float32`."""

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding: token ids below it have one, the tokenizer's or padding."""
        weight = self.model.get_input_embeddings().weight
        return int(cast(torch.Tensor, weight).shape[0])


def find(key: str) -> Path:
    """The folder of a checkpoint by its key; one on the Hub is downloaded, or found in the cache.

    Raises `CheckpointError` where it is missing, not allowed, or cannot be fetched.
    """
    folder = local_folder(key)
    if folder is None:
        folder = _download(*hub_name(key))
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"no checkpoint at {folder}: it has no config.json")
    return folder


def _download(repository: str, revision: str) -> Path:
    if not sys.stderr.isatty():
        disable_progress_bars()
    shown = f"{repository}@{revision}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
            )
        )
    except hub.GatedRepoError:
        problem = "it is gated; ask for access on its page and set HF_TOKEN, or run `hf auth login`"
    except hub.RepositoryNotFoundError:
        problem = "the Hub has no such repository, or it is private and HF_TOKEN is not set"
    except hub.RevisionNotFoundError:
        problem = "the repository has no such revision"
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError):
        problem = "the Hub cannot be reached, and it is not in the local cache"
    except Exception as error:  # httpx errors, full disks, invalid names
        problem = one_line(error)
    raise CheckpointError(f"checkpoint {shown} cannot be fetched: {problem}")


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an error says, on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def resolve_device(device: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU; raises `CheckpointError` for one not here."""
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise CheckpointError(f"device {device!r} is unknown: give auto, cpu or cuda:N")
    if wanted.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no driver"
        raise CheckpointError(f"device {device!r} cannot be used: no CUDA device ({reason})")
    count = torch.cuda.device_count()
    index = wanted.index or 0
    if index >= count:
        raise CheckpointError(f"device {device!r} does not exist: this machine has {count} of them")
    return torch.device("cuda", index)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, else float32.

    Raises `CheckpointError` for an unknown name.
    """
    if dtype == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            able = _cpu_capabilities()
            fast = bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("sve_bf16"))
        return torch.bfloat16 if fast else torch.float32
    if dtype not in _DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown: give auto, bfloat16, float16, float32")
    return _DTYPES[dtype]


def _cpu_capabilities() -> Mapping[str, Any]:
    # Not in every torch that we allow.
    ask: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return ask()


def load_model(folder: Path, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Loads a checkpoint's weights with transformers: safetensors alone, no code of its own.

    Raises `CheckpointError` for a device that is not here, an architecture that transformers does
    not know, weights that are missing, broken or of another shape, and too little memory.
    """
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    if not any(folder.glob("*.safetensors")):
        others = any(path.suffix in (".bin", ".pth", ".gguf") for path in folder.iterdir())
        hint = "; convert its weights, other formats can carry code" if others else ""
        raise CheckpointError(f"no safetensors files in {folder}{hint}")
    try:
        with _quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=precision,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                # Only so that the names can be told: `_incomplete` refuses such a model.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
        problem = _incomplete(info)
        if problem is None:
            cast(torch.nn.Module, model).to(place).eval()
            name = str(precision).removeprefix("torch.")
            return LoadedModel(model=model, folder=folder, device=place, dtype=name)
    except (MemoryError, torch.OutOfMemoryError):
        problem = f"it does not fit into the memory of {place}"
    except Exception as error:  # transformers raises whatever its parts raise
        problem = one_line(error)
        if "does not recognize this arch" in problem or "Unrecognized config" in problem:
            kind = read_json(folder, "config.json").get("model_type")
            problem = (
                f"transformers {transformers.__version__} has no causal language model of type "
                f"{kind!r}"
            )
    raise CheckpointError(f"checkpoint {folder} cannot be loaded: {problem}")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bar where nobody watches, and its table of missing keys."""
    bar = transformers_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    if bar:
        _disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            _enable_progress_bar()


# transformers leaves these two untyped.
_disable_progress_bar = cast("Callable[[], None]", transformers_logging.disable_progress_bar)
_enable_progress_bar = cast("Callable[[], None]", transformers_logging.enable_progress_bar)


def _incomplete(info: dict[str, Any]) -> str | None:
    """What is wrong with the weights; transformers itself would fill gaps with random numbers."""
    for kind, text in (
        ("missing_keys", "its weights lack {}"),
        ("mismatched_keys", "its weights have {} in another shape than config.json says"),
    ):
        # A mismatched key comes with its two shapes.
        keys = info.get(kind) or ()
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return text.format(names[0] + more)
    return None


def weights_hash(folder: Path) -> str:
    """A hash over all safetensors files of a folder: their names, sizes and contents.

    `sha256:…` read every byte. Beyond `HASHED_WHOLE` bytes in all it is `sha256-sampled:…`: each
    file's header and evenly spaced samples, so that starting a worker on 140 GB takes no minutes.
    """
    files = sorted(folder.glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    whole = sum(sizes) <= HASHED_WHOLE
    digest = hashlib.sha256()
    for path, size in zip(files, sizes, strict=True):
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if whole:
                while block := file.read(1 << 20):
                    digest.update(block)
            else:
                header = int.from_bytes(file.read(8), "little")
                # A broken file may claim any length.
                digest.update(file.read(min(header, 64 << 20)))
                for offset in _sample_offsets(size):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
    return f"sha256{'' if whole else '-sampled'}:{digest.hexdigest()[:32]}"


def _sample_offsets(size: int) -> Sequence[int]:
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return range(0, size, _SAMPLE_BYTES)
    last = size - _SAMPLE_BYTES
    return [last * place // (_SAMPLES - 1) for place in range(_SAMPLES)]


def provenance(
    key: str, text: TextProcessor, loaded: LoadedModel, engine_name: str
) -> dict[str, Any]:
    """What produces results here, as the table `provenance` holds it (without the id).

    A snapshot from the Hub is named by its commit, any other folder by the hash of its weights.
    """
    folder = loaded.folder
    commit = None
    if local_folder(key) is None and folder.parent.name == "snapshots":
        commit = folder.name
    return {
        "checkpoint_key": key,
        "revision": commit,
        "weights_hash": None if commit else weights_hash(folder),
        "tokenizer_hash": text.tokenizer_hash,
        "template_hash": text.template_hash,
        "dtype": loaded.dtype,
        "device": device_name(loaded.device),
        "engine": engine_name,
        "versions": {
            "nightherd": nightherd.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": version("tokenizers"),
            "python": platform.python_version(),
        },
    }


def device_name(device: torch.device) -> str:
    """A device in words, with its model, as in `cuda:0 NVIDIA H100` or `cpu AMD EPYC`."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    model = _cpu_capabilities().get("cpu_name") or os.uname().machine
    return f"{device} {model}"
