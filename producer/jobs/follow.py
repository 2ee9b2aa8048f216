"""Following a job to its end, with a live bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from models.database import Database
from nightherd.errors import EXIT_FAILED_ROWS, EXIT_NOT_COMPLETED
from producer.jobs.status import JobView, job_view


def exit_code(view: JobView) -> int:
    """0 if every row succeeded, 5 with failed rows, 6 if cancelled or expired."""
    if view.state != "completed":
        return EXIT_NOT_COMPLETED
    return EXIT_FAILED_ROWS if view.failed else 0


def follow(
    database: Database,
    job_id: str,
    *,
    poll_seconds: float = 0.5,
    on_poll: Callable[[JobView], None] | None = None,
    starting: Callable[[], str] = lambda: "",
) -> JobView:
    """Waits until the job has ended and returns its last view; patient with the database.

    The bar appears on standard error if that is a terminal. `on_poll` is called with each view and
    may raise to end the waiting; `starting` says what a worker that starts does just now.
    """
    bar = _Bar(starting) if sys.stderr.isatty() else None
    try:
        while True:
            view = database.retrying(
                lambda connection: job_view(connection, job_id), reading=True, patience=300.0
            )
            if bar is not None:
                bar.show(view)
            if on_poll is not None:
                on_poll(view)
            if not view.open:
                return view
            time.sleep(poll_seconds)
    finally:
        if bar is not None:
            bar.close()


class _Bar:
    """One line that is drawn anew: bar, counts, speed, time left."""

    def __init__(self, starting: Callable[[], str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._starting = starting
        self._waiting_for = ""
        self._since = time.monotonic()
        self._polls: list[tuple[float, int]] = []

    def show(self, view: JobView) -> None:
        ended = view.done + view.failed
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=view.samples, detail="")
        self._progress.update(
            self._task,
            description=f"{view.id} {view.state}",
            completed=ended,
            total=view.samples,
            detail=self._detail(view),
        )
        self._progress.refresh()

    def _detail(self, view: JobView) -> str:
        parts = []
        if view.failed:
            parts.append(f"{view.failed:,} failed")
        rate = view.tokens_per_second or self._rate_between_polls(view)
        if view.open and rate:
            parts.append(f"{rate:,.0f} tokens/s")
            if view.done:
                left = view.pending * (view.completion_tokens / view.done) / rate
                parts.append(f"{left:,.0f} s left")
        if view.open and not view.workers_serving:
            parts.append(self._waiting("waiting for a worker"))
        elif view.open and not view.workers and not view.done:
            phase = self._starting()
            parts.append(self._waiting("worker starting") + (f": {phase}" if phase else ""))
        return ", ".join(parts)

    def _waiting(self, what: str) -> str:
        """With the seconds since that began."""
        if what != self._waiting_for:
            self._waiting_for, self._since = what, time.monotonic()
        return f"{what}, {time.monotonic() - self._since:,.0f} s"

    def _rate_between_polls(self, view: JobView) -> float:
        """Tokens per second between polls, until the workers have reported theirs."""
        now = time.monotonic()
        self._polls = [*self._polls[-20:], (now, view.completion_tokens)]
        since, tokens = self._polls[0]
        return (view.completion_tokens - tokens) / (now - since) if now > since else 0.0

    def close(self) -> None:
        if self._task is not None:
            self._progress.stop()
