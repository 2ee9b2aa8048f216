"""Schedules and firings as `list`, `show` and `history` show them, in a few statements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, func, select

from models.base import db_now
from models.schedule import Firing, Schedule
from models.store import firings


@dataclass(frozen=True, slots=True)
class FiringView:
    """A firing; times are UTC."""

    id: int
    schedule: str
    scheduled_for: datetime
    since: datetime | None
    kind: str
    state: str
    job: str | None
    reason: str | None
    output: str | None
    attempts: int
    created_at: datetime
    finished_at: datetime | None

    def as_json(self) -> dict[str, Any]:
        return {
            "firing": self.id,
            "schedule": self.schedule,
            "scheduled_for": self.scheduled_for.isoformat(),
            "since": _iso(self.since),
            "kind": self.kind,
            "state": self.state,
            "job": self.job,
            "reason": self.reason,
            "output": self.output,
            "attempts": self.attempts,
            "created_at": self.created_at.isoformat(),
            "finished_at": _iso(self.finished_at),
        }


@dataclass(frozen=True, slots=True)
class ScheduleView:
    """A schedule and how its last firing went."""

    row: Any
    last: FiringView | None
    database_now: datetime

    def as_json(self) -> dict[str, Any]:
        row = self.row
        return {
            "name": row.name,
            "cron": row.cron,
            "timezone": row.timezone,
            "input": row.input,
            "options": row.options,
            "concurrency": row.concurrency,
            "misfire": row.misfire,
            "starting_deadline_seconds": row.starting_deadline_seconds,
            "keep_succeeded": row.keep_succeeded,
            "keep_failed": row.keep_failed,
            "paused": row.paused,
            "next_at": None if row.paused else _iso(row.next_at),
            "created_at": row.created_at.isoformat(),
            "last": None if self.last is None else self.last.as_json(),
        }


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _firings() -> Select[Any]:
    job = firings.newest_job().correlate(Firing).scalar_subquery().label("job")
    return select(Firing, Schedule.name, job).join(Schedule, Schedule.id == Firing.schedule_id)


def _view(row: Any) -> FiringView:
    return FiringView(
        id=row.id,
        schedule=row.name,
        scheduled_for=row.scheduled_for_utc,
        since=row.since_utc,
        kind=row.kind,
        state=row.state,
        job=row.job,
        reason=row.reason,
        output=row.output,
        attempts=row.attempts,
        created_at=row.created_at,
        finished_at=row.finished_at,
    )


def schedule_views(connection: Connection, name: str | None = None) -> list[ScheduleView]:
    """All schedules by name, or one: three statements."""
    wanted = select(Schedule).order_by(Schedule.name)
    if name is not None:
        wanted = wanted.where(Schedule.name == name)
    rows = connection.execute(wanted).all()
    now = connection.execute(select(db_now())).scalar_one()
    last = _last_firings(connection, None if name is None else [row.id for row in rows])
    return [ScheduleView(row, last.get(row.id), now) for row in rows]


def _last_firings(connection: Connection, ids: list[int] | None) -> Mapping[int, FiringView]:
    """The firing of the latest scheduled time of each schedule."""
    latest = select(
        Firing.schedule_id, func.max(Firing.scheduled_for_utc).label("latest")
    ).group_by(Firing.schedule_id)  # fmt: skip
    if ids is not None:
        latest = latest.where(Firing.schedule_id.in_(ids))
    of = latest.subquery()
    rows = connection.execute(
        _firings().join(
            of,
            (of.c.schedule_id == Firing.schedule_id) & (of.c.latest == Firing.scheduled_for_utc),
        )
    )
    return {row.schedule_id: _view(row) for row in rows}


def history(
    connection: Connection, schedule_id: int, *, limit: int, state: str | None = None
) -> list[FiringView]:
    """Firings of a schedule, the latest scheduled time first."""
    wanted = (
        _firings()
        .where(Firing.schedule_id == schedule_id)
        .order_by(Firing.scheduled_for_utc.desc(), Firing.id.desc())
        .limit(limit)
    )
    if state is not None:
        wanted = wanted.where(Firing.state == state)
    return [_view(row) for row in connection.execute(wanted)]


def firing_view(connection: Connection, firing_id: int) -> FiringView | None:
    row = connection.execute(_firings().where(Firing.id == firing_id)).one_or_none()
    return None if row is None else _view(row)
