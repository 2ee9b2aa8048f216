"""The threads that torch computes with on a CPU."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

log = logging.getLogger("nightherd.engine")

_SOFT = 1
"""`omp_pause_soft` of OpenMP 5.0."""


def end_team() -> bool:
    """Ends the calling thread's team of threads; false if no loaded library can.

    Each thread that computes gets a team of its own and keeps it. While there are more threads in
    teams than processors, GNU OpenMP puts those that wait to sleep at once, and small operations
    take up to seven times as long: so the thread that loads a model must not keep its team beside
    that of the thread which runs it. A later computation makes a new one.
    """
    ended = False
    for path in _libraries():
        try:
            pause = ctypes.CDLL(path).omp_pause_resource_all
        except (OSError, AttributeError):
            continue
        ended |= pause(_SOFT) == 0
    if not ended:
        log.debug("no OpenMP whose threads can be ended: small steps may be slower")
    return ended


def _libraries() -> set[str]:
    """GNU OpenMP as this process has loaded it."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return set()
    return {line.split(maxsplit=5)[5] for line in maps.splitlines() if "libgomp" in line}
