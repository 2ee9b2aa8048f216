"""Fault 15: the database is away, or refuses for now: nothing is counted without a commit."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import event, select, text, update

from models.base import db_now
from models.database import Database
from models.job import Chunk, Job
from models.store import leases
from models.worker import Worker
from nightherd.errors import DatabaseError
from nightherd.settings import Settings
from producer.fleet.dispatch import Dispatcher
from producer.fleet.housekeeping import Housekeeper
from tests.conftest import wait_until
from tests.fakes import CHECKPOINT, FakeEngine
from tests.faults.killing import Wire, pause, postgresql_copy, sqlite_lock, url_of, wire_to
from tests.seeding import make_worker
from tests.worker.harness import open_harness, store_job
from tests.worker.process.test_app import WorkerCluster

MakeSettings = Callable[..., Settings]
PROMPTS = [f"prompt {number}" for number in range(16)]
LONG = 8000
"""Tokens of a result that needs pages of its own."""


@dataclass
class DatabaseLink:
    """A database, and connections to it that can be cut."""

    database: Database
    """What the workers use."""
    direct: Database
    """The same database, by connections that are never cut."""
    down: Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _cut(wire: Wire) -> Iterator[None]:
    wire.cut()
    yield
    wire.repair()


@pytest.fixture(params=["sqlite", "postgresql"])
def link(request: pytest.FixtureRequest) -> Iterator[DatabaseLink]:
    """SQLite, locked by another process; PostgreSQL, whose connections die and are refused."""
    with contextlib.ExitStack() as stack:
        if request.param == "sqlite":
            direct = request.getfixturevalue("sqlite_database")
            url = url_of(direct)
        else:
            server = request.getfixturevalue("postgresql")
            template = request.getfixturevalue("postgresql_template")
            real = stack.enter_context(postgresql_copy(server, template))
            wire = stack.enter_context(wire_to(real))
            url = wire.url
            direct = Database(real)
            stack.callback(direct.close)
        database = Database(url, pool_size=20, patience=0.5)
        stack.callback(database.close)
        yield DatabaseLink(
            database,
            direct,
            (lambda: sqlite_lock(direct)) if request.param == "sqlite" else (lambda: _cut(wire)),
        )


# Away for long.


class _Ticks:
    """A process's housekeeping, in a thread."""

    def __init__(self, database: Database, settings: Settings, dispatcher: Any) -> None:
        self._keeper = Housekeeper(database, cast(Dispatcher, dispatcher), settings)
        self._seconds = settings.tick_seconds
        self._stop = threading.Event()
        self.failed = 0
        self.ticks = 0
        self.dead: list[str] = []
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.dead += self._keeper.tick().dead_workers
            except DatabaseError:
                self.failed += 1
            self.ticks += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(40)
        assert not self._thread.is_alive()


def test_database_down_longer_than_the_lease(
    link: DatabaseLink, make_settings: MakeSettings
) -> None:
    """All leases lapse, no worker is declared dead, and all go on with the chunks they had."""
    settings = make_settings(lease_seconds=1.5, renew_seconds=0.2, tick_seconds=0.2, slots=2)
    job_id = store_job(link.database, PROMPTS, params={"max_tokens": 60})
    with contextlib.ExitStack() as stack:
        harnesses = [
            stack.enter_context(
                open_harness(link.database, settings, FakeEngine(0.02), watching=True)
            )
            for _ in range(2)
        ]
        ids = [harness.identity.id for harness in harnesses]
        ticks = [_Ticks(link.database, settings, harness.dispatcher) for harness in harnesses]
        for one in ticks:
            stack.callback(one.stop)
        # One on another machine, which will not try again for a while when the database is back.
        slow = make_worker(link.database, key=CHECKPOINT, lease_seconds=settings.lease_seconds)
        wait_until(lambda: all(one.ticks > 2 for one in ticks), what="a few ticks")
        wakes = [harness.wake() for harness in harnesses for _ in range(2)]
        wait_until(lambda: all(harness.engine.stats().running == 8 for harness in harnesses))
        with link.down():
            pause(2.5 * settings.lease_seconds)
            assert {worker.state for worker in _workers(link.direct)} == {"ready"}
            assert [chunk.state for chunk in _chunks(link.direct, job_id)] == ["running"] * 4
        pause(0.5 * settings.lease_seconds)
        with link.direct.write() as connection:
            assert leases.renew(connection, slow, lease_seconds=3600, state="ready"), (
                "declared dead"
            )
        assert [wake.result(20) for wake in wakes] == ["done"] * 4
        harnesses[0].check_complete(job_id, PROMPTS, max_tokens=60)
        assert [harness.identity.id for harness in harnesses] == ids, "somebody registered anew"
        assert [one.dead for one in ticks] == [[], []]
        assert [(row.fence, row.deaths) for row in _chunks(link.direct, job_id)] == [(1, 0)] * 4
        assert sum(harness.engine.added for harness in harnesses) == len(PROMPTS)


@pytest.mark.faults
def test_database_down_longer_than_the_lease_of_worker_processes(
    link: DatabaseLink, broker_url: str, tmp_path: Path
) -> None:
    cluster = WorkerCluster(link.database, tmp_path, None, broker_url)
    try:
        processes = [cluster.start(step_seconds=0.05) for _ in range(2)]
        job_id = store_job(link.direct, PROMPTS, chunk_size=2, params={"max_tokens": 200})
        cluster.publish_wakeups()
        wait_until(
            lambda: [row.state for row in _chunks(link.direct, job_id)] == ["running"] * 8,
            seconds=30,
            what="all chunks running",
        )
        pause(3)  # each may declare others dead by now
        before = _workers(link.direct)
        with link.down():
            pause(6)
        cluster.wait_for_end(job_id)
        cluster.check_complete(job_id, PROMPTS, max_tokens=200)
        assert _workers(link.direct) == before
        assert [(row.fence, row.deaths) for row in _chunks(link.direct, job_id)] == [(1, 0)] * 8
        for process in processes:
            process.terminate()
        assert [process.wait(20) for process in processes] == [0, 0]
    finally:
        cluster.close()


def _workers(database: Database) -> list[Any]:
    with database.read() as connection:
        return list(connection.execute(select(Worker.id, Worker.state).order_by(Worker.id)))


def _chunks(database: Database, job_id: str) -> list[Any]:
    with database.read() as connection:
        columns = (Chunk.state, Chunk.fence, Chunk.deaths, Chunk.done)
        query = select(*columns).where(Chunk.job_id == job_id).order_by(Chunk.id)
        return list(connection.execute(query))


# Refusals that pass.


@contextlib.contextmanager
def _at_the_save(
    database: Database, settings: Settings, direct: Database
) -> Iterator[tuple[str, Callable[[], None]]]:
    """A worker whose four results are held up, to be saved with their chunk's end.

    The function lets the engine go on, and waits until it has answered all.
    """
    job_id = store_job(direct, PROMPTS[:4], params={"max_tokens": LONG})
    with open_harness(database, settings, context_length=2 * LONG) as harness:
        harness.engine.hang()
        wake = harness.wake()
        wait_until(lambda: harness.engine.stats().running == 4)

        def go_on() -> None:
            harness.engine.go_on()
            wait_until(lambda: harness.engine.stats().running == 0)

        yield job_id, go_on
        assert wake.result(20) == "done"
        harness.check_complete(job_id, PROMPTS[:4], max_tokens=LONG)
        assert harness.engine.added == 4, "nothing is computed twice"


def _not_counted(database: Database, job_id: str) -> bool:
    """What is not committed is neither done nor there."""
    from tests.seeding import job_results

    with database.read() as connection:
        state = connection.execute(select(Job.state).where(Job.id == job_id)).scalar_one()
    chunks = [(row.state, row.done) for row in _chunks(database, job_id)]
    return (state, chunks, job_results(database, job_id)) == ("running", [("running", 0)], {})


def _said(caplog: pytest.LogCaptureFixture, *words: str) -> Callable[[], bool]:
    return lambda: all(word in caplog.text for word in (*words, "wait in memory"))


@pytest.fixture
def impatient(sqlite_database: Database) -> Iterator[Database]:
    """SQLite whose connections wait for no lock, and grow to `pages` at most."""
    database = ImpatientDatabase(url_of(sqlite_database), pool_size=10)
    yield database
    database.close()


class ImpatientDatabase(Database):
    pages = 2**30

    def __init__(self, url: str, **given: Any) -> None:
        super().__init__(url, **given)
        event.listen(self.engine, "checkout", self._prepare)

    def _prepare(self, connection: Any, *_: Any) -> None:
        connection.execute("PRAGMA busy_timeout = 20").close()
        connection.execute(f"PRAGMA max_page_count = {self.pages}").close()


def test_sqlite_busy(
    impatient: ImpatientDatabase,
    sqlite_database: Database,
    make_settings: MakeSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        _at_the_save(impatient, make_settings(), sqlite_database) as (job_id, go_on),
        sqlite_lock(sqlite_database),
    ):
        go_on()
        wait_until(_said(caplog, "locked"), what="a save that found it locked")
        assert _not_counted(sqlite_database, job_id)


def test_disk_full_at_commit(
    impatient: ImpatientDatabase,
    sqlite_database: Database,
    make_settings: MakeSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with _at_the_save(impatient, make_settings(), sqlite_database) as (job_id, go_on):
        impatient.pages = _pages(sqlite_database)
        go_on()
        wait_until(_said(caplog, "full"), what="a save that found no room")
        assert _not_counted(sqlite_database, job_id)
        impatient.pages = ImpatientDatabase.pages


def _pages(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(text("PRAGMA page_count")).scalar_one())


def test_disk_full_and_told_to_stop(
    impatient: ImpatientDatabase, sqlite_database: Database, make_settings: MakeSettings
) -> None:
    """What no commit took is not done: it is computed again by the next worker."""
    job_id = store_job(sqlite_database, PROMPTS[:4], params={"max_tokens": LONG})
    settings = make_settings()
    with open_harness(impatient, settings, context_length=2 * LONG) as harness:
        harness.engine.hang()
        wake = harness.wake()
        wait_until(lambda: harness.engine.stats().running == 4)
        impatient.pages = _pages(sqlite_database)
        harness.engine.go_on()
        wait_until(lambda: harness.engine.stats().running == 0)
        harness.writer.abandon()
        wake.result(20)
        impatient.pages = ImpatientDatabase.pages
        assert _not_counted(sqlite_database, job_id)
        harness.lease.leave()
    assert [row.state for row in _chunks(sqlite_database, job_id)] == ["queued"]
    with open_harness(sqlite_database, settings, context_length=2 * LONG) as successor:
        successor.work_off()
        successor.check_complete(job_id, PROMPTS[:4], max_tokens=LONG)
        assert successor.engine.added == 4


@pytest.fixture
def own_database(postgresql: str, postgresql_template: str) -> Iterator[Database]:
    """A PostgreSQL database of the test's own."""
    with postgresql_copy(postgresql, postgresql_template) as url:
        database = Database(url, pool_size=10)
        yield database
        database.close()


@pytest.fixture
def direct(own_database: Database) -> Iterator[Database]:
    """The same database, for others than the worker."""
    with contextlib.closing(Database(url_of(own_database))) as database:
        yield database


def _errors(database: Database) -> list[str | None]:
    """The states of all errors that the database's users meet from now on."""
    met: list[str | None] = []

    def note(context: Any) -> None:
        met.append(getattr(context.original_exception, "sqlstate", None))

    event.listen(database.engine, "handle_error", note)
    return met


def _blocked(database: Database) -> bool:
    with database.read() as connection:
        query = (
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return bool(connection.exec_driver_sql(query).scalar_one())


def test_deadlock(
    own_database: Database,
    direct: Database,
    make_settings: MakeSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another transaction locks the chunk and then wants the job, against the order of locks."""
    met = _errors(own_database)
    with (
        _at_the_save(own_database, make_settings(), direct) as (job_id, go_on),
        direct.write() as other,
    ):
        # The save, which waits first, is the one that PostgreSQL ends.
        other.execute(text("SET LOCAL deadlock_timeout = '60s'"))
        other.execute(select(Chunk.id).where(Chunk.job_id == job_id).with_for_update())
        go_on()
        wait_until(lambda: _blocked(own_database), what="the save at the chunk's lock")
        other.execute(select(Job.id).where(Job.id == job_id).with_for_update())
        wait_until(lambda: "40P01" in met, what="a deadlock")
        assert _not_counted(own_database, job_id)
    assert "is it running" not in caplog.text, "a server that answers runs"


def test_serialisation_failure(
    own_database: Database, direct: Database, make_settings: MakeSettings
) -> None:
    """Where an administrator made transactions serialisable, they fail where they would wait."""
    with direct.write() as connection:
        name = connection.execute(text("SELECT current_database()")).scalar_one()
        connection.execute(
            text(f"ALTER DATABASE {name} SET default_transaction_isolation TO 'serializable'")
        )
    met = _errors(own_database)
    with _at_the_save(own_database, make_settings(), direct) as (job_id, go_on):
        with direct.write() as other:
            other.execute(update(Chunk).where(Chunk.job_id == job_id).values(claimed_at=db_now()))
            go_on()
            wait_until(lambda: _blocked(own_database), what="the save at the chunk's lock")
            assert _not_counted(own_database, job_id)
        wait_until(lambda: "40001" in met, what="a serialisation failure")
