"""Which instructions of a CPU the kernels are compiled for.

Each level is compiled by its own flags, not by `-march=native`: a library runs on every CPU that
has its level, and any level that a machine has can be tried there.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

log = logging.getLogger("nightherd.kernels")

Level = Literal["amx", "avx512bf16", "avx512", "avx2", "plain"]

LEVELS: tuple[Level, ...] = get_args(Level)
"""The best first."""

VARIABLE = "NIGHTHERD_CPU_LEVEL"

_CPUINFO = Path("/proc/cpuinfo")
# Linux, Documentation/arch/x86/xstate.rst; the first is a number for x86-64 alone.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_BF16 = (*_AVX512, "avx512bf16")
FEATURES: Mapping[Level, tuple[str, ...]] = {
    "amx": (*_BF16, "amx-tile", "amx-bf16"),
    "avx512bf16": _BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "plain": (),
}
"""What each level needs beyond what every CPU of the architecture has, as compilers call it."""

_IN_CPUINFO = {"avx512bf16": "avx512_bf16", "amx-tile": "amx_tile", "amx-bf16": "amx_bf16"}
"""Where Linux has another name."""


def cpu_level(requested: Level | None = None) -> Level:
    """The fastest level of this machine, or the requested one (by argument or
    `NIGHTHERD_CPU_LEVEL`) as far as the machine has it."""
    wanted = requested or os.environ.get(VARIABLE)
    for level in LEVELS:
        if level == wanted:
            return max(machine_level(), level, key=LEVELS.index)
    return suited_level()


def suited_level() -> Level:
    """The fastest level of this machine."""
    best = machine_level()
    # Without AMX, Intel's take two cycles for a product of bfloat16 pairs, where two FMAs take one:
    # to widen bfloat16 is faster by a third (docs/benchmarks.md).
    return "avx512" if best == "avx512bf16" and _vendor() == "GenuineIntel" else best


def machine_level(cpuinfo: Path = _CPUINFO) -> Level:
    """The best level of this machine; `cpuinfo` is for tests."""
    flags = set(_line("flags", cpuinfo).split())
    for level in LEVELS:
        there = {_IN_CPUINFO.get(name, name) for name in FEATURES[level]} <= flags
        if there and (level != "amx" or may_use_amx()):
            return level
    return "plain"


@functools.cache
def may_use_amx() -> bool:
    """Requests AMX's registers from Linux, for all threads of this process; whether it got them.

    Linux before 5.16, and some sandboxes, refuse.
    """
    libc = ctypes.CDLL(None)
    may = bool(libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)
    if not may:
        log.warning(
            "Linux does not let this process use the CPU's AMX, without which bfloat16 is about "
            "half as fast: it takes Linux 5.16, and a sandbox that allows arch_prctl"
        )
    return may


def _vendor(cpuinfo: Path = _CPUINFO) -> str:
    return _line("vendor_id", cpuinfo)


def levels_here() -> tuple[Level, ...]:
    """All levels that this machine has, up to the one that `NIGHTHERD_CPU_LEVEL` says."""
    wanted = os.environ.get(VARIABLE)
    best = cpu_level() if wanted else machine_level()
    return LEVELS[LEVELS.index(best) :]


def x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _line(name: str, cpuinfo: Path) -> str:
    """A line of /proc/cpuinfo, of the first processor; flags are those that Linux supports too."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, "")
