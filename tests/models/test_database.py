"""The way to the database: transactions, what is tried again, and what the user is told."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, event, func, insert, select, text
from sqlalchemy.exc import DatabaseError as SQLDatabaseError
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from models.base import db_now, new_id
from models.database import Database, is_transient
from models.job import Job
from models.store import jobs, storing
from models.worker import Sweep
from nightherd.errors import DatabaseError
from tests.seeding import job, make_job, statements


def add_sweep(connection: Connection, name: str) -> None:
    connection.execute(insert(Sweep).values(name=name, last_at=db_now()))


def sweeps(database: Database) -> set[str]:
    with database.read() as connection:
        return set(connection.execute(select(Sweep.name)).scalars()) - {"fleet"}


# Transactions.


def test_writing_begins_at_once_and_reading_does_not(sqlite_database: Database) -> None:
    with statements(sqlite_database) as seen:
        with sqlite_database.write() as connection:
            connection.execute(select(1))
        with sqlite_database.read() as connection:
            connection.execute(select(1))
        sqlite_database.retrying(lambda c: c.execute(select(1)))
        sqlite_database.retrying(lambda c: c.execute(select(1)), reading=True)
    begins = [statement for statement in seen if statement.startswith("BEGIN")]
    assert begins == ["BEGIN IMMEDIATE", "BEGIN", "BEGIN IMMEDIATE", "BEGIN"]


def test_a_connection_that_read_may_write_afterwards(sqlite_database: Database) -> None:
    """The pool hands the same connection out again: what it was used for must not stick."""
    one = Database(str(sqlite_database.url), pool_size=1)
    with one.read() as connection:
        connection.execute(select(1))
    with one.write() as connection, statements(one) as seen:
        add_sweep(connection, "a")
    assert seen[0].startswith("INSERT")
    assert sweeps(one) == {"a"}
    one.close()


def test_read_then_write_waits_for_another_writer(sqlite_database: Database) -> None:
    """A deferred transaction would fail here at once, whatever its time-out."""
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with sqlite_database.write() as connection:
            inside.set()
            add_sweep(connection, "other")
            time.sleep(0.3)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(other)
        assert inside.wait(5)
        with sqlite_database.write() as connection:
            assert done.is_set()
            names = set(connection.execute(select(Sweep.name)).scalars())
            add_sweep(connection, "mine")
        running.result(5)
    assert "other" in names
    assert sweeps(sqlite_database) == {"mine", "other"}


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    with database.write() as connection:
        add_sweep(connection, "unseen")
        start = time.monotonic()
        assert sweeps(database) == set()
        assert time.monotonic() - start < 2
    assert sweeps(database) == {"unseen"}


def test_an_exception_rolls_back(database: Database) -> None:
    with pytest.raises(KeyError), database.write() as connection:
        add_sweep(connection, str({}["missing"]))
    with pytest.raises(KeyError):
        database.retrying(lambda c: (add_sweep(c, "b"), {}["missing"]))
    assert sweeps(database) == set()


def test_sqlite_is_set_to_lose_nothing(sqlite_database: Database) -> None:
    with sqlite_database.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
        }
    full = 2
    assert pragmas == {
        "journal_mode": "wal",
        "synchronous": full,
        "busy_timeout": 30_000,
        "foreign_keys": 1,
    }


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    opened = Database(f"sqlite:///{tmp_path / 'new.db'}")
    with opened.write() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    opened.close()
    assert modes == {"new.db": 0o600, "new.db-wal": 0o600, "new.db-shm": 0o600}


def test_the_mode_of_a_file_that_is_there_is_its_owners_choice(tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    path.touch(0o660)
    path.chmod(0o660)
    opened = Database(f"sqlite:///{path}")
    opened.now()
    opened.close()
    assert path.stat().st_mode & 0o777 == 0o660


def test_a_new_file_that_another_process_is_writing_is_waited_for(tmp_path: Path) -> None:
    """SQLite itself does not wait: the switch to WAL beside a writer fails at once."""
    path = tmp_path / "new.db"
    writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("CREATE TABLE other (x)")
    release = threading.Timer(0.3, lambda: writer.execute("COMMIT"))
    release.start()
    opened = Database(f"sqlite:///{path}")
    with opened.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("SELECT count(*) FROM other").scalar_one() == 0
    opened.close()
    release.join()
    writer.close()


def test_a_process_that_stands_still_does_not_hold_row_locks(
    postgresql_database: Database,
) -> None:
    """PostgreSQL ends its transaction within a lease, and the next attempt gets through."""
    database = postgresql_database
    with database.read() as connection:
        query = text("SHOW idle_in_transaction_session_timeout")
        assert connection.execute(query).scalar_one() == "10s"
    job_id = make_job(database)
    attempts: list[int] = []

    def work(connection: Connection) -> bool:
        attempts.append(1)
        if len(attempts) == 1:
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '100ms'"))
            jobs.lock_jobs(connection, [job_id])
            time.sleep(0.3)  # SIGSTOP, as the server sees it
        return jobs.cancel(connection, job_id)

    assert database.retrying(work)
    assert len(attempts) == 2
    assert job(database, job_id).state == "cancelled"


def test_the_databases_clock_counts(database: Database) -> None:
    with database.read() as connection:
        now, later, earlier = connection.execute(select(db_now(), db_now(90.5), db_now(-600))).one()
    assert 90 < (later - now).total_seconds() < 91
    assert -601 < (earlier - now).total_seconds() < -599


def test_ids_sort_by_time_and_can_be_read_out() -> None:
    ids = []
    for _ in range(20):
        ids.append(new_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert {len(one) for one in ids} == {10}
    assert not set("".join(ids)) & set("ilou")


# What is tried again.


def with_state(sqlstate: str | None, message: str = "it says") -> psycopg.Error:
    error = psycopg.Error(message)
    error.sqlstate = sqlstate
    return error


def wrapped(original: Exception, kind: type[DBAPIError] = OperationalError) -> DBAPIError:
    return kind("SELECT 'secret'", {"password": "secret"}, original)


@pytest.mark.parametrize(
    "sqlstate",
    [
        "40001",
        "40P01",
        "55P03",
        "53300",
        "53100",
        "57P01",
        "57P03",
        "08006",
        "25P03",
        "25006",
        None,
    ],
)
def test_postgresql_errors_that_pass(sqlstate: str | None) -> None:
    assert is_transient(wrapped(with_state(sqlstate)))


@pytest.mark.parametrize("sqlstate", ["23505", "22P05", "42P01", "28P01", "3D000", "XX001"])
def test_postgresql_errors_that_stay(sqlstate: str) -> None:
    assert not is_transient(wrapped(with_state(sqlstate)))


@pytest.mark.parametrize(
    ("message", "passes"),
    [
        ("database is locked", True),
        ("database table is locked: jobs", True),
        ("database or disk is full", True),
        ("disk I/O error", True),
        ("unable to open database file", True),
        ("attempt to write a readonly database", True),
        ("no such table: jobs", False),
        ("near SELECT: syntax error", False),
    ],
)
def test_sqlite_errors(message: str, passes: bool) -> None:
    assert is_transient(wrapped(sqlite3.OperationalError(message))) == passes


def test_other_errors() -> None:
    assert is_transient(PoolTimeout("QueuePool limit"))
    assert not is_transient(ValueError("locked"))
    assert not is_transient(wrapped(sqlite3.IntegrityError("locked"), IntegrityError))


LOCKED = wrapped(sqlite3.OperationalError("database is locked"))


class Faulty:
    """A transaction's work that fails at first, before or after it has done its part."""

    def __init__(self, *faults: Exception) -> None:
        self.faults = list(faults)
        self.calls = 0

    def __call__(self, connection: Connection) -> int:
        self.calls += 1
        add_sweep(connection, f"call {self.calls}")
        if self.faults:
            raise self.faults.pop(0)
        return self.calls


def test_what_fails_for_a_while_is_done_in_the_end(database: Database) -> None:
    work, told = Faulty(LOCKED, LOCKED), []
    assert database.retrying(work, on_wait=told.append) == 3
    assert sweeps(database) == {"call 3"}
    assert len(told) == 2
    assert all("database is locked" in str(error) for error in told)


def test_patience_ends(database: Database) -> None:
    work = Faulty(*[LOCKED] * 1000)
    start = time.monotonic()
    with pytest.raises(DatabaseError, match="locked"):
        database.retrying(work, patience=0.4)
    assert time.monotonic() - start < 2
    assert 2 <= work.calls <= 5
    with pytest.raises(DatabaseError):
        database.retrying(work, patience=0)
    assert sweeps(database) == set()


def test_stop_ends_the_patience(database: Database) -> None:
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    start = time.monotonic()
    with pytest.raises(DatabaseError):
        database.retrying(Faulty(*[LOCKED] * 1000), patience=float("inf"), stop=stop)
    assert time.monotonic() - start < 5


def test_a_users_mistake_is_not_tried_again(database: Database) -> None:
    work = Faulty()
    database.retrying(work)
    work.calls = 0
    with pytest.raises(IntegrityError):
        database.retrying(work)  # the same name again
    assert work.calls == 1


@contextmanager
def lost_answer(database: Database) -> Iterator[list[int]]:
    """The next commit takes place, and the connection breaks before its answer is there."""
    lost: list[int] = []

    def break_off(connection: Connection) -> None:
        if lost:
            return
        lost.append(1)
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("BEGIN")
        raise LOCKED

    event.listen(database.engine, "commit", break_off)
    try:
        yield lost
    finally:
        event.remove(database.engine, "commit", break_off)


@pytest.mark.parametrize(
    ("act", "answers"),
    [
        (lambda c, job_id: jobs.cancel(c, job_id), (True, False)),
        (lambda c, job_id: jobs.pause(c, job_id), (True, False)),
        (lambda c, job_id: jobs.change(c, job_id, {"priority": 3}), (None, None)),
        (lambda c, job_id: jobs.retry(c, job_id, only_code=None, chunk_size=4), (0, 0)),
    ],
)
def test_a_commit_whose_answer_was_lost_is_repeated_without_harm(
    database: Database, act: Callable[[Connection, str], Any], answers: tuple[Any, Any]
) -> None:
    job_id, twin = make_job(database), make_job(database)
    assert database.retrying(lambda c: act(c, twin)) == answers[0]
    with lost_answer(database) as lost:
        assert database.retrying(lambda c: act(c, job_id)) == answers[1]
    assert lost
    one, other = job(database, job_id), job(database, twin)
    assert (one.state, one.priority) == (other.state, other.priority)


def test_a_real_deadlock_is_resolved(postgresql_database: Database) -> None:
    database = postgresql_database
    ids = sorted(make_job(database) for _ in range(2))
    both = threading.Barrier(2, timeout=10)

    def work(order: list[str]) -> int:
        attempts = 0

        def attempt(connection: Connection) -> None:
            nonlocal attempts
            attempts += 1
            for number, job_id in enumerate(order):
                jobs.change(connection, job_id, {"priority": attempts})
                if number == 0 and attempts == 1:
                    both.wait()

        database.retrying(attempt)
        return attempts

    with ThreadPoolExecutor(2) as pool:
        attempts = sorted(pool.map(work, [ids, ids[::-1]]))
    assert attempts == [1, 2]


def terminate(database: Database, connection: Connection) -> None:
    """Cuts the connection off at the server."""
    pid = connection.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
    with database.write() as other:
        assert other.execute(select(func.pg_terminate_backend(pid))).scalar_one()


def test_a_connection_that_is_cut_off_is_replaced(postgresql_database: Database) -> None:
    database = postgresql_database
    attempts: list[int] = []

    def work(connection: Connection) -> None:
        attempts.append(1)
        add_sweep(connection, f"attempt {len(attempts)}")
        if len(attempts) < 3:
            terminate(database, connection)
            connection.execute(select(1))

    database.retrying(work)
    assert sweeps(database) == {"attempt 3"}


def test_a_copy_that_is_cut_off_is_repeated(postgresql_database: Database) -> None:
    """COPY goes past SQLAlchemy to the driver: its errors are the same to the caller."""
    database = postgresql_database
    job_id = make_job(database, 2, storing=True)
    rows = [storing.NewRequest(i, {"prompt": "p" * 100}, None, None, 1) for i in range(2, 2000)]
    attempts: list[int] = []

    def work(connection: Connection) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            terminate(database, connection)
            storing._copy_requests(connection, job_id, rows)
        else:
            storing.store_requests(connection, job_id, rows)

    database.retrying(work)
    assert len(attempts) == 2
    twice = [*rows[:2], rows[0]]
    with pytest.raises(IntegrityError), database.write() as connection:
        storing._copy_requests(connection, job_id, twice)


def test_a_damaged_database_is_the_databases_fault(sqlite_database: Database) -> None:
    malformed = wrapped(sqlite3.DatabaseError("database disk image is malformed"), SQLDatabaseError)
    with pytest.raises(DatabaseError, match="malformed"):
        sqlite_database.retrying(Faulty(malformed))


def test_more_work_than_connections_waits_for_one(sqlite_database: Database) -> None:
    small = Database(str(sqlite_database.url), pool_size=2)

    def look(_: int) -> int:
        with small.read() as connection:
            time.sleep(0.02)
            return connection.execute(select(func.count()).select_from(Job)).scalar_one()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(look, range(16))) == {0}
    assert small.engine.pool.checkedin() <= 2  # type: ignore[attr-defined]
    small.close()
