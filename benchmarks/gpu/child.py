"""A stage's process: SIGINT when its time is over, then all that it has started is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common import say
from processes import Interrupted, start
from processes import end as end_all

GRACE = 20.0
"""Seconds between SIGINT, on which partial results are written, and the kill."""
_LINES, _WIDTH = 150, 500
"""Lines of a stage that are printed, and characters of a line; all of it is in the log."""


@dataclass(frozen=True, slots=True)
class StageExit:
    code: int
    seconds: float
    timed_out: bool


def run(
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
    limit: float,
    grace: float = GRACE,
) -> StageExit:
    """Runs a command and prints what it writes. When its time is over, or when a signal ends this
    process, it gets SIGINT and `grace` seconds; then all of it is killed, as it is when this
    process ends in any other way."""
    started = time.monotonic()
    with log.open("wb") as output:
        tether = start(command, environment, output)
    tail, end = _LogTail(log), 0.0
    try:
        code = _wait(tether, started + limit, tail)
        timed_out = code is None
        if timed_out:
            say(f"-- its {limit:.0f} s are over")
            end = time.monotonic() + grace
            _interrupt(tether)
            _wait(tether, end, tail)
    except Interrupted:
        if not end:
            end = time.monotonic() + grace
            _interrupt(tether)
        _wait(tether, end, tail)
        raise
    finally:
        end_all(tether)
        tail.show_new()
    return StageExit(-1 if code is None else code, time.monotonic() - started, timed_out)


class _LogTail:
    """Prints what is added to a log, line by line; not the line of JSON, which is a file too."""

    def __init__(self, log: Path) -> None:
        self._log, self._offset, self._rest = log, 0, b""
        self._lines_left = _LINES

    def show_new(self) -> None:
        with self._log.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            if not text or text.startswith('{"'):
                continue
            self._lines_left -= 1
            if self._lines_left >= 0:
                say(text[:_WIDTH])
            elif self._lines_left == -1:
                say(f"… and more, in {self._log.name}")


def _wait(tether: subprocess.Popen[bytes], until: float, tail: _LogTail) -> int | None:
    """The exit code; None if it has not come until then."""
    while True:
        left = until - time.monotonic()
        try:
            return tether.wait(max(0.0, min(0.2, left)))
        except subprocess.TimeoutExpired:
            if left <= 0:
                return None
        finally:
            tail.show_new()


def _interrupt(tether: subprocess.Popen[bytes]) -> None:
    """Sends SIGINT to the command alone, which ends what it has started itself. It is the first
    child of the tether; others are orphans, adopted later."""
    try:
        children = Path(f"/proc/{tether.pid}/task/{tether.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGINT)
    except (OSError, IndexError):  # it has just ended
        pass
