"""Compiling the kernels: once, in one process group, and what failed is not tried again."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compilers import Slow, quick, wait_until
from worker.engine.cpu import compiler as kernel_compiler
from worker.engine.cpu.compiler import CpuKernels, LibraryError, find_compiler, fingerprint
from worker.engine.cpu.level import cpu_level
from worker.engine.cpu.library import load_library

pytestmark = pytest.mark.skipif(find_compiler() is None, reason=kernel_compiler.NO_COMPILER)
CXX = os.environ.get("CXX", "")
_CODE = (
    "import logging, sys; from pathlib import Path; "
    "from worker.engine.cpu.compiler import CpuKernels; "
    "logging.basicConfig(level=logging.INFO); print(CpuKernels.here(Path(sys.argv[1])).library())"
)


def command(folder: Path) -> list[str]:
    """A process that makes sure of the library, and prints its path."""
    return [sys.executable, "-P", "-c", _CODE, str(folder)]


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slow:
    made = Slow(tmp_path)
    monkeypatch.setenv("CXX", str(made.path))
    return made


def works_afterwards(folder: Path, compiler: str) -> None:
    """No lock is left and no half library: the next start compiles."""
    environment = {**os.environ, "CXX": compiler}
    done = subprocess.run(
        command(folder), capture_output=True, text=True, timeout=150, check=True, env=environment
    )
    assert Path(done.stdout.strip()).is_file()
    assert not list(folder.glob("compile-*"))
    assert "waiting for another process" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ends_takes_its_compile_along(
    number: int, slow: Slow, tmp_path: Path
) -> None:
    folder = tmp_path / "kernels"
    process = subprocess.Popen(command(folder), stderr=subprocess.DEVNULL)
    try:
        wait_until(slow.started)
        assert not slow.ended()
        process.send_signal(number)
        wait_until(slow.ended, seconds=1)
        process.wait(5)
    finally:
        process.kill()
    # The machine's own compiler once, for the whole way.
    works_afterwards(folder, CXX if number == signal.SIGKILL else str(quick(tmp_path)))


def test_a_compile_that_takes_too_long_is_ended_whole_and_remembered(
    slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_compiler, "COMPILE_SECONDS", 0.5)
    kernels = CpuKernels.here(tmp_path / "kernels")
    with pytest.raises(LibraryError, match=r"slow-c\+\+ takes more than 0.5 s"):
        kernels.library()
    assert slow.started()
    wait_until(slow.ended, seconds=1)
    assert not list(kernels.folder.glob("compile-*"))
    failure = kernels.failure()
    assert failure is not None
    assert "takes more than" in failure.reason
    works_afterwards(kernels.folder, str(quick(tmp_path)))


def test_ten_at_once_compile_once(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    processes = [
        subprocess.Popen(command(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(10)
    ]
    outputs = [process.communicate(timeout=150) for process in processes]
    assert {out for out, _ in outputs} == {f"{path}\n" for path in folder.glob("*.so")}
    said = "".join(err for _, err in outputs)
    assert said.count("compiling the kernels") == 1
    assert said.count("waiting for another process that compiles the kernels") >= 1


def failing(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> Path:
    """A compiler that counts its runs, says something and fails."""
    script = folder / "broken-c++"
    script.write_text(f"#!/bin/sh\necho run >> {folder}/runs\necho '{said}' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return folder / "runs"


def test_a_failure_is_said_in_one_line_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = failing(tmp_path, monkeypatch, "step.h:1:1: error: no such header\nand more")
    kernels = CpuKernels.here(tmp_path / "kernels")
    with pytest.raises(LibraryError, match=r"broken-c\+\+ fails on .*: .*no such header") as first:
        kernels.library()
    assert "\n" not in str(first.value)
    tried = runs.read_text()
    failure = kernels.failure()
    assert failure is not None
    assert failure.path is not None
    assert "and more" in failure.output
    with pytest.raises(LibraryError, match="tried before; to try again remove") as second:
        kernels.library()
    assert str(failure.path) in str(second.value)
    assert runs.read_text() == tried
    # Another level, compiler or source is another matter; so is the file's removal.
    assert CpuKernels(kernels.folder, "plain").failure() is None or kernels.level == "plain"
    failure.path.unlink()
    with pytest.raises(LibraryError, match="no such header"):
        kernels.library()
    assert runs.read_text() > tried
    works_afterwards(kernels.folder, str(quick(tmp_path)))
    # With the broken one it is still as it was.
    assert kernels.failure() is not None


@pytest.mark.parametrize(
    "said", ["No space left on device", "Killed signal terminated program cc1plus"]
)
def test_a_lack_that_may_pass_is_not_remembered(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = failing(tmp_path, monkeypatch, f"fatal error: {said}")
    kernels = CpuKernels.here(tmp_path / "kernels")
    kernels.prepare()
    tried = runs.read_text()
    # Not tried twice in one start: who asks next is told what was found out.
    with pytest.raises(LibraryError, match=said):
        kernels.library()
    assert runs.read_text() == tried
    assert kernels.failure() is None
    with pytest.raises(LibraryError, match=said):
        kernels.library()
    assert runs.read_text() > tried


def test_zig_links_with_the_systems_libraries() -> None:
    found = list(kernel_compiler._system_libraries())
    assert [path.name.partition(".so")[0] for path in found] == ["libstdc++", "libgcc_s"]
    assert all(path.is_file() for path in found)


def test_a_memory_of_failures_that_cannot_be_read_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = failing(tmp_path, monkeypatch, "error: once")
    kernels = CpuKernels.here(tmp_path / "kernels")
    with pytest.raises(LibraryError, match="once"):
        kernels.library()
    failure = kernels.failure()
    assert failure is not None
    assert failure.path is not None
    for text in ("", "[]", json.dumps({"reason": "none"})):
        failure.path.write_text(text)
        assert kernels.failure() is None
    before = runs.read_text()
    with pytest.raises(LibraryError, match="once"):
        kernels.library()
    assert runs.read_text() > before


def test_without_a_compiler_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(LibraryError, match=r"apt-get install g\+\+, or pip install 'nightherd"):
        CpuKernels.here(tmp_path / "kernels").library()


def test_another_source_flag_compiler_or_level_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = find_compiler()
    assert compiler is not None
    level = cpu_level()
    names = {fingerprint(compiler, level), fingerprint(compiler, "plain")}
    assert len(names) == 2 or level == "plain"
    changed = kernel_compiler.Compiler(compiler.command, (*compiler.facts, "newer"))
    names.add(fingerprint(changed, level))
    with monkeypatch.context() as patch:
        patch.setattr(kernel_compiler, "_FLAGS", (*kernel_compiler._FLAGS, "-O1"))
        names.add(fingerprint(compiler, level))
    (tmp_path / "step.h").write_text("other")
    monkeypatch.setattr(kernel_compiler, "SOURCES", tmp_path)
    names.add(fingerprint(compiler, level))
    assert len(names) == (5 if level != "plain" else 4)


def test_what_it_does_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_library(CpuKernels.here(tmp_path / "kernels"))
    assert [record.name for record in caplog.records] == ["nightherd.kernels"] * 2
    first, second = (record.message for record in caplog.records)
    assert first == f"compiling the kernels for this CPU ({cpu_level()}), once (about 10 s)"
    assert second.startswith("compiled the kernels in ")
    caplog.clear()
    load_library(CpuKernels.here(tmp_path / "kernels"))
    assert not caplog.records


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(LibraryError, match="cannot be written"):
        load_library(CpuKernels.here(file / "kernels"))
    assert os.path.isfile(file)
