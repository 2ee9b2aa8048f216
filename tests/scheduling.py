"""Schedules made straight in the database, a clock that tests set, and what became of firings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, select, update

from models.base import db_now
from models.database import Database
from models.job import Job
from models.schedule import Firing, Schedule
from models.store import firings, schedules
from nightherd.settings import Settings
from producer.schedules.cron import parse_rule, show_utc
from producer.schedules.firing_loop import FiringLoop

OPTIONS: dict[str, Any] = {
    "checkpoint": "demo",
    "priority": 0,
    "seed": None,
    "not_before_seconds": None,
    "deadline_seconds": None,
    "submitted_by": None,
    "output": None,
    "on_complete": None,
    "on_failure": None,
    "input_format": "auto",
    "template": None,
    "system": None,
    "chat": False,
    "task": None,
    "task_args": [],
    "labels": None,
    "schema": None,
    "keep": [],
    "ignore_unknown": False,
    "max_tokens": 4,
    "min_tokens": None,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": None,
    "presence_penalty": None,
    "frequency_penalty": None,
    "n": None,
    "logprobs": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "params": [],
}
"""What `schedule add` stores where nothing was given."""


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


BEGIN = utc("2026-01-05T00:00")


class Clock:
    """The time that a firing loop goes by."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self, connection: Connection) -> datetime:
        return self.now

    def on(self, **span: float) -> datetime:
        self.now += timedelta(**span)
        return self.now


def write_input(path: Path, rows: int = 2) -> Path:
    lines = [json.dumps({"prompt": f"row {number}"}) for number in range(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_schedule(
    database: Database,
    path: Path | str,
    *,
    name: str = "nightly",
    cron: str = "0 2 * * *",
    timezone: str = "UTC",
    since: datetime = BEGIN,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> int:
    """A schedule whose first scheduled time is the first one after `since`; its id."""
    values: dict[str, Any] = {
        "concurrency": "allow",
        "misfire": "coalesce",
        "starting_deadline_seconds": None,
        "keep_succeeded": None,
        "keep_failed": None,
        "paused": False,
        **changes,
    }
    new = schedules.NewSchedule(
        name=name,
        cron=cron,
        timezone=timezone,
        input={"path": str(path)},
        options={**OPTIONS, **(options or {})},
        next_at=parse_rule(cron, timezone).next(since),
        **values,
    )
    with database.write() as connection:
        schedules.add(connection, new)
        found = schedules.find(connection, name)
    assert found is not None
    return int(found.id)


@contextmanager
def firing_loop(
    database: Database, settings: Settings, clock: Callable[[Connection], datetime]
) -> Iterator[FiringLoop]:
    made = FiringLoop(database, settings, clock=clock)
    made._look_for_ends_at = -1e9
    try:
        yield made
    finally:
        made.close()


def all_firings(database: Database) -> list[Row[Any]]:
    """In the order of their scheduled times, with their `job`."""
    job = firings.newest_job().correlate(Firing).scalar_subquery().label("job")
    with database.read() as connection:
        query = select(Firing, job).order_by(Firing.scheduled_for_utc, Firing.id)
        return list(connection.execute(query))


def told(database: Database) -> list[str]:
    """Each firing in a few words: its scheduled time and its state."""
    return [f"{show_utc(row.scheduled_for_utc)} {row.state}" for row in all_firings(database)]


def schedule_row(database: Database, name: str = "nightly") -> Any:
    with database.read() as connection:
        return schedules.find(connection, name)


def jobs_by_state(database: Database) -> dict[str, int]:
    with database.read() as connection:
        rows = connection.execute(select(Job.state, func.count()).group_by(Job.state))
        return {state: int(count) for state, count in rows}


def lapse_claims(database: Database) -> None:
    """The holders of all firings are gone."""
    with database.write() as connection:
        connection.execute(
            update(Firing).where(Firing.lease_until.is_not(None)).values(lease_until=db_now(-1))
        )


def count_schedules(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(Schedule)).scalar_one())
