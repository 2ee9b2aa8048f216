"""What commands share: opening the database, output, the options of times and jobs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from models.database import Database
    from nightherd.settings import Settings

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def load() -> tuple[Settings, Database]:
    """The settings and the open database."""
    from nightherd.settings import load_settings
    from producer.fleet.open_database import open_database

    settings = load_settings()
    return settings, open_database(settings)


def read(database: Database, work: Callable[[Connection], T]) -> T:
    """Runs a reading function in a transaction; a database that refuses is one line."""
    return database.retrying(work, reading=True, patience=5.0)


def write(database: Database, work: Callable[[Connection], T]) -> T:
    """Runs a writing function in a transaction, patient with a busy database."""
    return database.retrying(work, patience=30.0)


def resolve(database: Database, prefix: str) -> str:
    """A job's whole id from any unique beginning of it."""
    from producer.jobs.status import find_job

    return str(read(database, lambda connection: find_job(connection, prefix)))


def notice(message: str, *, always: bool = False) -> None:
    """Says something beside the answer: on standard error, and only to a terminal.

    `always` is for what a log must show too: a broker that is down, a job that nobody can serve.
    """
    if always or sys.stderr.isatty():
        click.echo(message, err=True)


def print_json(value: object) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Columns as wide as they need be, plain text; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    lines = []
    for row in [list(header), *cells]:
        padded = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def duration(seconds: float | None) -> str:
    """`3 s`, `4 min`, `2 h 10 min`; `-` for None."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 72:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_LONGEST_DELAY = 3_660 * 86_400.0


class TimeOrDelay(click.ParamType[Any]):
    """A time (`2026-12-24T18:00`, local unless it says a zone) or a delay (`90m`, `8h`, `2d`)."""

    name = "time"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "TIME|DELAY"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        if isinstance(value, datetime):
            return value
        text = str(value).strip()
        number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
        unit = text[len(number) :]
        if unit in _UNITS:
            try:
                return datetime.now(UTC) + timedelta(seconds=float(number) * _UNITS[unit])
            except (ValueError, OverflowError):
                pass
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            self.fail(f"{value!r} is no time; write 2026-12-24T18:00, or a delay as 90m, 8h, 2d")
        return time.astimezone(UTC)


class Delay(click.ParamType[float]):
    """A span of time (`90m`, `8h`, `2d`), in seconds."""

    name = "delay"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "DELAY"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
        try:
            seconds = float(number) * _UNITS[text[len(number) :]]
        except (KeyError, ValueError):
            seconds = -1.0
        if not 0 < seconds <= _LONGEST_DELAY:
            self.fail(f"{value!r} is no span of time; write 45s, 90m, 8h or 2d")
        return seconds


class Seed(click.ParamType[int]):
    """A whole number of 64 bits."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            seed = int(value)
        except ValueError:
            seed = 2**63
        if not -(2**63) <= seed < 2**63:
            self.fail(f"{value!r} is no whole number of 64 bits")
        return seed


class OrNone(click.ParamType[Any]):
    """Another type, or the word `none` (as the empty string)."""

    def __init__(self, inner: click.ParamType[Any]) -> None:
        self.inner = inner
        self.name = f"{inner.name} or none"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "TIME|DELAY|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return "" if str(value).lower() == "none" else self.inner.convert(value, param, ctx)
