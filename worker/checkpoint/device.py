"""Devices and number formats: what `auto` means here, and errors for what is not here."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nightherd.errors import CheckpointError
from worker.checkpoint.files import Weights
from worker.checkpoint.quantization import method_of
from worker.engine.cpu.compiler import CpuKernels
from worker.engine.cpu.level import cpu_level, machine_level, suited_level, x86
from worker.engine.model.weights import covers

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


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


def loads_straight(device: torch.device) -> bool:
    """Whether weights go from their files to a device, tensor by tensor; transformers needs
    accelerate for that. Without it all of them are in the machine's memory on their way to a card.
    """
    return device.type == "cpu" or importlib.util.find_spec("accelerate") is not None


def resolve_dtype(
    dtype: str,
    device: torch.device,
    *,
    bfloat16: bool = False,
    kernels: CpuKernels | None = None,
) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, else float32.

    A CPU's C kernels widen bfloat16 as fast as they compute in float32: so a checkpoint that is
    stored in it (`bfloat16`) stays so where there are kernels; plain torch is many times slower.
    Raises `CheckpointError` for an unknown name.
    """
    if dtype == "auto":
        fast = computes_in_bfloat16(device, kernels)
        fast = fast or (bfloat16 and device.type == "cpu" and _kernels_available(kernels))
        return torch.bfloat16 if fast else torch.float32
    if dtype not in _DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown: give auto, bfloat16, float16, float32")
    return _DTYPES[dtype]


def keeps_bfloat16(weights: Weights, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is stored as bfloat16, and the C kernels can compute it so."""
    return weights.bfloat16 and method_of(config) is None and covers(config)


def only_for_kernels(dtype: str, device: torch.device, kernels: CpuKernels | None) -> bool:
    """Whether `dtype`, where it became bfloat16, did so for the sake of the C kernels alone."""
    return dtype == "auto" and not computes_in_bfloat16(device, kernels)


def computes_in_bfloat16(device: torch.device, kernels: CpuKernels | None = None) -> bool:
    """Whether a device, a CPU as far as its level goes, has instructions for bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if x86():
        level = kernels.level if kernels else cpu_level()
        # With a lower level asked for, the machine counts as one that has no more than that.
        return machine_level() in _WITH_BFLOAT16 and level in (*_WITH_BFLOAT16, suited_level())
    return bool(_cpu_capabilities().get("sve_bf16"))


_WITH_BFLOAT16 = ("amx", "avx512bf16")


def _kernels_available(kernels: CpuKernels | None) -> bool:
    return kernels is not None and kernels.failure() is None


def _cpu_capabilities() -> Mapping[str, Any]:
    # Not in every torch that we allow.
    capabilities: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return capabilities()


def device_name(device: torch.device) -> str:
    """A device in words, with its model, as in `cuda:0 NVIDIA H100` or `cpu AMD EPYC`."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    model = _cpu_capabilities().get("cpu_name") or os.uname().machine
    return f"{device} {model}"
