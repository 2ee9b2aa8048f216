"""Tells an engine that hangs from one that is idle or in a long step."""

from __future__ import annotations

import time

from worker.engine.interface import EngineStats

_SHORTEST_STEP_LIMIT = 60.0
_STEP_LIMIT_FACTOR = 20.0
_LONGEST_CHECK_GAP = 5.0
"""Seconds between two checks that count at most."""


class HangDetector:
    """Whether the engine is alive: it steps, or it is idle, or its step is still within the limit.

    The limit is `_SHORTEST_STEP_LIMIT`, or `_STEP_LIMIT_FACTOR` times the longest recent step
    where that is more.
    """

    def __init__(self) -> None:
        self._step_started: float | None = None
        self._last_check = time.monotonic()
        self._step_seconds = 0.0

    def alive(self, stats: EngineStats) -> bool:
        """Call it every second or so.

        The step's age is the sum of the times between checks, not too much for any: a process that
        was stopped as a whole must not blame its engine when it goes on.
        """
        now = time.monotonic()
        since, self._last_check = now - self._last_check, now
        if stats.step_started is None or stats.step_started != self._step_started:
            self._step_started, self._step_seconds = stats.step_started, 0.0
            return True
        self._step_seconds += min(since, _LONGEST_CHECK_GAP)
        limit = max(_SHORTEST_STEP_LIMIT, _STEP_LIMIT_FACTOR * stats.longest_recent_step)
        return self._step_seconds <= limit
