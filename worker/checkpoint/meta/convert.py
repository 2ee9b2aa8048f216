"""From Meta's original format, or from torch's pickles, to safetensors with config and tokenizer.

The new folder appears whole or not at all: it is written under another name and renamed.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nightherd.errors import CheckpointError, UsageError
from nightherd.machine import nearest_existing
from nightherd.machine import size as in_words
from nightherd.tokenizer import read_json
from worker.checkpoint.files import INDEX, SINGLE, Folder, read_weights
from worker.checkpoint.hub.progress import Bar
from worker.checkpoint.meta.meta_tokenizer import (
    WrittenTokenizer,
    is_tiktoken,
    write_sentencepiece,
    write_tiktoken,
)
from worker.checkpoint.meta.original import (
    MetaWeights,
    Params,
    TensorEntry,
    context_length,
    open_pickle,
    rope_scaling,
    shard_files,
)

SHARD_BYTES = 2_000_000_000
"""A file of weights is no larger; about twice as much is in memory at once."""

_PICKLES = "pytorch_model.bin"
_CHAT = re.compile(r"chat|instruct", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Converted:
    """A new checkpoint, and what was assumed of it: nothing, if it came with a config.json."""

    path: Path
    chat: bool | None = None
    context: int | None = None


def convert(
    source: Path, target: Path, *, chat: bool | None = None, context: int | None = None
) -> Converted:
    """Converts a folder; `target` is the new one.

    `chat` says whether it is a chat model (by default its folder's name does), `context` its
    length where it is another than its generation's. Raises `CheckpointError` for what cannot be
    converted well, `UsageError` where `target` exists.
    """
    if not source.is_dir():
        raise CheckpointError(f"no checkpoint at {source}: no such folder")
    if target.exists():
        raise UsageError(f"{target} exists; give the name of a new folder")
    names = {path.name for path in source.iterdir()}
    meta = "params.json" in names and any(name.startswith("consolidated.") for name in names)
    pickles = {_PICKLES, f"{_PICKLES}.index.json"} & names
    if not meta and not pickles:
        raise CheckpointError(
            f"nothing to convert in {source}: neither consolidated.00.pth with params.json nor "
            f"{_PICKLES}"
        )
    parent = target.absolute().parent
    sources = shard_files(source) if meta else sorted(source.glob("*.bin"))
    _check_disk(sum(path.stat().st_size for path in sources), parent)
    parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".converting", dir=parent))
    try:
        made = Converted(target)
        if meta:
            if chat is None:
                chat = _CHAT.search(_name_of(source)) is not None
            length = _convert_meta(source, new, chat=chat, context=context)
            made = Converted(target, chat, length)
        else:
            _convert_pickles(source, new)
        read_weights(Folder(new))
        # mkdtemp's are for one user alone.
        new.chmod(0o755)
        new.rename(target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return made


def _name_of(folder: Path) -> str:
    """The model's name; for a snapshot of the cache, and for `original`, that of a folder above."""
    parts = folder.absolute().parts
    if parts[-1] == "original":
        parts = parts[:-1]
    return parts[-3] if len(parts) > 2 and parts[-2] == "snapshots" else parts[-1]


def _check_disk(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(nearest_existing(folder)).free
    if needed > free:
        raise CheckpointError(
            f"the converted checkpoint needs {in_words(needed)}, and {in_words(free)} are free in "
            f"{folder}; free some, or give another folder"
        )


def _convert_meta(source: Path, new: Path, *, chat: bool, context: int | None) -> int:
    """Writes the new checkpoint; the length of its context."""
    params = Params.read(source)
    model = next(
        (
            path
            for folder in (source, source.parent)
            if (path := folder / "tokenizer.model").exists()
        ),
        None,
    )
    if model is None:
        raise CheckpointError(
            f"no tokenizer.model in {source} nor in the folder above; copy Meta's there"
        )
    weights = MetaWeights(source, params)
    tiktoken = is_tiktoken(model)
    length = context or context_length(params, tiktoken)
    if tiktoken:
        written = write_tiktoken(
            model,
            new,
            rows=weights.vocab_size,
            newer=params.scaled_rope,
            chat=chat,
            context=length,
        )
    else:
        written = write_sentencepiece(model, new, chat=chat, context=length)
    _write_json(new / "tokenizer_config.json", written.settings)
    _write_json(new / "config.json", _config(params, weights, written, length))
    _write_json(new / "generation_config.json", _generation_config(written, chat))
    _write_weights(weights.entries(), new)
    return length


def _config(
    params: Params, weights: MetaWeights, written: WrittenTokenizer, length: int
) -> dict[str, Any]:
    """As the repositories of transformers write it, so that all its versions read it."""
    ends = written.eos_token_ids
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": written.bos_token_id,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0],
        "head_dim": params.head_dim,
        "hidden_act": "silu",
        "hidden_size": params.dim,
        "initializer_range": 0.02,
        "intermediate_size": weights.intermediate_size,
        "max_position_embeddings": length,
        "mlp_bias": False,
        "num_attention_heads": params.heads,
        "num_hidden_layers": params.layers,
        "num_key_value_heads": params.kv_heads,
        "rms_norm_eps": params.norm_eps,
        "rope_scaling": rope_scaling(params),
        "rope_theta": params.rope_theta,
        "tie_word_embeddings": weights.tied,
        "torch_dtype": str(weights.dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": weights.vocab_size,
    }


def _generation_config(written: WrittenTokenizer, chat: bool) -> dict[str, Any]:
    ends = written.eos_token_ids
    config: dict[str, Any] = {
        "bos_token_id": written.bos_token_id,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0],
    }
    # What Meta's own example programs sample with.
    return {**config, "do_sample": True, "temperature": 0.6, "top_p": 0.9} if chat else config


def _convert_pickles(source: Path, new: Path) -> None:
    """The weights of pytorch_model*.bin as safetensors; everything else is copied."""
    config = read_json(source, "config.json")
    index = read_json(source, f"{_PICKLES}.index.json")
    names = sorted(set(index.get("weight_map", {}).values())) if index else [_PICKLES]
    tied = bool(config.get("tie_word_embeddings"))
    entries = []
    for name in names:
        tensors = open_pickle(source / name)
        for key in tensors:
            # Computed, not learnt: old checkpoints hold them.
            computed = key.endswith("rotary_emb.inv_freq")
            if not computed and not (tied and key == "lm_head.weight"):
                tensor = tensors[key]
                # A copy: tensors that share memory cannot be stored.
                copy = partial(torch.clone, tensor, memory_format=torch.contiguous_format)
                entries.append(TensorEntry(key, tuple(tensor.shape), tensor.dtype, copy))
    _write_weights(entries, new)
    for path in source.iterdir():
        keep = path.suffix in (".json", ".jinja", ".txt", ".model") and path.is_file()
        if keep and not path.name.startswith(_PICKLES):
            shutil.copyfile(path, new / path.name)


def _write_weights(entries: Sequence[TensorEntry], new: Path) -> None:
    """Writes the tensors, a file at a time, with their index."""
    files: list[list[TensorEntry]] = [[]]
    for entry in entries:
        if files[-1] and sum(one.bytes for one in files[-1]) + entry.bytes > SHARD_BYTES:
            files.append([])
        files[-1].append(entry)
    placed = {}
    total = sum(entry.bytes for entry in entries)
    with Bar("converting", total) as bar:
        for number, members in enumerate(files, start=1):
            name = SINGLE
            if len(files) > 1:
                name = f"model-{number:05}-of-{len(files):05}.safetensors"
            made = {}
            for entry in members:
                made[entry.name] = entry.make()
                placed[entry.name] = name
                bar.advance(entry.bytes)
            save_file(made, new / name, metadata={"format": "pt"})
    if len(files) > 1:
        _write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
