"""What all commands of schedules show alike."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from producer.commands.common import read

if TYPE_CHECKING:
    from models.database import Database
    from producer.schedules.views import ScheduleView


def view_of(database: Database, name: str) -> ScheduleView:
    """The schedule of that name; `NotFoundError` with one that is close."""
    from producer.schedules.manual import find_schedule
    from producer.schedules.views import schedule_views

    read(database, lambda c: find_schedule(c, name))
    return read(database, lambda c: schedule_views(c, name))[0]


def in_zone(time: datetime, timezone: str) -> str:
    """`Tue 2026-11-24 02:00 CET`."""
    from producer.schedules.cron import parse_zone

    return f"{time.astimezone(parse_zone(timezone)):%a %Y-%m-%d %H:%M %Z}"
