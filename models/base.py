"""What all tables share: the declarative base, UTC times, the database's clock, short ids."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    DateTime,
    Dialect,
    Float,
    MetaData,
    literal,
    literal_column,
    types,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UTCDateTime(types.TypeDecorator[datetime]):
    """An aware UTC time: `timestamptz` on PostgreSQL, ISO text with six decimals on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a zone must not reach the database: {value!r}")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """The declarative base; constraint names follow one convention on every database."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    type_annotation_map = {datetime: UTCDateTime()}  # noqa: RUF012 - SQLAlchemy reads it so


def one_of(column: InstrumentedAttribute[str], *values: str) -> ColumnElement[bool]:
    """`column = …` or `column IN (…)`, with the values spelt out in the statement.

    With bound values a prepared statement's plan, made for any values, could not use the partial
    indexes on states; and SQLite uses one only where the WHERE repeats its condition word by word.
    Not for values from outside: they would not be escaped.
    """
    spelt: list[ColumnElement[str]] = [literal_column(f"'{value}'") for value in values]
    return column == spelt[0] if len(spelt) == 1 else column.in_(spelt)


class db_now(FunctionElement[datetime]):
    """The database's own clock, plus `seconds`: the only clock by which leases and deadlines count.

    Workers' clocks may be minutes apart: no time of theirs is ever compared with it.
    """

    inherit_cache = True
    type = UTCDateTime()

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(literal(float(seconds), Float()))


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    # %f has milliseconds; three more digits make it the six that SQLAlchemy parses.
    offset = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {offset} || ' seconds')"


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    # Not now(): that is when the transaction began, and one may wait long for a lock.
    offset = compiler.process(element.clauses, **kw)
    return f"(clock_timestamp() + make_interval(secs => {offset}))"


_ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's: no i, l, o, u to misread
_ID_EPOCH = datetime(2025, 1, 1, tzinfo=UTC).timestamp()


def new_id() -> str:
    """A ten-character id that sorts by time: 40 bits of milliseconds, 10 random bits."""
    number = (int((time.time() - _ID_EPOCH) * 1000) << 10) | secrets.randbits(10)
    digits = [_ID_ALPHABET[number >> shift & 31] for shift in range(45, -1, -5)]
    return "".join(digits)
