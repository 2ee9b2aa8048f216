"""An input that is a query: each row becomes an object of columns.

The database is named by the environment variable that holds its URL, so that no secret is stored.
The query runs in a transaction that can only read, its rows are streamed to a temporary file of
JSONL, and the connection is given back before the first prompt is checked.
"""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

from sqlalchemy import (
    URL,
    Connection,
    DateTime,
    Engine,
    Integer,
    NullPool,
    String,
    bindparam,
    create_engine,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from nightherd.errors import InputError, UsageError
from producer.inputs.reader import CustomIds, Part, Reader, ReadOptions, Row, RowProblem
from producer.prompts.template import one_line

if TYPE_CHECKING:
    from producer.inputs.moment import Moment
    from producer.inputs.reader import Rows

PARAMETERS = ("scheduled_for", "previous", "firing")
"""What may stand in a query as `:name`."""
_FETCH = 1_000
_SPOOL_IN_MEMORY = 16 * 2**20
_CONNECT_SECONDS = 10
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_READING_KEYWORDS = ("select", "with", "values", "table")
_TOKEN = re.compile(
    r"""
    (?P<skip>
        --[^\n]*                                  # a comment, to the end of the line
      | /\*.*?\*/                                 # a comment
      | \b[eE]'(?:[^'\\]|\\.|'')*'                # a string with escapes
      | '(?:[^']|'')*'                            # a string
      | "(?:[^"]|"")*"                            # a name
      | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$           # a string of PostgreSQL's
      | ::
    )
  | (?<!\w):(?P<name>[A-Za-z_]\w*)
  | (?P<end>;)
    """,
    re.VERBOSE | re.DOTALL,
)


def check_query(query: str, database: str) -> None:
    """Raises `UsageError` for a query that is none, or for a name that is no variable's."""
    _parse_query(query)
    if not _NAME.fullmatch(database):
        # Nothing of it is shown: it may well be the URL itself.
        raise UsageError(
            "--input-database takes the name of an environment variable that holds the URL, as "
            "WAREHOUSE_URL; a URL itself would be stored with its password"
        )


def _parse_query(query: str) -> tuple[str, frozenset[str]]:
    """The query in SQLAlchemy's terms, and the parameters that it uses."""
    names: set[str] = set()
    pieces: list[str] = []
    bare: list[str] = []  # without strings and comments
    last = 0
    for found in _TOKEN.finditer(query):
        between = query[last : found.start()]
        last = found.end()
        pieces.append(between.replace(":", r"\:"))
        bare.append(between)
        name = found["name"]
        if name is None:
            bare.append(" " if found["end"] is None else ";")
            pieces.append(found[0].replace(":", r"\:"))
        elif name in PARAMETERS:
            names.add(name)
            pieces.append(f":{name}")
        else:
            there = ", ".join(f":{known}" for known in PARAMETERS)
            raise UsageError(
                f"--input-sql: no parameter :{one_line(name, 60)} (there are: {there})"
            )
    pieces.append(query[last:].replace(":", r"\:"))
    bare.append(query[last:])
    statement = "".join(bare).strip().rstrip("; \n\t")
    if ";" in statement:
        raise UsageError("--input-sql holds several statements; give one SELECT")
    first = re.match(r"\(*\s*(\w+)", statement)
    if first is None or first[1].lower() not in _READING_KEYWORDS:
        shown = one_line(query, 60) or "nothing"
        raise UsageError(f"--input-sql must be a SELECT, got {shown}")
    if "\0" in query:
        raise UsageError("--input-sql holds a NUL character")
    return "".join(pieces).strip().rstrip("; \n\t"), frozenset(names)


@contextmanager
def open_query(
    query: str, database: str, moment: Moment, options: ReadOptions
) -> Iterator[tuple[Rows, str]]:
    """As `producer.inputs.source.open_source`, for a query."""
    name = f"the query on {database}"
    url = _database_url(database)
    with tempfile.SpooledTemporaryFile(max_size=_SPOOL_IN_MEMORY, mode="w+b") as spool:
        problems = _run_query(url, name, query, moment, spool)
        spool.seek(0)
        yield _rows(spool, name, problems, replace(options, format="jsonl")), name


def _rows(
    spool: IO[bytes], name: str, problems: Mapping[int, str], options: ReadOptions
) -> Iterator[Row | RowProblem]:
    ids = CustomIds()
    try:
        for row in Reader(spool, name, options, part=Part("row", ids)):  # type: ignore[arg-type]
            problem = problems.get(row.line)
            yield row if problem is None else RowProblem(row.line, problem, "row")
    finally:
        ids.close()


def _database_url(name: str) -> URL:
    """The URL that the variable holds; nothing of it is ever shown."""
    given = os.environ.get(name)
    if not given:
        raise InputError(
            f"{name} is not set here: it must hold the URL of the database that --input-sql asks"
        )
    if given.startswith(("postgres://", "postgresql://")):
        given = "postgresql+psycopg://" + given.partition("://")[2]
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise InputError(
            f"{name} holds no URL; one looks like postgresql://user:password@host/db or "
            "sqlite:////path/to/file.db"
        ) from None
    if url.get_backend_name() not in ("postgresql", "sqlite"):
        raise InputError(
            f"{name}: {url.get_backend_name()!r} is not supported; use postgresql:// or sqlite://"
        )
    return url


def _engine(url: URL) -> Engine:
    """An engine whose connections can only read."""
    if url.get_backend_name() == "sqlite":
        address = f"file:{quote(url.database or '')}?mode=ro"
        return create_engine(
            "sqlite://",
            creator=lambda: sqlite3.connect(address, uri=True, timeout=30),
            poolclass=NullPool,
        )
    return create_engine(
        url,
        poolclass=NullPool,
        connect_args={"connect_timeout": _CONNECT_SECONDS, "application_name": "nightherd input"},
        execution_options={"postgresql_readonly": True},
    )


def _run_query(url: URL, name: str, query: str, moment: Moment, spool: IO[bytes]) -> dict[int, str]:
    """Writes the rows as lines of JSON; returns what is wrong with some of them, by number."""
    sqlite = url.get_backend_name() == "sqlite"
    statement, names = _parse_query(query)
    values = _parameters(moment, sqlite=sqlite)
    try:
        engine = _engine(url)
    except (SQLAlchemyError, ImportError) as error:
        raise InputError(one_line(f"{name}: {error}")) from None
    try:
        with engine.connect() as connection:
            bound = text(statement).bindparams(*(values[parameter] for parameter in names))
            return _write_rows(connection, bound, name, spool)
    except DBAPIError as error:
        raise InputError(one_line(f"{name} failed: {_reason(error, url)}")) from None
    except SQLAlchemyError as error:
        raise InputError(one_line(f"{name} failed: {error}")) from None
    finally:
        engine.dispose()


def _parameters(moment: Moment, *, sqlite: bool) -> dict[str, Any]:
    """By name. SQLite knows no times: they are text in UTC, as its own functions write them."""

    def time_parameter(name: str, value: datetime | None) -> Any:
        if not sqlite:
            return bindparam(name, value, DateTime(timezone=True))
        utc = None if value is None else value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
        return bindparam(name, utc, String())

    return {
        "scheduled_for": time_parameter("scheduled_for", moment.scheduled_for),
        "previous": time_parameter("previous", moment.previous),
        "firing": bindparam("firing", moment.firing, Integer()),
    }


def _reason(error: DBAPIError, url: URL) -> str:
    """The first line of what the database says, and never its password."""
    said = str(error.orig or error).strip().splitlines()
    reason = said[0] if said else type(error.orig).__name__
    password = url.password
    return reason.replace(str(password), "***") if password else reason


def _write_rows(
    connection: Connection, statement: Any, name: str, spool: IO[bytes]
) -> dict[int, str]:
    problems: dict[int, str] = {}
    streamed = {"stream_results": True, "yield_per": _FETCH}
    with closing(connection.execute(statement, execution_options=streamed)) as result:
        columns = list(result.keys())
        duplicates = {column for column in columns if columns.count(column) > 1}
        if duplicates:
            raise InputError(
                one_line(
                    f"{name}: two columns are called {min(duplicates)}; rename one: … AS other"
                )
            )
        number = 0
        for number, row in enumerate(result, 1):
            values: dict[str, Any] = {}
            for column, value in zip(columns, row, strict=True):
                try:
                    values[column] = as_json(value)
                except ValueError as error:
                    problems.setdefault(number, one_line(f"column {column!r} {error}"))
            spool.write(json.dumps(values, ensure_ascii=False).encode(errors="replace"))
            spool.write(b"\n")
    if number == 0:
        raise InputError(f"{name} gave no rows")
    return problems


def as_json(value: Any) -> Any:
    """A column's value as JSON has it; raises `ValueError` saying what it holds instead.

    Times are ISO 8601, exact numbers are numbers where nothing is lost, else text.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise ValueError(f"holds {value}, which JSON does not know")
    if isinstance(value, Decimal):
        return _number(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, bytes | bytearray | memoryview):
        raise ValueError("holds bytes; encode(…, 'base64') or hex(…) makes text of them")
    if isinstance(value, uuid.UUID) or type(value).__module__ == "ipaddress":
        return str(value)
    raise ValueError(f"holds a {type(value).__name__}; CAST(… AS text) makes text of it")


def _number(value: Decimal) -> int | float | str:
    if not value.is_finite():
        raise ValueError(f"holds {value}, which JSON does not know")
    if value == value.to_integral_value() and value.as_tuple().exponent >= 0:  # type: ignore[operator]
        return int(value)
    near = float(value)
    return near if Decimal(repr(near)) == value else str(value)
