"""`run-now` and `backfill`: the same firings as a beat's, made by the command's own process.

A command that is killed leaves a claim that lapses: a beat takes it over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, select

from models.database import Database
from models.schedule import Firing
from models.store import firings, schedules
from models.store.schedules import ScheduleRow
from nightherd.errors import ConflictError, NotFoundError, UsageError
from nightherd.settings import Settings
from producer.jobs.create import Limits
from producer.schedules.cron import Rule, parse_rule
from producer.schedules.firing import Fired, FiringClaim, fire
from producer.schedules.firing_loop import database_clock, describe_open
from producer.schedules.hold import Holder

MAX_BACKFILL = 10_000
"""Scheduled times of one backfill, at most."""


def find_schedule(connection: Connection, name: str) -> ScheduleRow:
    """The schedule of that name; raises `NotFoundError` with one that is close."""
    row = schedules.find(connection, name)
    if row is None:
        raise no_schedule(connection, name)
    return row


def no_schedule(connection: Connection, name: str) -> NotFoundError:
    import difflib

    from models.schedule import Schedule

    names = list(connection.execute(select(Schedule.name).limit(10_000)).scalars())
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "`nightherd schedule list` lists them"
    return NotFoundError(f"no schedule {name!r}; {hint}")


def resume_schedule(connection: Connection, name: str) -> bool:
    """A paused schedule goes on at its next scheduled time; those of the pause become `skipped`.

    False if it was not paused.
    """
    schedule = schedules.lock(connection, name)
    if schedule is None:
        raise no_schedule(connection, name)
    if not schedule.paused:
        return False
    rule = parse_rule(schedule.cron, schedule.timezone)
    now = database_clock(connection)
    next_at = schedule.next_at
    if next_at is not None and next_at <= now:
        missed = rule.missed(next_at - timedelta(microseconds=1), now)
        if missed is not None:
            since = missed.first if missed.count > 1 else None
            reason = f"{missed}: the schedule was paused"
            firings.skip(connection, schedule.id, missed.last, reason, since=since)
        next_at = rule.next(now)
    return schedules.resume(connection, schedule.id, next_at)


def run_now(database: Database, settings: Settings, name: str) -> Fired:
    """Fires once, now, beside the scheduled times; raises `ConflictError` if that is forbidden."""
    holder = Holder(database, settings)

    def claim(connection: Connection) -> int:
        schedule = schedules.lock(connection, name)
        if schedule is None:
            raise no_schedule(connection, name)
        mine = firings.held_by(connection, holder.id)
        if mine is not None:
            return mine  # committed before, and only the answer was lost
        busy = describe_open(connection, schedule.id)
        if schedule.concurrency == "forbid" and busy is not None:
            raise ConflictError(
                f"{name} is busy: {busy} has not ended; wait, or cancel it "
                "(--concurrency allow lets firings overlap)"
            )
        made = firings.claim(
            connection,
            schedule.id,
            database_clock(connection),
            holder.id,
            kind="manual",
            lease_seconds=holder.lease_seconds,
        )
        if made is None:
            raise ConflictError(f"{name} was fired this very millisecond; try again")
        return made

    try:
        firing_id = database.retrying(claim, patience=30.0)
        return _fire(database, settings, holder, firing_id, {})
    finally:
        holder.close()


def _fire(
    database: Database, settings: Settings, holder: Holder, firing_id: int, limits: Limits
) -> Fired:
    row = database.retrying(lambda connection: firings.get(connection, firing_id), reading=True)
    if row is None:
        return Fired(firing_id, lost=True)
    return fire(database, settings, holder, FiringClaim.of(row), limits)


@dataclass(frozen=True, slots=True)
class BackfillTime:
    """A scheduled time in the span of a backfill, and what is done about it."""

    time: datetime
    state: str | None
    """Of its firing; None if there is no record of it."""
    fires: bool
    why: str


def backfill_times(
    database: Database, name: str, begin: datetime, end: datetime
) -> tuple[ScheduleRow, list[BackfillTime]]:
    """All scheduled times in [begin, end], up to now, with what a backfill would do."""

    def load(connection: Connection) -> tuple[ScheduleRow, Sequence[Row[Any]], datetime]:
        schedule = find_schedule(connection, name)
        rows = connection.execute(
            select(Firing).where(
                Firing.schedule_id == schedule.id,
                Firing.scheduled_for_utc >= begin,
                (Firing.scheduled_for_utc <= end) | Firing.since_utc.is_not(None),
            )
        ).all()
        return schedule, rows, database_clock(connection)

    schedule, rows, now = database.retrying(load, reading=True)
    rule = parse_rule(schedule.cron, schedule.timezone)
    own = {row.scheduled_for_utc: row for row in rows}
    runs = [row for row in rows if row.since_utc is not None]
    found: list[BackfillTime] = []
    for time in rule.between(begin - timedelta(microseconds=1), min(end, now)):
        if len(found) == MAX_BACKFILL:
            raise UsageError(f"more than {MAX_BACKFILL:,} scheduled times; give a shorter span")
        found.append(_backfill_time(schedule, own.get(time), runs, time))
    return schedule, found


def _backfill_time(
    schedule: ScheduleRow, own: Row[Any] | None, runs: Sequence[Row[Any]], time: datetime
) -> BackfillTime:
    """Decides about one scheduled time; `own` is its firing, `runs` are those of several times."""
    if own is not None:
        fires = own.state in ("skipped", "failed")
        why = f"was {own.state}" if fires else f"is {own.state}"
        return BackfillTime(time, own.state, fires, why)
    if any(run.since_utc <= time < run.scheduled_for_utc for run in runs):
        return BackfillTime(time, "skipped", True, "was skipped")
    if time < schedule.created_at:
        return BackfillTime(time, None, True, "is from before the schedule")
    why = "has no record: it is still due, or its record was removed"
    return BackfillTime(time, None, False, why)


def backfill(
    database: Database, settings: Settings, schedule: ScheduleRow, times: Sequence[BackfillTime]
) -> Iterator[tuple[BackfillTime, Fired | None]]:
    """Fires the times that a backfill fires, oldest first; None where another was faster.

    Whatever `--concurrency` says: each was asked for, and their jobs wait for one another.
    """
    holder = Holder(database, settings)
    limits: Limits = {}
    rule = parse_rule(schedule.cron, schedule.timezone)
    try:
        for each in times:
            if not each.fires:
                continue
            firing_id = database.retrying(
                lambda connection, time=each.time: _claim_for_backfill(  # type: ignore[misc]
                    connection, schedule, time, rule, holder
                ),
                patience=30.0,
            )
            if firing_id is None:
                yield each, None
                continue
            yield each, _fire(database, settings, holder, firing_id, limits)
    finally:
        holder.close()


def _claim_for_backfill(
    connection: Connection, schedule: ScheduleRow, time: datetime, rule: Rule, holder: Holder
) -> int | None:
    if schedules.lock(connection, schedule.name) is None:
        raise no_schedule(connection, schedule.name)
    row = connection.execute(
        select(Firing).where(
            Firing.schedule_id == schedule.id, Firing.scheduled_for_utc == time
        )
    ).one_or_none()  # fmt: skip
    if row is None:
        return firings.claim(
            connection,
            schedule.id,
            time,
            holder.id,
            kind="backfill",
            lease_seconds=holder.lease_seconds,
        )
    again = firings.claim_again(connection, row.id, holder.id, lease_seconds=holder.lease_seconds)
    if again and row.since_utc is not None:
        # It stood for earlier times too, which stay skipped.
        before = rule.previous(time)
        if before is not None and before >= row.since_utc:
            since = row.since_utc if row.since_utc < before else None
            firings.skip(connection, schedule.id, before, row.reason, since=since)
    return int(row.id) if again else None
