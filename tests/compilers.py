"""Compilers that misbehave."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(done: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which waits to be reaped, does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def quick(folder: Path) -> Path:
    """A compiler that is done at once: what it makes is empty."""
    script = folder / "quick-c++"
    script.write_text(
        '#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\nexit 0\n'
    )
    script.chmod(0o755)
    return script


class Slow:
    """A compiler that starts another process, as they do, and never ends."""

    def __init__(self, folder: Path) -> None:
        self._pids = folder / "pids"
        self.path = folder / "slow-c++"
        self.path.write_text(f"#!/bin/sh\nsleep 600 &\necho $$ $! >> {self._pids}\nwait\n")
        self.path.chmod(0o755)

    def pids(self) -> list[int]:
        return [int(pid) for pid in self._pids.read_text().split()] if self._pids.exists() else []

    def started(self) -> bool:
        return len(self.pids()) >= 2

    def ended(self) -> bool:
        return not any(alive(pid) for pid in self.pids())
