"""Which kernels a CPU gets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from worker.engine.cpu import level as levels
from worker.engine.cpu.compiler import Compiler, CpuKernels, LibraryError
from worker.engine.cpu.level import LEVELS, Level, cpu_level, levels_here, machine_level
from worker.engine.cpu.library import load_library

_ZEN3 = "fpu sse2 avx avx2 fma bmi2 f16c"
_SKYLAKE = f"{_ZEN3} avx512f avx512dq avx512cd avx512bw avx512vl"


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (f"{_SKYLAKE} avx512_bf16 amx_bf16 amx_tile amx_int8", "amx"),
        (f"{_SKYLAKE} avx512_bf16 amx_tile amx_int8", "avx512bf16"),
        (f"{_SKYLAKE} avx512_bf16", "avx512bf16"),
        (_SKYLAKE, "avx512"),
        (f"{_ZEN3} avx512f", "avx2"),  # of the first ones with AVX-512, which lack the rest
        (_ZEN3, "avx2"),
        ("fpu sse2 avx avx2", "plain"),
        ("fpu sse2", "plain"),
    ],
)
def test_the_level_is_what_linux_says(
    flags: str, level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "may_use_amx", lambda: True)
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\nvendor_id\t: GenuineIntel\nflags\t\t: {flags}\n")
    assert machine_level(path) == level
    # Other architectures have no such line, other systems no such file.
    path.write_text("processor : 0\nFeatures : asimd\n")
    assert machine_level(path) == machine_level(tmp_path / "none") == "plain"


def test_amx_is_used_where_linux_lets_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: Path
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"flags : {_SKYLAKE} avx512_bf16 amx_bf16 amx_tile\n")
    monkeypatch.setattr(levels, "may_use_amx", lambda: False)
    monkeypatch.setattr("worker.engine.cpu.library.may_use_amx", lambda: False)
    assert machine_level(path) == "avx512bf16"
    with pytest.raises(LibraryError, match="may not use AMX: set NIGHTHERD_CPU_LEVEL=avx512"):
        load_library(CpuKernels(kernels, "amx"))


def test_a_refused_amx_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    libc = SimpleNamespace(syscall=lambda *numbers: -1)
    monkeypatch.setattr(levels.ctypes, "CDLL", lambda name: libc)
    levels.may_use_amx.cache_clear()
    try:
        assert [levels.may_use_amx(), levels.may_use_amx()] == [False, False]
    finally:
        levels.may_use_amx.cache_clear()
    (record,) = caplog.records
    assert "half as fast: it takes Linux 5.16" in record.getMessage()


def machine(monkeypatch: pytest.MonkeyPatch, level: Level, vendor: str) -> None:
    monkeypatch.setattr(levels, "machine_level", lambda: level)
    monkeypatch.setattr(levels, "_vendor", lambda: vendor)
    monkeypatch.delenv("NIGHTHERD_CPU_LEVEL", raising=False)


def test_it_can_be_lowered_and_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "avx512", "GenuineIntel")
    assert cpu_level() == cpu_level("avx512bf16") == "avx512"
    assert (cpu_level("avx2"), cpu_level("plain")) == ("avx2", "plain")
    monkeypatch.setenv("NIGHTHERD_CPU_LEVEL", "avx2")
    assert cpu_level() == "avx2"
    assert cpu_level("plain") == "plain"
    assert levels_here() == ("avx2", "plain")
    machine(monkeypatch, "plain", "")
    assert cpu_level("avx2") == "plain"


def test_intels_cpus_without_amx_widen_bfloat16_unless_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, "amx", "GenuineIntel")
    assert cpu_level() == "amx"
    assert levels_here() == LEVELS  # all are tested
    machine(monkeypatch, "avx512bf16", "GenuineIntel")
    assert cpu_level() == "avx512"
    assert cpu_level("avx512bf16") == "avx512bf16"
    assert levels_here() == LEVELS[1:]
    machine(monkeypatch, "avx512bf16", "AuthenticAMD")
    assert cpu_level() == "avx512bf16"


def test_each_compiler_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    gcc, zig = Compiler(("g++",), ()), Compiler(("python",), (), zig=True)
    for x86, plain, base in ((True, ["-march=x86-64"], "x86_64"), (False, [], "baseline")):
        monkeypatch.setattr("worker.engine.cpu.compiler.x86", lambda x86=x86: x86)
        assert gcc.target("plain") == plain
        assert gcc.target("avx2") == [*plain, "-mavx2", "-mfma"]
        assert zig.target("plain") == [f"-mcpu={base}"]
        assert zig.target("avx2") == [f"-mcpu={base}+avx2+fma"]


@pytest.mark.parametrize("level", levels_here())
def test_each_level_of_this_machine_has_its_own_width(level: Level, kernels: Path) -> None:
    library = load_library(CpuKernels(kernels, level))
    assert library.nightherd_level().decode() == level
    panel = {"amx": 64, "avx512bf16": 64, "avx512": 64, "avx2": 16, "plain": 8}
    assert library.nightherd_panel() == panel[level]
