"""One way to the database: SQLite or PostgreSQL, reading and writing transactions, retries."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, create_engine, event, make_url, select
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import DatabaseError as SQLDatabaseError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from models.base import db_now
from nightherd.errors import DatabaseError, SettingsError

T = TypeVar("T")

_READING = "nightherd_reading"

# PostgreSQL: serialisation failure, deadlock, lock not available, shutdown, crash, starting up,
# idle in a transaction for too long (this process stood still), read-only (a stand-by), I/O error;
# all connection failures (08) and all lack of disk, memory or connections (53).
_TRANSIENT_SQLSTATES = {
    *("40001", "40P01", "55P03", "57P01", "57P02", "57P03"),
    *("25P03", "25006", "58030"),
}
_TRANSIENT_CLASSES = ("08", "53")
_BUSY_SECONDS = 30  # how long SQLite waits for another process's lock
_CLIENT_CONNECT_SECONDS = 5

# A process that is suspended, or a machine that is lost, in the middle of a transaction must not
# hold its row locks for as long as a lease. Without statistics of a table, fresh as it is, a bitmap
# scan and a sort of a whole job would look cheaper than a page of it in the order of its index; and
# no statement here runs for so long that it should be compiled.
_POSTGRESQL_SESSION = """
    SET idle_in_transaction_session_timeout = '10s';
    SET tcp_keepalives_idle = 10;
    SET tcp_keepalives_interval = 5;
    SET tcp_keepalives_count = 3;
    SET enable_bitmapscan = off;
    SET jit = off
"""


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
        return sqlstate in _TRANSIENT_SQLSTATES or sqlstate.startswith(_TRANSIENT_CLASSES)
    if isinstance(original, sqlite3.OperationalError):
        # Full and read-only disks count too: a worker with unsaved results had better wait for a
        # human than drop them. `patience` bounds the others.
        text = str(original)
        return any(
            word in text
            for word in ("locked", "busy", "full", "disk I/O", "unable to open", "readonly")
        )
    # psycopg reports a server that refuses connections without a state.
    return isinstance(error, OperationalError)


_SQLITE_REMEDIES = (
    ("readonly", "make the file and its folder writable, or set NIGHTHERD_HOME to another folder"),
    ("unable to open", "make its folder writable, or set NIGHTHERD_HOME to another folder"),
    ("full", "free its disk"),
    ("locked", "another process holds it for long; try again"),
    ("not a database", "the file is damaged: put a backup in its place, or set NIGHTHERD_HOME"),
    ("malformed", "the file is damaged: put a backup in its place, or set NIGHTHERD_HOME"),
)


def explain(error: DBAPIError | PoolTimeout, url: URL) -> DatabaseError:
    """One line for the user of a database that refuses, with a remedy where one is known."""
    original = getattr(error, "orig", None) or error
    # The first line is the reason; hints and the place in the statement follow.
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    reason = lines[0] if lines else type(original).__name__
    for prefix in ("connection failed: ", "connection is bad: "):
        reason = reason.removeprefix(prefix)
    shown_url = url.render_as_string(hide_password=True)
    if url.get_backend_name() != "sqlite":
        # A SQLSTATE comes from a server that runs and let us in: a deadlock, a full disk.
        answered = getattr(original, "sqlstate", None) is not None
        hint = "" if answered else " (is it running, is NIGHTHERD_DATABASE_URL right?)"
    else:
        hint = next((f"; {remedy}" for sign, remedy in _SQLITE_REMEDIES if sign in reason), "")
    return DatabaseError(f"the database {shown_url} refuses: {reason}{hint}")


@contextmanager
def driver_errors(connection: Connection, statement: str) -> Iterator[None]:
    """Raises the driver's errors as SQLAlchemy's own, for statements that it gets directly."""
    dialect = connection.dialect
    base: type[Exception] = dialect.loaded_dbapi.Error
    try:
        yield
    except base as error:
        raise DBAPIError.instance(
            statement,
            None,
            error,
            base,
            connection_invalidated=dialect.is_disconnect(error, None, None),  # type: ignore[arg-type]
            dialect=dialect,
        ) from error


class Database:
    """A pool of at most `pool_size` connections, and the two kinds of transaction.

    On SQLite each writing transaction is `BEGIN IMMEDIATE`: a deferred one that reads and then
    writes fails at once, whatever the time-out, when another wrote in between.
    """

    def __init__(self, url: str, *, pool_size: int = 3, patience: float = 10.0) -> None:
        """`patience`: for how many seconds `retrying` tries, where its caller does not say."""
        self._patience = patience
        try:
            self.url = make_url(url)
        except (ArgumentError, ValueError):
            # Nothing of it is shown: any part of an unreadable one may be a password.
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
            if self.url.database in (None, "", ":memory:"):
                raise SettingsError(
                    "NIGHTHERD_DATABASE_URL: a database in memory ends with its process; "
                    "use sqlite:////path/to/file.db"
                )
            arguments = {"timeout": _BUSY_SECONDS, "check_same_thread": False}
        else:
            arguments = {
                "connect_timeout": _CLIENT_CONNECT_SECONDS,
                "application_name": "nightherd",
                "keepalives_idle": 30,
                "keepalives_interval": 10,
                "keepalives_count": 3,
                "tcp_user_timeout": 30_000,
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
            event.listen(self.engine, "do_connect", _make_private_file)
            event.listen(self.engine, "connect", _prepare_sqlite_connection)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            event.listen(self.engine, "connect", _prepare_postgresql_connection)

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
        patience: float | None = None,
        stop: threading.Event | None = None,
        on_wait: Callable[[DatabaseError], None] | None = None,
    ) -> T:
        """Runs `work` in one transaction, again after transient errors for `patience` seconds.

        `work` must be repeatable, also when the first commit took place and only its answer was
        lost. Raises `DatabaseError` when patience or `stop` ends the attempts.
        """
        deadline = time.monotonic() + (self._patience if patience is None else patience)
        pause = 0.05
        while True:
            try:
                with self._begin(reading=reading) as connection:
                    return work(connection)
            except (DBAPIError, PoolTimeout) as error:
                if not is_transient(error):
                    if _is_database_fault(error):
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


def _is_database_fault(error: DBAPIError | PoolTimeout) -> bool:
    """Whether the database is at fault, as a damaged file is, and not a value or a statement."""
    return isinstance(error, OperationalError | InternalError) or type(error) is SQLDatabaseError


def _prepare_postgresql_connection(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(_POSTGRESQL_SESSION)
    connection.commit()


def _make_private_file(_dialect: object, _record: object, arguments: list[Any], _: object) -> None:
    """Makes a database file that is not there yet with mode 600: prompts are private.

    SQLite gives its other files the mode of this one. A file that is there is not opened: closing
    it again would drop the locks that SQLite holds on it in this process.
    """
    name = str(arguments[0]) if arguments else ""
    if name and not name.startswith((":memory:", "file:")):
        with contextlib.suppress(OSError):  # SQLite has a better word for what is wrong
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _prepare_sqlite_connection(connection: sqlite3.Connection, _record: object) -> None:
    # The driver must not begin transactions by its own rules: `_begin_sqlite` does.
    connection.isolation_level = None
    _switch_to_wal(connection)
    for pragma in (
        "synchronous = FULL",
        f"busy_timeout = {_BUSY_SECONDS * 1000}",
        "foreign_keys = ON",
        "temp_store = MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Makes a new file a WAL database; on one that is, this reads a page.

    Where two processes open a new file at once, SQLite does not let the switch wait for the other
    (its busy handler is not called for it): it fails at once, so the wait is here.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").close()
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get(_READING, False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
