"""What lies in a checkpoint's folder, or in a repository on the Hub: formats, shards, headers.

Weights are not loaded: a safetensors file begins with a JSON header that names every tensor with
its type, shape and offsets, which also shows whether the file is whole. No torch here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nightherd.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
"""What of a repository is needed; `UNWANTED` goes before it."""
# Folders within a repository hold other formats of the same weights; `consolidated` files too.
UNWANTED = ("*/*", "*.bin", "*.pth", "consolidated*")

_HEADER_BYTES = 100 << 20
"""safetensors' own limit of a header's length."""
_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that are converted to the worker's own; others stay as they are stored."""
_PACKED = {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 2, "I32": 8}
"""Weights in a number of a quantised checkpoint, of 4 bits where several fit."""

_META_NAME = re.compile(r"meta-llama/Llama-2-(7|13|70)b(-chat)?", re.IGNORECASE)


class Files(Protocol):
    """The files of a checkpoint, here or on the Hub."""

    @property
    def label(self) -> str:
        """The folder or the repository, for messages."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The files at the top, with their sizes."""

    def read(self, name: str) -> bytes:
        """A whole small file."""

    def start_of(self, name: str, count: int) -> bytes:
        """The first bytes of a file."""


class Folder:
    """The files of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.sizes: Mapping[str, int] = {
                entry.name: entry.stat().st_size for entry in path.iterdir() if entry.is_file()
            }
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None

    @property
    def label(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error.strerror}") from None

    def start_of(self, name: str, count: int) -> bytes:
        try:
            with (self.path / name).open("rb") as file:
                return file.read(count)
        except OSError as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error.strerror}") from None


@dataclass(slots=True)
class Weights:
    """What the headers of a checkpoint's weights say."""

    parameters: dict[str, int] = field(default_factory=dict)
    """Numbers of parameters by their type in the file, as `BF16`."""

    @property
    def count(self) -> int:
        return sum(self.parameters.values())

    @property
    def bfloat16(self) -> bool:
        """Whether most of them are."""
        return 2 * self.parameters.get("BF16", 0) > self.count

    def stored_bytes(self) -> int:
        return sum(_bytes(count, kind) for kind, count in self.parameters.items())

    def bytes_as(self, width: int, *, unpacked: bool = False) -> int:
        """Bytes in memory when floating-point tensors take `width` bytes a number, quantised ones
        too if they are `unpacked`."""
        packed = _PACKED if unpacked else {}
        return sum(
            count * packed.get(kind, 1) * width
            if kind in FLOATS or kind in packed
            else _bytes(count, kind)
            for kind, count in self.parameters.items()
        )


def _bytes(count: int, kind: str) -> int:
    return math.ceil(count * _BITS.get(kind, 8) / 8)


def weight_files(files: Files) -> tuple[str, ...]:
    """The safetensors files that transformers would load; raises `CheckpointError` for none."""
    if SINGLE in files.sizes:
        return (SINGLE,)
    if INDEX in files.sizes:
        shards = sorted(set(_weight_map(files).values()))
        for shard in shards:
            if shard not in files.sizes:
                raise CheckpointError(
                    f"{files.label}: {INDEX} names {shard}, which is not there; "
                    "download or copy it again"
                )
        return tuple(shards)
    raise CheckpointError(_no_safetensors(files))


def _weight_map(files: Files) -> dict[str, str]:
    try:
        index = json.loads(files.read(INDEX))
        weight_map = index["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{files.label}: {INDEX} cannot be read: {reason}; download or copy it again"
        ) from None


def _no_safetensors(files: Files) -> str:
    meta = meta_format(files.label, files.sizes)
    if meta is not None:
        return meta
    names = list(files.sizes)
    said = f"no safetensors files in {files.label} ({SINGLE}, or {INDEX} with its shards)"
    if any(name.endswith(".gguf") for name in names):
        return f"{said}: GGUF files are llama.cpp's; use the repository that they were made from"
    if any(name.endswith((".bin", ".pth", ".pt")) for name in names):
        return (
            f"{said}, and pickles can carry code; use another revision, or convert a folder: "
            "nightherd checkpoint convert DIR OUT"
        )
    if "adapter_config.json" in names:
        return f"{said}: it is an adapter; merge it into its base model first"
    return said


def meta_format(label: str, names: Iterable[str]) -> str | None:
    """The line for Meta's original format (`consolidated.*.pth` and params.json), else None."""
    present = set(names)
    known = _META_NAME.fullmatch(label.partition("@")[0]) is not None
    pickles = any(name.startswith("consolidated.") and name.endswith(".pth") for name in present)
    if not (known or (pickles and "config.json" not in present)):
        return None
    name = label.partition("@")[0]
    if known or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return (
            f"{name} is in Meta's original format; use {name}-hf, or download it with "
            f"`nightherd checkpoint download {name} --all-files` and convert it: "
            "nightherd checkpoint convert DIR OUT"
        )
    return (
        f"{label} is in Meta's original format; use the -hf repository of the same name, or "
        f"convert it: nightherd checkpoint convert {label} OUT"
    )


def read_weights(files: Files) -> Weights:
    """Reads the headers of all weights; raises `CheckpointError` naming a file that is broken."""
    names = weight_files(files)
    weights = Weights()
    placed: dict[str, str] = {}
    for name in names:
        for tensor, entry in _read_header(files, name).items():
            placed[tensor] = name
            count = math.prod(entry["shape"])
            kind = str(entry["dtype"])
            weights.parameters[kind] = weights.parameters.get(kind, 0) + count
    if names != (SINGLE,):
        for tensor, shard in _weight_map(files).items():
            if placed.get(tensor) != shard:
                raise CheckpointError(
                    f"{files.label}: {INDEX} says that {tensor} is in {shard}, which lacks it; "
                    "download or copy them again"
                )
    return weights


def _read_header(files: Files, name: str) -> Mapping[str, Any]:
    """The header of one file, checked against the file's size."""
    size = files.sizes[name]

    def broken(reason: str) -> CheckpointError:
        return CheckpointError(
            f"{files.label}: {name} is broken ({reason}); download or copy it again"
        )

    # Most headers fit into the first read, so that one on the Hub costs one request.
    start = files.start_of(name, 100_000)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{files.label}: {name} is a pointer of Git LFS, not the file; run: git lfs pull"
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(_HEADER_BYTES, size - 8):
        raise broken(f"{size:,} bytes are no whole header")
    if length + 8 > len(start):
        start = files.start_of(name, length + 8)
    try:
        header = json.loads(start[8 : 8 + length])
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        counted = {
            tensor: {"dtype": entry["dtype"], "shape": [int(one) for one in entry["shape"]]}
            for tensor, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise broken("its header is not that of a safetensors file") from None
    missing = 8 + length + end - size
    if missing > 0:
        raise broken(f"{missing:,} of {8 + length + end:,} bytes are missing")
    if missing < 0:
        raise broken(f"{-missing:,} bytes too many")
    return counted
