"""Runs a command that ends, with all it has started, when the process that started it has ended.

    python tether.py COMMAND …

Standard input is the tether: a pipe whose other end only the benchmark has. The kernel closes that
end however the benchmark ends, by SIGKILL too, even before this file runs; then everything below is
killed. No driver has to do anything for it. A parent-death signal would reach the driver alone, and
a process group is not all either: the embedded broker, which the worker starts, has left its group
and its parent. So this process adopts orphans, and all that it is to end is below it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER in <linux/prctl.h>


def below(process: int) -> set[int]:
    """All processes that this one has started and those have, zombies included."""
    waiting, found = [process], set[int]()
    while waiting:
        children: list[int] = []
        try:
            for thread in Path(f"/proc/{waiting.pop()}/task").iterdir():
                children += map(int, (thread / "children").read_text().split())
        except OSError:  # it has just ended
            pass
        found.update(children)
        waiting += children
    return found


def main(command: list[str]) -> int:
    """The command's exit code, 128 + N if signal N ended it; nothing is left of it then."""
    ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)
    driver = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_the_tether, daemon=True).start()
    while True:
        # Orphans too are reaped at once: who waits for them to go is not to wait for zombies.
        process, status = os.wait()
        if process == driver.pid:
            break
    # Again and again: a process may have started another one while it was looked for.
    while _kill_all():
        time.sleep(0.01)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _end_with_the_tether() -> None:
    os.read(0, 1)
    _kill_all()


def _kill_all() -> bool:
    """Whether there was anything to kill."""
    left = below(os.getpid())
    for process in left:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:  # it has just ended
            continue
    return bool(left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
