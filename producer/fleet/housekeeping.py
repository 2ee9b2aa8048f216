"""The tick: what every worker and `nightherd beat` do every few seconds. Idempotent; any number."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from models.database import Database
from models.store import chunks, jobs, leases, storing
from nightherd.errors import BrokerError
from nightherd.log import OncePerState
from nightherd.settings import Settings
from producer.fleet.dispatch import Dispatcher

log = logging.getLogger("nightherd.housekeeping")

ORPHAN_SECONDS = 600.0
"""A job in state `storing` whose submit stood still for so long is removed."""
FORGET_WORKERS_SECONDS = 7 * 86_400.0


@dataclass(slots=True)
class TickReport:
    """What one tick did."""

    dead_workers: list[str] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    orphan_rows: int = 0
    wake_ups: int = 0


class Housekeeper:
    """One process's housekeeping. Not thread-safe: one thread ticks."""

    def __init__(
        self,
        database: Database,
        dispatcher: Dispatcher,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._dispatcher = dispatcher
        self._settings = settings
        self._clock = clock
        self._ticking_since: float | None = None
        self._last_tick: float | None = None
        self._broker_down = OncePerState(log)

    def tick(self) -> TickReport:
        """Reaps, sweeps and tops up. Raises `DatabaseError` if the database does not answer."""
        report = TickReport()
        try:
            if self._may_reap():
                report.dead_workers = self._reap()
            self._sweep(report)
        except BaseException:
            # A process that missed the database cannot tell who else is alive: count anew.
            self._last_tick = None
            raise
        report.wake_ups = self._top_up()
        return report

    def _may_reap(self) -> bool:
        """Whether this process has ticked for a whole lease without a gap.

        After an outage of the database (or a suspended machine) all leases have lapsed at once,
        and no worker may be declared dead before all had the time to renew.
        """
        now = self._clock()
        since, last = self._ticking_since, self._last_tick
        if since is None or last is None or now - last > self._gap:
            since = now
        self._ticking_since, self._last_tick = since, now
        return now - since >= self._settings.lease_seconds

    @property
    def _gap(self) -> float:
        return self._settings.tick_seconds * 2 + 1

    def _reap(self) -> list[str]:
        """Asks whose lease has lapsed, and reaps those alone if the answer came without delay.

        A database that stands still within the tick lets leases lapse too: only a lease that had
        lapsed in an answer that came at once, on the first attempt, did so by its worker's fault.
        """
        asked = self._clock()
        candidates = self._database.retrying(leases.workers_to_reap, reading=True, patience=0)
        if not candidates or self._clock() - asked > self._gap:
            return []
        limit = self._settings.poison_deaths
        dead = self._database.retrying(
            lambda connection: leases.reap(connection, candidates, poison_deaths=limit)
        )
        for worker_id in dead:
            log.warning("worker %s is dead: its lease lapsed; chunks returned", worker_id)
        return dead

    def _sweep(self, report: TickReport) -> None:
        """Once a period across the fleet."""
        period = self._settings.tick_seconds * 0.9
        if not self._database.retrying(
            lambda connection: leases.elect(connection, "fleet", period_seconds=period)
        ):
            return
        report.completed = self._database.retrying(jobs.complete_all)
        report.expired = self._database.retrying(jobs.expire_overdue)
        for job_id in report.expired:
            log.warning("job %s has expired: its deadline passed before it was done", job_id)
        report.orphan_rows = self._database.retrying(
            lambda connection: storing.remove_orphans(connection, idle_seconds=ORPHAN_SECONDS)
        )
        self._database.retrying(
            lambda connection: leases.forget_old_workers(
                connection, keep_seconds=FORGET_WORKERS_SECONDS
            )
        )

    def _top_up(self) -> int:
        published = 0
        try:
            for key in self._database.retrying(chunks.keys_with_work, reading=True):
                published += self._dispatcher.top_up(key)
        except BrokerError as error:
            self._broker_down.begin("%s; nothing is lost, each tick tries again", error)
        else:
            self._broker_down.end("the broker answers again")
        return published
