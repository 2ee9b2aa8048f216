"""Checkpoints on this machine: find, check, download, load, convert.

`device`, `report`, `load`, `identity` and `convert` need torch; the other modules do not. What is
named here is imported when it is first asked for, so that listing a cache does not cost seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.checkpoint.device import (
        device_name,
        only_for_kernels,
        resolve_device,
        resolve_dtype,
    )
    from worker.checkpoint.identity import provenance, weights_hash
    from worker.checkpoint.load import (
        LoadedModel,
        Opened,
        load_model,
        load_text,
        open_checkpoint,
    )
    from worker.checkpoint.locate import find
    from worker.checkpoint.report import Report, check

_HOMES = {
    "LoadedModel": "load",
    "Opened": "load",
    "Report": "report",
    "check": "report",
    "device_name": "device",
    "find": "locate",
    "load_model": "load",
    "load_text": "load",
    "only_for_kernels": "device",
    "open_checkpoint": "load",
    "provenance": "identity",
    "resolve_device": "device",
    "resolve_dtype": "device",
    "weights_hash": "identity",
}

__all__ = [
    "LoadedModel",
    "Opened",
    "Report",
    "check",
    "device_name",
    "find",
    "load_model",
    "load_text",
    "only_for_kernels",
    "open_checkpoint",
    "provenance",
    "resolve_device",
    "resolve_dtype",
    "weights_hash",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
