"""What a CPU can do, in the levels that engines choose by, and how a lower one is imposed."""

from __future__ import annotations

from pathlib import Path

LEVELS = ("plain", "avx2", "avx512", "avx512bf16", "amx")
"""That an engine can be held to, the lowest first."""
_NEEDS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
}
"""Flags of /proc/cpuinfo, beyond those of the level below."""
_TORCH = {
    "plain": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ATEN_CPU_CAPABILITY": "default",
    },
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
    # Neither of oneDNN's names includes AMX, nor does MKL's, whose later ones are AVX512_E1 to _E5.
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "amx": {},
}
VARIABLES = frozenset({"DNNL_MAX_CPU_ISA", *(name for caps in _TORCH.values() for name in caps)})
"""That hold torch to a level; `DNNL_…` is an older name that oneDNN still reads."""


def of_this_cpu(cpuinfo: str | None = None) -> str:
    """The highest level whose instructions are all there; `plain` on other than x86 CPUs."""
    flags, level = {*_field("flags", cpuinfo).split()}, "plain"
    for name in LEVELS[1:]:
        if not _NEEDS[name] <= flags:
            break
        level = name
    return level


def model_name(cpuinfo: str | None = None) -> str:
    """As the CPU calls itself; it may be empty."""
    return _field("model name", cpuinfo)


def is_lower(level: str, than: str) -> bool:
    return LEVELS.index(level) < LEVELS.index(than)


def environment(level: str | None) -> dict[str, str]:
    """What holds torch, oneDNN and MKL below it to a level."""
    return {} if level is None else _TORCH[level]


def _field(name: str, cpuinfo: str | None) -> str:
    """Of the first CPU."""
    text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
