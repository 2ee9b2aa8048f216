"""Children with a time limit that end with us, and how busy the machine is with other things."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

QUIET = 0.3
"""Cores' worth of other processes that a measurement bears."""
_TETHER = (sys.executable, "-IS", str(Path(__file__).resolve().parent / "tether.py"))
_ENDING = 10.0
"""Seconds that the end of killed processes may take; a card's take longest."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
    """CPU time of all processes since the start of the machine, summed over its cores."""
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


class Interrupted(SystemExit):
    """A signal asks for the end; the exit code is that of a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self._name = signal.Signals(number).name

    def __str__(self) -> str:
        return self._name


def end_in_order() -> None:
    """From now on the first of `_SIGNALS` raises `Interrupted`, and more of them do nothing.

    More do come: `timeout` sends its signal to the process, then to its group. What was ignored
    from the start, as under `nohup`, stays so.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def start(
    command: list[str], environment: Mapping[str, str], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    """A child in a session of its own; all that it starts ends with this process, or by `end`."""
    return subprocess.Popen(
        [*_TETHER, *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )


def run(command: list[str], environment: Mapping[str, str], log: Path, limit: float) -> Ended:
    """Runs a child in a session of its own; all of it is ended when the time is over, or when this
    process ends, in whatever way."""
    before, started, own = busy_seconds(), time.monotonic(), _children()
    with log.open("ab") as output:
        tether = start(command, environment, output)
    code: int | None
    try:
        code = tether.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end(tether)
    seconds = time.monotonic() - started
    used = _children() - own
    return Ended(code, seconds, max(0.0, (busy_seconds() - before - used) / seconds))


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def end(tether: subprocess.Popen[bytes]) -> None:
    """Ends a tether and all below it: at once, as nothing that they would still do is of use."""
    if tether.stdin is not None:
        tether.stdin.close()
    try:
        code = tether.wait(_ENDING)
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL
    if code < 0:  # the tether itself was killed: by us, or when memory ran out
        try:
            os.killpg(tether.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        tether.wait(_ENDING)
