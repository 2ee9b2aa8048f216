"""Which checkpoint it was, exactly, that produced a result."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import nightherd
from nightherd.catalogue import local_folder
from nightherd.text import TextProcessor
from worker.checkpoint.device import device_name
from worker.checkpoint.load import LoadedModel

HASHED_WHOLE = 1 << 30
"""Bytes of weights up to which `weights_hash` reads all of them."""
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10


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
    return [last * index // (_SAMPLES - 1) for index in range(_SAMPLES)]


def provenance(
    key: str,
    text: TextProcessor,
    loaded: LoadedModel,
    engine_name: str,
    cpu_level: str | None = None,
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
            # Another level rounds differently.
            **({} if cpu_level is None else {"cpu_level": cpu_level}),
        },
    }
