"""The C kernels of a worker with these settings."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from nightherd.engine_kinds import requested_kind
from nightherd.settings import Settings
from worker.engine.cpu.compiler import CpuKernels


def kernel_folder(settings: Settings) -> Path:
    """The cache folder, or the data folder where that cannot be written."""
    folder = settings.cache / "kernels"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder if os.access(folder, os.W_OK) else settings.home / "kernels"


def kernels_of(settings: Settings) -> CpuKernels | None:
    """Those that a worker here would use on a CPU; None where another engine is asked for."""
    if requested_kind(settings.engine, "cpu") not in ("auto", "cpu"):
        return None
    return CpuKernels.here(kernel_folder(settings), settings.cpu_level)
