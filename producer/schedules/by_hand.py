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
from producer.cron import Rule, parse_rule
from producer.schedules.firing import Claim, Fired, fire
from producer.schedules.lease import Holder
from producer.schedules.scheduler import database_clock, describe_open
from producer.submit import Limits

MAX_BACKFILL = 10_000
"""Slots of one backfill, at most."""


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
    """A paused schedule goes on at its next slot; those of the pause are recorded as skipped.

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
        slots = rule.missed(next_at - timedelta(microseconds=1), now)
        if slots is not None:
            since = slots.first if slots.count > 1 else None
            reason = f"{slots}: the schedule was paused"
            firings.skip(connection, schedule.id, slots.last, reason, since=since)
        next_at = rule.next(now)
    return schedules.resume(connection, schedule.id, next_at)


def run_now(database: Database, settings: Settings, name: str) -> Fired:
    """Fires once, now, beside the slots. Raises `ConflictError` where that is forbidden."""
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
    return fire(database, settings, holder, Claim.of(row), limits)


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot in the span of a backfill, and what is done about it."""

    slot: datetime
    state: str | None
    """Of its firing; None if there is no record of it."""
    fires: bool
    why: str


def slots_of_backfill(
    database: Database, name: str, begin: datetime, end: datetime
) -> tuple[ScheduleRow, list[Slot]]:
    """All slots in [begin, end], up to now, with what a backfill would do."""

    def look(connection: Connection) -> tuple[ScheduleRow, Sequence[Row[Any]], datetime]:
        schedule = find_schedule(connection, name)
        rows = connection.execute(
            select(Firing).where(
                Firing.schedule_id == schedule.id,
                Firing.scheduled_for_utc >= begin,
                (Firing.scheduled_for_utc <= end) | Firing.since_utc.is_not(None),
            )
        ).all()
        return schedule, rows, database_clock(connection)

    schedule, rows, now = database.retrying(look, reading=True)
    rule = parse_rule(schedule.cron, schedule.timezone)
    own = {row.scheduled_for_utc: row for row in rows}
    runs = [row for row in rows if row.since_utc is not None]
    found: list[Slot] = []
    for slot in rule.between(begin - timedelta(microseconds=1), min(end, now)):
        if len(found) == MAX_BACKFILL:
            raise UsageError(f"more than {MAX_BACKFILL:,} slots; give a shorter span")
        found.append(_judge(schedule, own.get(slot), runs, slot))
    return schedule, found


def _judge(
    schedule: ScheduleRow, own: Row[Any] | None, runs: Sequence[Row[Any]], slot: datetime
) -> Slot:
    if own is not None:
        fires = own.state in ("skipped", "failed")
        return Slot(slot, own.state, fires, f"was {own.state}" if fires else f"is {own.state}")
    if any(run.since_utc <= slot < run.scheduled_for_utc for run in runs):
        return Slot(slot, "skipped", True, "was skipped")
    if slot < schedule.created_at:
        return Slot(slot, None, True, "is from before the schedule")
    return Slot(slot, None, False, "has no record: it is still due, or its record was removed")


def backfill(
    database: Database, settings: Settings, schedule: ScheduleRow, slots: Sequence[Slot]
) -> Iterator[tuple[Slot, Fired | None]]:
    """Fires the slots that a backfill fires, oldest first; None where another was faster.

    Whatever `--concurrency` says: each was asked for, and their jobs wait for one another.
    """
    holder = Holder(database, settings)
    limits: Limits = {}
    rule = parse_rule(schedule.cron, schedule.timezone)
    try:
        for slot in slots:
            if not slot.fires:
                continue
            firing_id = database.retrying(
                lambda connection, slot=slot: _claim(  # type: ignore[misc]
                    connection, schedule, slot.slot, rule, holder
                ),
                patience=30.0,
            )
            if firing_id is None:
                yield slot, None
                continue
            yield slot, _fire(database, settings, holder, firing_id, limits)
    finally:
        holder.close()


def _claim(
    connection: Connection, schedule: ScheduleRow, slot: datetime, rule: Rule, holder: Holder
) -> int | None:
    if schedules.lock(connection, schedule.name) is None:
        raise no_schedule(connection, schedule.name)
    row = connection.execute(
        select(Firing).where(
            Firing.schedule_id == schedule.id, Firing.scheduled_for_utc == slot
        )
    ).one_or_none()  # fmt: skip
    if row is None:
        return firings.claim(
            connection,
            schedule.id,
            slot,
            holder.id,
            kind="backfill",
            lease_seconds=holder.lease_seconds,
        )
    again = firings.claim_again(connection, row.id, holder.id, lease_seconds=holder.lease_seconds)
    if again and row.since_utc is not None:
        # It stood for earlier slots too, which stay skipped.
        before = rule.previous(slot)
        if before is not None and before >= row.since_utc:
            since = row.since_utc if row.since_utc < before else None
            firings.skip(connection, schedule.id, before, row.reason, since=since)
    return int(row.id) if again else None
