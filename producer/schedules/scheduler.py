"""The rounds of a beat: take over what lapsed, fire what is due, end what has ended.

Any number of schedulers may run, in any number of processes; none leads. What they do is guarded by
the rows: a schedule that is due is locked while its slots are looked at, a slot has one firing, a
firing has one holder.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import Connection, select

from models.base import db_now
from models.database import Database
from models.store import firings, schedules
from models.store.firings import FiringRow
from models.store.schedules import ScheduleRow
from nightherd.errors import DatabaseError, NightherdError
from nightherd.log import OncePerState
from nightherd.settings import Settings
from producer.cron import parse_rule, show_utc
from producer.schedules.ending import Ended, end_all
from producer.schedules.firing import Claim, Fired, fire, tell_failure
from producer.schedules.lease import Holder
from producer.slots import Plan, Policy, Skip, plan
from producer.submit import Limits

log = logging.getLogger("nightherd.schedules")

MAX_ATTEMPTS = 5
_RING_SECONDS = 1.0
_REST = 20
"""Looking for ends takes at most one part in so many of the time."""

Clock = Callable[[Connection], datetime]


def database_clock(connection: Connection) -> datetime:
    return connection.execute(select(db_now())).scalar_one()


@dataclass(slots=True)
class Round:
    """What one round did."""

    fired: list[Fired] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    looked_at: int = 0
    """Schedules that were due."""


@dataclass(frozen=True, slots=True)
class _Claimed:
    """What came of a look at a schedule that was due."""

    cursor: tuple[datetime, int]
    firing: Claim | None


class Scheduler:
    """One thread's rounds. Not thread-safe: a process that wants two at once makes two."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        ring: Callable[[str], object] = lambda checkpoint_key: None,
        clock: Clock = database_clock,
    ) -> None:
        """`ring` announces a checkpoint's new jobs; `clock` is what slots are compared with."""
        self.holder = Holder(database, settings)
        self._database = database
        self._settings = settings
        self._ring = ring
        self._clock = clock
        self._to_ring: set[str] = set()
        self._rung_at = 0.0
        self._look_for_ends_at = 0.0

    def close(self) -> None:
        self.holder.close()

    def round(self, stop: threading.Event | None = None) -> Round:
        """Does all that is to be done now. Raises `DatabaseError` if the database refuses."""
        done = Round()
        limits: Limits = {}
        try:
            now, lapsed, due = self._database.retrying(self._look, reading=True)
            if lapsed:
                self._take_over(done, limits, stop)
            if due:
                self._fire_due(done, now, limits, stop)
        finally:
            self._ring_all(now=True)
        if time.monotonic() >= self._look_for_ends_at:
            began = time.monotonic()
            done.ended = end_all(self._database, self.holder)
            self._look_for_ends_at = began + _REST * (time.monotonic() - began)
        return done

    def _look(self, connection: Connection) -> tuple[datetime, bool, bool]:
        now = self._clock(connection)
        return now, firings.is_any_lapsed(connection), schedules.is_any_due(connection, now)

    # Claims of others that lapsed.

    def _take_over(self, done: Round, limits: Limits, stop: threading.Event | None) -> None:
        while stop is None or not stop.is_set():
            row = self._database.retrying(self._take_one_over)
            if row is None:
                return
            if row.state == "failed":
                log.warning("firing %s of %s failed: %s", row.id, row.name, row.reason)
                continue
            slot = show_utc(row.scheduled_for_utc)
            log.warning("%s of %s: its beat is gone, taken over", row.name, slot)
            self._fire(Claim.of(row), done, limits)

    def _take_one_over(self, connection: Connection) -> FiringRow | None:
        row = firings.take_over(
            connection,
            self.holder.id,
            lease_seconds=self.holder.lease_seconds,
            max_attempts=MAX_ATTEMPTS,
        )
        if row is not None and row.state == "failed":
            tell_failure(connection, row, "firing.failed", row.reason)
        return row

    # Schedules that are due.

    def _fire_due(
        self, done: Round, now: datetime, limits: Limits, stop: threading.Event | None
    ) -> None:
        cursor: tuple[datetime, int] | None = None
        while stop is None or not stop.is_set():
            claimed = self._claim(now, cursor)
            if claimed is None:
                return
            cursor = claimed.cursor
            done.looked_at += 1
            if claimed.firing is not None:
                self._fire(claimed.firing, done, limits)

    def _claim(self, now: datetime, cursor: tuple[datetime, int] | None) -> _Claimed | None:
        tries = 0

        def work(connection: Connection) -> _Claimed | None:
            nonlocal tries
            tries += 1
            if tries > 1:
                # The first try may have been committed, and only its answer lost.
                mine = firings.held_by(connection, self.holder.id)
                row = None if mine is None else firings.get(connection, mine)
                if row is not None:
                    first = cursor or (datetime.min.replace(tzinfo=now.tzinfo), 0)
                    return _Claimed(first, Claim.of(row))
            schedule = schedules.lock_due(connection, now, cursor)
            return None if schedule is None else self._look_at(connection, schedule, now)

        return self._database.retrying(work)

    def _look_at(self, connection: Connection, schedule: ScheduleRow, now: datetime) -> _Claimed:
        """Records what is skipped, claims what fires, and moves the schedule on."""
        cursor = (schedule.next_at, schedule.id)
        try:
            made = self._plan(connection, schedule, now)
        except NightherdError as error:
            # A zone that this machine does not know, say. Others may know it.
            log.error("schedule %s cannot fire here: %s", schedule.name, error)
            return _Claimed(cursor, None)
        if made.next_at != schedule.next_at:
            schedules.advance(connection, schedule.id, seen=schedule.next_at, to=made.next_at)
        for skip in made.skips:
            _record(connection, schedule, skip)
        if made.fire is None:
            return _Claimed(cursor, None)
        firing_id = firings.claim(
            connection,
            schedule.id,
            made.fire,
            self.holder.id,
            lease_seconds=self.holder.lease_seconds,
        )
        if firing_id is None:
            return _Claimed(cursor, None)
        return _Claimed(cursor, Claim.first(firing_id, schedule, made.fire))

    def _plan(self, connection: Connection, schedule: ScheduleRow, now: datetime) -> Plan:
        rule = parse_rule(schedule.cron, schedule.timezone)
        seconds = schedule.starting_deadline_seconds
        policy = Policy(
            schedule.misfire,
            None if seconds is None else timedelta(seconds=seconds),
            timedelta(seconds=self._settings.misfire_seconds),
        )
        busy = None
        if schedule.concurrency == "forbid":
            busy = describe_open(connection, schedule.id)
        return plan(rule, policy, schedule.next_at, now, busy)

    def _fire(self, claim: Claim, done: Round, limits: Limits) -> None:
        fired = fire(self._database, self._settings, self.holder, claim, limits)
        done.fired.append(fired)
        if fired.checkpoint_key is not None:
            self._to_ring.add(fired.checkpoint_key)
            self._ring_all()

    def _ring_all(self, *, now: bool = False) -> None:
        if self._to_ring and (now or time.monotonic() - self._rung_at > _RING_SECONDS):
            for key in sorted(self._to_ring):
                self._ring(key)
            self._to_ring.clear()
            self._rung_at = time.monotonic()


def describe_open(connection: Connection, schedule_id: int) -> str | None:
    """Which firing of a schedule has not ended, if one has not."""
    row = firings.open_firing(connection, schedule_id)
    if row is None:
        return None
    slot = show_utc(row.scheduled_for_utc)
    if row.job is None:
        return f"the firing of {slot}, whose job is being made,"
    return f"job {row.job} of {slot}"


def _record(connection: Connection, schedule: ScheduleRow, skip: Skip) -> None:
    slots = skip.slots
    firing_id = firings.skip(
        connection,
        schedule.id,
        slots.last,
        skip.reason,
        since=slots.first if slots.count > 1 else None,
    )
    if firing_id is None:
        return
    log.warning("%s: %s", schedule.name, skip.reason)
    if skip.missed:
        row = firings.get(connection, firing_id)
        tell_failure(connection, row, "firing.missed", skip.reason)


def run(scheduler: Scheduler, period_seconds: float, stop: threading.Event) -> None:
    """Rounds until told to stop; a database that is away is said once."""
    down = OncePerState(log)
    try:
        while not stop.is_set():
            try:
                scheduler.round(stop)
            except DatabaseError as error:
                down.begin("%s; schedules wait", error)
            except Exception:
                # One schedule must not stop the others for good.
                log.exception("a round of the schedules failed; the next one tries again")
            else:
                down.end("the database answers again")
            stop.wait(period_seconds)
    finally:
        scheduler.close()
