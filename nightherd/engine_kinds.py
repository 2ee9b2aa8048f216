"""The kinds of engine: what a setting may say, what results' provenance names, and old spellings.

`cpu` and `cuda` are the engine with kernels of its own, `torch` the same engine in plain torch, and
`transformers` is transformers' own `generate`. Old settings and old rows say `kernels` and
`generate`.
"""

from __future__ import annotations

from typing import Literal

EngineKind = Literal["auto", "cpu", "cuda", "torch", "transformers"]
EngineSetting = Literal["auto", "cpu", "cuda", "torch", "transformers", "kernels", "generate"]

_OLD_STORED = {"kernels": "cpu", "generate": "transformers"}
"""On CUDA devices the engine was called `cuda` from the start."""


def requested_kind(setting: EngineSetting, device_type: str) -> EngineKind:
    """The kind that a setting asks for on a device of this type (`cpu` or `cuda`)."""
    if setting == "kernels":
        return "cuda" if device_type == "cuda" else "cpu"
    return "transformers" if setting == "generate" else setting


def stored_kind(name: str) -> str:
    """The name today of an engine that stored provenance names."""
    return _OLD_STORED.get(name, name)
