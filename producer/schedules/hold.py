"""The lease on a firing that a process works at: renewed beside the work, checked within it."""

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
"""A lease is not renewed when no heartbeat came for so long: another beat may have more luck."""


class LeaseLostError(Exception):
    """Another process has the firing now: what this one made of it must be discarded."""


class Hold:
    """The lease on one firing, as the thread that works at it sees it."""

    def __init__(self, firing_id: int) -> None:
        self.firing_id = firing_id
        self.lost = False
        self.last_heartbeat = time.monotonic()

    def heartbeat(self, *_progress: object) -> None:
        """Says that the work makes progress; raises `LeaseLostError` if the lease is lost."""
        self.last_heartbeat = time.monotonic()
        if self.lost:
            raise LeaseLostError


class Holder:
    """Who claims firings: one thread that works at one at a time, and one that renews its lease.

    The check of a large input, or a query of hours, may send no progress for long; so the renewal
    is a thread of its own.
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
        """Renews the lease once, if the work makes progress."""
        if hold.lost or time.monotonic() - hold.last_heartbeat > STUCK_SECONDS:
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
