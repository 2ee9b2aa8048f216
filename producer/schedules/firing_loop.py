"""The rounds of a beat: take over what lapsed, fire what is due, end what has ended.

Any number of loops may run, in any number of processes; none leads. What they do is guarded by the
rows: a schedule that is due is locked while its scheduled times are looked at, a scheduled time has
one firing, a firing has one holder.
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
from producer.jobs.create import Limits
from producer.schedules.cron import parse_rule, show_utc
from producer.schedules.ending import Ended, end_all
from producer.schedules.firing import Fired, FiringClaim, fire, queue_failure_webhook
from producer.schedules.hold import Holder
from producer.schedules.misfire import MisfireDecision, Policy, Skip, decide

log = logging.getLogger("nightherd.schedules")

MAX_ATTEMPTS = 5
_PUBLISH_SECONDS = 1.0
_END_CHECK_SHARE = 20
"""The look for ended jobs takes at most one part in so many of the time."""

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
    firing: FiringClaim | None


class FiringLoop:
    """One thread's rounds. Not thread-safe: a process that wants two at once makes two."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        publish_wakeups: Callable[[str], object] = lambda checkpoint_key: None,
        clock: Clock = database_clock,
    ) -> None:
        """`publish_wakeups` announces a checkpoint's new jobs.

        `clock` gives the time that scheduled times are compared with.
        """
        self.holder = Holder(database, settings)
        self._database = database
        self._settings = settings
        self._publish_wakeups = publish_wakeups
        self._clock = clock
        self._pending_wakeups: set[str] = set()
        self._published_at = 0.0
        self._look_for_ends_at = 0.0

    def close(self) -> None:
        self.holder.close()

    def round(self, stop: threading.Event | None = None) -> Round:
        """Does all that is to be done now. Raises `DatabaseError` if the database refuses."""
        done = Round()
        limits: Limits = {}
        try:
            now, lapsed, due = self._database.retrying(self._what_is_due, reading=True)
            if lapsed:
                self._take_over_lapsed(done, limits, stop)
            if due:
                self._fire_due(done, now, limits, stop)
        finally:
            self._publish_pending(now=True)
        if time.monotonic() >= self._look_for_ends_at:
            began = time.monotonic()
            done.ended = end_all(self._database, self.holder)
            self._look_for_ends_at = began + _END_CHECK_SHARE * (time.monotonic() - began)
        return done

    def _what_is_due(self, connection: Connection) -> tuple[datetime, bool, bool]:
        now = self._clock(connection)
        return now, firings.is_any_lapsed(connection), schedules.is_any_due(connection, now)

    # Claims of others that lapsed.

    def _take_over_lapsed(self, done: Round, limits: Limits, stop: threading.Event | None) -> None:
        while stop is None or not stop.is_set():
            row = self._database.retrying(self._claim_lapsed)
            if row is None:
                return
            if row.state == "failed":
                log.warning("firing %s of %s failed: %s", row.id, row.name, row.reason)
                continue
            time_shown = show_utc(row.scheduled_for_utc)
            log.warning("%s of %s: its beat is gone, taken over", row.name, time_shown)
            self._fire(FiringClaim.of(row), done, limits)

    def _claim_lapsed(self, connection: Connection) -> FiringRow | None:
        row = firings.take_over(
            connection,
            self.holder.id,
            lease_seconds=self.holder.lease_seconds,
            max_attempts=MAX_ATTEMPTS,
        )
        if row is not None and row.state == "failed":
            queue_failure_webhook(connection, row, "firing.failed", row.reason)
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
                    return _Claimed(first, FiringClaim.of(row))
            schedule = schedules.lock_due(connection, now, cursor)
            return None if schedule is None else self._decide_and_claim(connection, schedule, now)

        return self._database.retrying(work)

    def _decide_and_claim(
        self, connection: Connection, schedule: ScheduleRow, now: datetime
    ) -> _Claimed:
        """Records what is skipped, claims what fires, and moves the schedule on."""
        cursor = (schedule.next_at, schedule.id)
        try:
            decision = self._decide(connection, schedule, now)
        except NightherdError as error:
            # A zone that this machine does not know, say. Others may know it.
            log.error("schedule %s cannot fire here: %s", schedule.name, error)
            return _Claimed(cursor, None)
        if decision.next_at != schedule.next_at:
            schedules.advance(connection, schedule.id, seen=schedule.next_at, to=decision.next_at)
        for skip in decision.skips:
            _record_skip(connection, schedule, skip)
        if decision.fire is None:
            return _Claimed(cursor, None)
        firing_id = firings.claim(
            connection,
            schedule.id,
            decision.fire,
            self.holder.id,
            lease_seconds=self.holder.lease_seconds,
        )
        if firing_id is None:
            return _Claimed(cursor, None)
        return _Claimed(cursor, FiringClaim.first(firing_id, schedule, decision.fire))

    def _decide(
        self, connection: Connection, schedule: ScheduleRow, now: datetime
    ) -> MisfireDecision:
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
        return decide(rule, policy, schedule.next_at, now, busy)

    def _fire(self, claim: FiringClaim, done: Round, limits: Limits) -> None:
        fired = fire(self._database, self._settings, self.holder, claim, limits)
        done.fired.append(fired)
        if fired.checkpoint_key is not None:
            self._pending_wakeups.add(fired.checkpoint_key)
            self._publish_pending()

    def _publish_pending(self, *, now: bool = False) -> None:
        if self._pending_wakeups and (
            now or time.monotonic() - self._published_at > _PUBLISH_SECONDS
        ):
            for key in sorted(self._pending_wakeups):
                self._publish_wakeups(key)
            self._pending_wakeups.clear()
            self._published_at = time.monotonic()


def describe_open(connection: Connection, schedule_id: int) -> str | None:
    """Which firing of a schedule has not ended, if one has not."""
    row = firings.open_firing(connection, schedule_id)
    if row is None:
        return None
    time_shown = show_utc(row.scheduled_for_utc)
    if row.job is None:
        return f"the firing of {time_shown}, whose job is being made,"
    return f"job {row.job} of {time_shown}"


def _record_skip(connection: Connection, schedule: ScheduleRow, skip: Skip) -> None:
    times = skip.times
    firing_id = firings.skip(
        connection,
        schedule.id,
        times.last,
        skip.reason,
        since=times.first if times.count > 1 else None,
    )
    if firing_id is None:
        return
    log.warning("%s: %s", schedule.name, skip.reason)
    if skip.missed:
        row = firings.get(connection, firing_id)
        queue_failure_webhook(connection, row, "firing.missed", skip.reason)


def run(loop: FiringLoop, period_seconds: float, stop: threading.Event) -> None:
    """Rounds until told to stop; a database that is away is said once."""
    down = OncePerState(log)
    try:
        while not stop.is_set():
            try:
                loop.round(stop)
            except DatabaseError as error:
                down.begin("%s; schedules wait", error)
            except Exception:
                # One schedule must not stop the others for good.
                log.exception("a round of the schedules failed; the next one tries again")
            else:
                down.end("the database answers again")
            stop.wait(period_seconds)
    finally:
        loop.close()
