"""Children with a time limit, and how busy the machine is with other things."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

QUIET = 0.3
"""Cores' worth of other processes that a measurement bears."""
_KILL_AFTER = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended."""

    code: int | None
    """None: it took too long."""
    seconds: float
    others: float
    """Cores' worth of CPU time that other processes took meanwhile."""


def busy_seconds() -> float:
    """CPU time that anybody has used since the start of the machine, of all cores together."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle, waiting = fields[3:5]
    return (sum(fields) - idle - waiting) / _TICKS


def others_now(seconds: float = 1.0) -> float:
    """Cores' worth of CPU in use, while this process sleeps."""
    before, started = busy_seconds(), time.monotonic()
    time.sleep(seconds)
    return (busy_seconds() - before) / (time.monotonic() - started)


def wait_until_quiet(patience: float) -> float:
    """Waits up to `patience` seconds for a quiet machine; returns what is in use at last."""
    deadline = time.monotonic() + patience
    use = others_now()
    while use > QUIET and time.monotonic() < deadline:
        time.sleep(2)
        use = others_now()
    return use


def run(command: list[str], environment: Mapping[str, str], log: Path, limit: float) -> Ended:
    """Runs a child in a session of its own; all of it is ended when the time is over."""
    before, started, own = busy_seconds(), time.monotonic(), _children()
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    code: int | None
    try:
        code = child.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(child)
    seconds = time.monotonic() - started
    used = _children() - own
    return Ended(code, seconds, max(0.0, (busy_seconds() - before - used) / seconds))


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a child and whatever it has left in its process group, which is its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(_KILL_AFTER)
        except subprocess.TimeoutExpired:
            continue
    child.wait(_KILL_AFTER)
