"""A stage's process: asked to end when its time is over, and then ended with all it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common import say
from machine import Interrupted, start
from machine import end as end_all

GRACE = 20.0
"""Seconds between the request to end, on which partial results are written, and the end."""
_LINES, _WIDTH = 150, 500
"""Of a stage, shown; all of it is in the log."""


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    seconds: float
    timed_out: bool


def run(
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
    limit: float,
    grace: float = GRACE,
) -> Ended:
    """Runs a command and shows what it writes. When its time is over, or when a signal ends this
    process, it gets SIGINT and some grace; then nothing of it is left, and neither is there when
    this process ends in any other way."""
    started = time.monotonic()
    with log.open("wb") as output:
        tether = start(command, environment, output)
    shown, end = _Shown(log), 0.0
    try:
        code = _wait(tether, started + limit, shown)
        timed_out = code is None
        if timed_out:
            say(f"-- its {limit:.0f} s are over")
            end = time.monotonic() + grace
            _ask(tether)
            _wait(tether, end, shown)
    except Interrupted:
        if not end:
            end = time.monotonic() + grace
            _ask(tether)
        _wait(tether, end, shown)
        raise
    finally:
        end_all(tether)
        shown.more()
    return Ended(-1 if code is None else code, time.monotonic() - started, timed_out)


class _Shown:
    """Prints what comes into a log, line by line; not the line of JSON, which is a file too."""

    def __init__(self, log: Path) -> None:
        self._log, self._at, self._rest = log, 0, b""
        self._left = _LINES

    def more(self) -> None:
        with self._log.open("rb") as file:
            file.seek(self._at)
            fresh = file.read()
        self._at += len(fresh)
        *lines, self._rest = (self._rest + fresh).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            if not text or text.startswith('{"'):
                continue
            self._left -= 1
            if self._left >= 0:
                say(text[:_WIDTH])
            elif self._left == -1:
                say(f"… and more, in {self._log.name}")


def _wait(tether: subprocess.Popen[bytes], until: float, shown: _Shown) -> int | None:
    """The exit code; None if it has not come until then."""
    while True:
        left = until - time.monotonic()
        try:
            return tether.wait(max(0.0, min(0.2, left)))
        except subprocess.TimeoutExpired:
            if left <= 0:
                return None
        finally:
            shown.more()


def _ask(tether: subprocess.Popen[bytes]) -> None:
    """Only the command itself: what it has started is its own to end. It is the first child; the
    others are orphans, adopted later."""
    try:
        children = Path(f"/proc/{tether.pid}/task/{tether.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGINT)
    except (OSError, IndexError):  # it has just ended
        pass
