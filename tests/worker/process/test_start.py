"""A worker's first start on a machine: it compiles the kernels, says so, and can be stopped."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.commands.invoking import NIGHTHERD, CommandLine, environment
from tests.compilers import Slow, wait_until
from worker.engine.cpu.compiler import find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

SILENCE = 5.0
"""Seconds for which nothing may be silent on a terminal."""


def test_the_first_run_is_never_silent(tmp_path: Path) -> None:
    """On a terminal, with a cache folder that has no kernels yet."""
    (tmp_path / "prompts.txt").write_text("Once upon a time\nThere was a fox\n")
    master, slave = pty.openpty()
    arguments = ["run", "prompts.txt", "--checkpoint", "demo", "--max-tokens", "8"]
    process = subprocess.Popen(
        [*NIGHTHERD, *arguments, "-o", "results.jsonl"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=slave,
        env={**environment(tmp_path, cache=tmp_path / "cache"), "COLUMNS": "200"},
        cwd=tmp_path,
        start_new_session=True,
    )
    os.close(slave)
    text, longest, last = b"", 0.0, time.monotonic()
    try:
        while process.poll() is None:
            ready, _, _ = select.select([master], [], [], 0.1)
            now = time.monotonic()
            longest = max(longest, now - last)
            if ready:
                try:
                    text += os.read(master, 1 << 16)
                except OSError:  # the other end is closed
                    break
                last = now
        assert process.wait(20) == 0, text.decode(errors="replace")
    finally:
        process.kill()
        os.close(master)
    assert longest < SILENCE
    said = text.decode(errors="replace")
    assert "compiling the kernels for this CPU" in said
    assert "worker starting, " in said
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_told_to_stop_ends_its_compile(number: int, tmp_path: Path) -> None:
    settings = environment(tmp_path, cache=tmp_path / "cache")
    slow = Slow(tmp_path)
    nightherd = CommandLine({**settings, "CXX": str(slow.path)}, tmp_path)
    log = tmp_path / "worker.log"
    process = nightherd.start("worker", "--checkpoint", "demo", log=log)
    try:
        wait_until(slow.started, seconds=40)
        process.send_signal(number)
        wait_until(slow.ended, seconds=1)
        assert process.wait(15) == 0
    finally:
        process.kill()
    assert "nightherd.kernels: compiling the kernels for this CPU" in log.read_text()
    assert not list((tmp_path / "cache" / "kernels").glob("compile-*"))


def test_ctrl_c_on_run_ends_the_compile_and_keeps_the_job(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    settings = environment(tmp_path, cache=tmp_path / "cache")
    slow = Slow(tmp_path)
    nightherd = CommandLine({**settings, "CXX": str(slow.path)}, tmp_path)
    log = tmp_path / "run.log"
    process = nightherd.start("run", "prompts.txt", "--checkpoint", "demo", log=log)
    try:
        wait_until(slow.started, seconds=40)
        process.send_signal(signal.SIGINT)
        wait_until(slow.ended, seconds=2)
        assert process.wait(20) == 130
    finally:
        process.kill()
    assert "is kept; go on with" in log.read_text()


def test_a_compile_that_failed_is_told_by_doctor(tmp_path: Path) -> None:
    """And a job runs nevertheless, in float32 by plain torch: by the log's own words."""
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exec echo broken 1.0\n"
                      "echo 'x.cpp:1: error: no such thing' >&2\nexit 1\n")  # fmt: skip
    broken.chmod(0o755)
    settings = environment(tmp_path, cache=tmp_path / "cache", cpu_level="plain")
    nightherd = CommandLine({**settings, "CXX": str(broken)}, tmp_path)
    outcome = nightherd("run", "prompts.txt", "--checkpoint", "demo", "--max-tokens", "4")
    assert outcome.code == 0, outcome.err
    (log,) = (tmp_path / "data" / "logs").glob("run-*.log")
    said = log.read_text()
    assert "the C kernels cannot be used" in said
    assert "no such thing" in said
    assert ": float32" in said
    found = json.loads(nightherd("doctor", "--only", "compiler,device", "--json").out)["findings"]
    note, *rest = found
    assert (note["check"], note["level"]) == ("compiler", "note")
    assert "no such thing" in note["what"]
    (remembered,) = (tmp_path / "cache" / "kernels").glob("*.failed.json")
    assert str(remembered) in note["remedy"]
    assert any("float32" in one["what"] for one in rest)


@pytest.mark.parametrize(("engine", "dtype"), [("auto", "bfloat16"), ("transformers", "float32")])
def test_a_lesser_cpu_keeps_bfloat16_where_there_are_kernels(
    engine: str, dtype: str, tmp_path: Path
) -> None:
    settings = environment(tmp_path, cpu_level="plain", engine=engine)
    nightherd = CommandLine(settings, tmp_path)
    report = json.loads(nightherd("checkpoint", "check", "demo", "--json").out)
    assert report["dtype"] == dtype
    per_token = report["memory"]["kv_bytes_per_token"]
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    outcome = nightherd("run", "prompts.txt", "--checkpoint", "demo", "--max-tokens", "4")
    assert outcome.code == 0, outcome.err
    (job,) = json.loads(nightherd("jobs", "--json").out)
    rows = nightherd("results", job["id"], "--with-provenance").out
    made = json.loads(rows.splitlines()[0])["provenance"]
    assert made["dtype"] == dtype
    assert made["versions"].get("cpu_level") == ("plain" if engine == "auto" else None)
    # Keys and values, 5 layers, 2 heads of 64.
    assert per_token == (2 if dtype == "bfloat16" else 4) * 2 * 5 * 2 * 64
