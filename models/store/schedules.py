"""A schedule's own row: add, change, pause, resume, remove, move on to its next scheduled time.

`next_at` is the first scheduled time that no beat has looked at. It only moves forward, so a clock
that goes back fires nothing twice; the unique scheduled time of a firing is the second guard.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Integer, Row, bindparam, delete, insert, select, tuple_, update

from models.base import UTCDateTime, one_of
from models.job import OPEN_JOB_STATES, Job
from models.schedule import Firing, Schedule
from nightherd.errors import ConflictError

ScheduleRow = Row[*tuple[Any, ...]]
"""A row of `schedules`, its columns by name."""


@dataclass(frozen=True, slots=True)
class NewSchedule:
    """All of a schedule that a user gives; `options` and `input` are plain JSON."""

    name: str
    cron: str
    timezone: str
    input: dict[str, Any]
    options: dict[str, Any]
    concurrency: str
    misfire: str
    starting_deadline_seconds: float | None
    keep_succeeded: int | None
    keep_failed: int | None
    paused: bool
    next_at: datetime | None


def add(connection: Connection, new: NewSchedule, *, repeated: bool = False) -> None:
    """Adds a schedule; `ConflictError` if the name is taken.

    `repeated`: this is another try of a transaction whose answer may have been lost.
    """
    there = find(connection, new.name)
    if there is None:
        connection.execute(insert(Schedule).values(**asdict(new)))
    elif not (repeated and there.cron == new.cron and there.options == new.options):
        raise ConflictError(
            f"there is a schedule {new.name} already; `nightherd schedule edit` changes it"
        )


def set_next(
    connection: Connection, schedule_id: int, values: dict[str, Any], next_at: datetime | None
) -> None:
    """Sets columns and the next scheduled time of a locked schedule whose rule has changed."""
    connection.execute(
        update(Schedule).where(Schedule.id == schedule_id).values(**values, next_at=next_at)
    )


def find(connection: Connection, name: str) -> ScheduleRow | None:
    return connection.execute(select(Schedule).where(Schedule.name == name)).one_or_none()


def lock(connection: Connection, name: str) -> ScheduleRow | None:
    """The row, locked against beats and other commands."""
    return connection.execute(
        select(Schedule).where(Schedule.name == name).with_for_update(key_share=True)
    ).one_or_none()


def change(connection: Connection, schedule_id: int, values: dict[str, Any]) -> None:
    """Sets columns of a locked schedule."""
    connection.execute(update(Schedule).where(Schedule.id == schedule_id).values(**values))


def pause(connection: Connection, schedule_id: int) -> bool:
    """From now on no scheduled time is looked at; False if it was paused already."""
    hit = connection.execute(
        update(Schedule)
        .where(Schedule.id == schedule_id, Schedule.paused.is_(False))
        .values(paused=True)
    )
    return hit.rowcount == 1


def resume(connection: Connection, schedule_id: int, next_at: datetime | None) -> bool:
    """Goes on at `next_at`; False if it was not paused."""
    hit = connection.execute(
        update(Schedule)
        .where(Schedule.id == schedule_id, Schedule.paused.is_(True))
        .values(paused=False, next_at=next_at)
    )
    return hit.rowcount == 1


def remove(connection: Connection, schedule_id: int) -> list[str]:
    """Deletes a schedule with the record of its firings; returns its open jobs, which go on."""
    going_on = connection.execute(
        select(Job.id)
        .join(Firing, Firing.id == Job.firing_id)
        .where(
            Firing.schedule_id == schedule_id,
            one_of(Firing.state, "claimed", "submitted"),
            one_of(Job.state, *OPEN_JOB_STATES),
        )
        .order_by(Job.id)
    ).scalars()
    found = list(going_on)
    connection.execute(delete(Schedule).where(Schedule.id == schedule_id))
    return found


def is_any_due(connection: Connection, now: datetime) -> bool:
    return connection.execute(
        select(Schedule.id).where(Schedule.next_at <= now, Schedule.paused.is_(False)).limit(1)
    ).first() is not None  # fmt: skip


# Built once: where ten thousand are due, building statements is most of the work.
_DUE = (
    select(Schedule)
    .where(Schedule.next_at <= bindparam("now"), Schedule.paused.is_(False))
    .order_by(Schedule.next_at, Schedule.id)
    .limit(1)
    .with_for_update(key_share=True, skip_locked=True)
)
_NEXT_DUE = _DUE.where(
    tuple_(Schedule.next_at, Schedule.id)
    > tuple_(bindparam("after", type_=UTCDateTime()), bindparam("last", type_=Integer())),
)


def lock_due(
    connection: Connection, now: datetime, after: tuple[datetime, int] | None = None
) -> ScheduleRow | None:
    """The schedule that is due for longest, locked; those that another beat has are passed over.

    `after`: the (next_at, id) of the last one that was looked at in this round.
    """
    if after is None:
        return connection.execute(_DUE, {"now": now}).one_or_none()
    cursor = {"now": now, "after": after[0], "last": after[1]}
    return connection.execute(_NEXT_DUE, cursor).one_or_none()


def advance(
    connection: Connection, schedule_id: int, *, seen: datetime, to: datetime | None
) -> bool:
    """Moves on from the scheduled time `seen`; False if another did."""
    hit = connection.execute(
        update(Schedule)
        .where(Schedule.id == schedule_id, Schedule.next_at == seen, Schedule.paused.is_(False))
        .values(next_at=to)
    )
    return hit.rowcount == 1
