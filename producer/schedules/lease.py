"""A process's hold on the firing that it works at: renewed beside the work, checked within it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from models.base import new_id
from models.database import Database
from models.store import firings
from nightherd.errors import NightherdError
from nightherd.settings import Settings

log = logging.getLogger("nightherd.schedules")

STUCK_SECONDS = 1_800.0
"""A firing that has not moved for so long is not renewed: another beat may have more luck."""


class LostError(Exception):
    """The firing is not this process's any more: whatever it made of it must go."""


class Hold:
    """The hold on one firing."""

    def __init__(self, firing_id: int) -> None:
        self.firing_id = firing_id
        self.lost = False
        self.moved_at = time.monotonic()

    def move(self, *_progress: object) -> None:
        """Says that the work goes on; raises `LostError` if it should not."""
        self.moved_at = time.monotonic()
        if self.lost:
            raise LostError


class Holder:
    """Who claims: one thread that works at one firing at a time, and a thread that renews.

    A close look at a large input, or a query of hours, sends no progress; so the renewal stands
    beside the work.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self.id = new_id()
        self.lease_seconds = settings.lease_seconds
        self._renew_seconds = settings.renew_seconds
        self._database = database
        self._hold: Hold | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def hold(self, firing_id: int) -> Iterator[Hold]:
        """Renews the firing's lease while the block runs."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="firing-lease", daemon=True)
            self._thread.start()
        self._hold = Hold(firing_id)
        try:
            yield self._hold
        finally:
            self._hold = None

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10)

    def _renew(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            hold = self._hold
            if hold is not None:
                self.renew(hold)

    def renew(self, hold: Hold) -> None:
        """Prolongs the lease once, if the work still moves."""
        if hold.lost or time.monotonic() - hold.moved_at > STUCK_SECONDS:
            return
        try:
            mine = self._database.retrying(
                lambda connection: firings.renew(
                    connection, hold.firing_id, self.id, lease_seconds=self.lease_seconds
                ),
                patience=self._renew_seconds,
            )
        except NightherdError as error:
            log.debug("the lease of firing %s is not renewed now: %s", hold.firing_id, error)
            return
        if not mine and self._hold is hold:
            hold.lost = True
