"""One way to the database: SQLite or PostgreSQL, reading and writing transactions, retries."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, create_engine, event, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from models.base import db_now
from nightherd.errors import DatabaseError, SettingsError

T = TypeVar("T")

_READING = "nightherd_reading"

# PostgreSQL: serialisation failure, deadlock, lock not available, too many connections,
# shutdown, crash, starting up. Connection failures (class 08) are seen by `is_disconnect`.
_TRANSIENT_SQLSTATES = {"40001", "40P01", "55P03", "53300", "57P01", "57P02", "57P03"}
_CLIENT_CONNECT_SECONDS = 5


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may well succeed later: locks, deadlocks, lost connections."""
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    original = error.orig
    sqlstate = getattr(original, "sqlstate", None)
    if sqlstate is not None:
        return sqlstate in _TRANSIENT_SQLSTATES or sqlstate.startswith("08")
    if isinstance(original, sqlite3.OperationalError):
        # Full disks and read-only folders count too: for a worker with finished results in hand,
        # waiting for a human is better than dropping them. `patience` bounds the others.
        text = str(original)
        return any(
            word in text for word in ("locked", "busy", "full", "disk I/O", "unable to open")
        )
    # psycopg reports a server that refuses connections without a state.
    return isinstance(error, OperationalError)


def explain(error: DBAPIError | PoolTimeout, url: URL) -> DatabaseError:
    """The user's one line for a database that refuses."""
    original = getattr(error, "orig", None) or error
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    reason = lines[-1] if lines else type(original).__name__
    place = url.render_as_string(hide_password=True)
    return DatabaseError(
        f"the database {place} refuses: {reason} (is it running, is NIGHTHERD_DATABASE_URL right?)"
    )


class Database:
    """A pool of at most `pool_size` connections, and the two kinds of transaction.

    On SQLite each writing transaction is `BEGIN IMMEDIATE`: a deferred one that reads and then
    writes fails at once, whatever the time-out, when another wrote in between.
    """

    def __init__(self, url: str, *, pool_size: int = 3) -> None:
        try:
            self.url = make_url(url)
        except ArgumentError:
            raise SettingsError(
                "NIGHTHERD_DATABASE_URL is no URL; it looks like postgresql://user:password@host/db"
            ) from None
        self.dialect = self.url.get_backend_name()
        if self.dialect not in ("sqlite", "postgresql"):
            raise SettingsError(
                f"NIGHTHERD_DATABASE_URL: {self.dialect!r} is not supported; "
                "use postgresql:// or sqlite://"
            )
        arguments: dict[str, Any]
        if self.dialect == "sqlite":
            arguments = {"timeout": 30, "check_same_thread": False}
        else:
            arguments = {
                "connect_timeout": _CLIENT_CONNECT_SECONDS,
                "application_name": "nightherd",
                "keepalives_idle": 30,
                "keepalives_interval": 10,
                "keepalives_count": 3,
            }
        try:
            self.engine = create_engine(
                self.url,
                pool_size=pool_size,
                max_overflow=0,
                pool_timeout=30,
                pool_pre_ping=self.dialect == "postgresql",
                connect_args=arguments,
            )
        except (NoSuchModuleError, ImportError) as error:
            raise SettingsError(f"NIGHTHERD_DATABASE_URL: {error}") from None
        if self.dialect == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite_connection)
            event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self._begin(reading=True) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes; commits at the end, rolls back on any exception."""
        with self._begin(reading=False) as connection:
            yield connection

    @contextmanager
    def _begin(self, *, reading: bool) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            connection = connection.execution_options(**{_READING: reading})
            with connection.begin():
                yield connection

    def retrying(
        self,
        work: Callable[[Connection], T],
        *,
        reading: bool = False,
        patience: float = 10.0,
        stop: threading.Event | None = None,
        on_wait: Callable[[DatabaseError], None] | None = None,
    ) -> T:
        """Runs `work` in one transaction, again after transient errors for `patience` seconds.

        `work` must bear being run twice, also when the first commit took place and only its
        answer was lost. Raises `DatabaseError` when patience or `stop` ends the attempts.
        """
        deadline = time.monotonic() + patience
        pause = 0.05
        while True:
            try:
                with self._begin(reading=reading) as connection:
                    return work(connection)
            except (DBAPIError, PoolTimeout) as error:
                if not is_transient(error):
                    if isinstance(error, OperationalError):
                        raise explain(error, self.url) from error
                    raise
                failure = explain(error, self.url)
                over = time.monotonic() + pause > deadline
                if over or (stop is not None and stop.is_set()):
                    raise failure from error
            if on_wait is not None:
                on_wait(failure)
            if stop is not None:
                stop.wait(pause)
            else:
                time.sleep(pause)
            pause = min(pause * 2, 2.0)

    def now(self) -> datetime:
        """The database's clock."""
        with self.read() as connection:
            return connection.execute(select(db_now())).scalar_one()

    def close(self) -> None:
        self.engine.dispose()


def _prepare_sqlite_connection(connection: sqlite3.Connection, _record: object) -> None:
    # The driver must not begin transactions by its own rules: `_begin_sqlite` does.
    connection.isolation_level = None
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "busy_timeout = 30000",
        "foreign_keys = ON",
        "temp_store = MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get(_READING, False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
