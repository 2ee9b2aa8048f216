"""Which instructions of a CPU the kernels are compiled for.

Each level is compiled by its own flags, not by `-march=native`: a library runs on every CPU that
has its level, and any level that a machine has can be tried there.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

Level = Literal["avx512bf16", "avx512", "avx2", "plain"]

LEVELS: tuple[Level, ...] = get_args(Level)
"""The best first."""

VARIABLE = "NIGHTHERD_CPU_LEVEL"

_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
FEATURES: Mapping[Level, tuple[str, ...]] = {
    "avx512bf16": (*_AVX512, "avx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "plain": (),
}
"""What each level needs beyond what every CPU of the architecture has, as compilers call it."""

_IN_CPUINFO = {"avx512bf16": "avx512_bf16"}
"""Where Linux has another name."""


def cpu_level(cap: Level | None = None) -> Level:
    """The best level that this machine has, or `cap` where that is lower; without one
    `NIGHTHERD_CPU_LEVEL` is asked."""
    asked = cap or os.environ.get(VARIABLE) or LEVELS[0]
    best = machine_level()
    known = [level for level in LEVELS if level == asked]
    return max([best, *known], key=LEVELS.index)


def machine_level(cpuinfo: Path = Path("/proc/cpuinfo")) -> Level:
    """The best level of this machine; `cpuinfo` is for tests."""
    flags = _flags(cpuinfo)
    for level in LEVELS:
        if {_IN_CPUINFO.get(name, name) for name in FEATURES[level]} <= flags:
            return level
    return "plain"


def levels_here() -> tuple[Level, ...]:
    """All levels that this machine has, up to the cap."""
    return LEVELS[LEVELS.index(cpu_level()) :]


def x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _flags(cpuinfo: Path) -> set[str]:
    """Of the first processor, without those that the operating system does not support."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    found = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return set(next(found, "").split())
