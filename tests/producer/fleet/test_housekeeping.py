"""The tick: what it does, what it must not do too early, and that any number may do it at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from models.base import db_now
from models.database import Database
from models.job import Chunk, Job
from models.store import leases
from models.worker import Worker
from nightherd.errors import BrokerError, DatabaseError
from nightherd.settings import Settings
from producer.fleet import housekeeping
from producer.fleet.housekeeping import Housekeeper, TickReport
from tests.seeding import (
    KEY,
    check_sums,
    claim,
    job,
    job_chunks,
    lapse,
    make_job,
    make_worker,
    save,
    statements,
    work_off,
)

MakeSettings = Callable[..., Settings]


class FakeDispatcher:
    """Stands for the dispatcher: remembers the keys that wake-ups were published for."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.error: BrokerError | None = None

    def top_up(self, key: str) -> int:
        if self.error is not None:
            raise self.error
        self.published.append(key)
        return 1


class Fleet:
    """Housekeepers on one clock that the test winds on."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        self.now = 1000.0
        self.dispatcher = FakeDispatcher()

    def housekeeper(self) -> Housekeeper:
        dispatcher: Any = self.dispatcher
        return Housekeeper(self.database, dispatcher, self.settings, clock=lambda: self.now)

    def tick(self, housekeeper: Housekeeper, *, after: float = 10.0) -> TickReport:
        """A tick, `after` seconds later; the sweep is due each time."""
        self.now += after
        with self.database.write() as connection:
            connection.exec_driver_sql("UPDATE sweeps SET last_at = '2000-01-01 00:00:00.000000'")
        return housekeeper.tick()


@pytest.fixture
def fleet(database: Database, make_settings: MakeSettings) -> Fleet:
    return Fleet(database, make_settings(lease_seconds=45.0, tick_seconds=10.0))


def held_by_dead_worker(database: Database) -> tuple[str, str]:
    """A worker whose lease is over, and the job of which it holds a chunk."""
    job_id = make_job(database, 4)
    worker = make_worker(database)
    claim(database, worker)
    lapse(database, worker)
    return worker, job_id


def test_no_worker_is_dead_before_a_whole_lease_without_a_gap(fleet: Fleet) -> None:
    worker, job_id = held_by_dead_worker(fleet.database)
    mine = fleet.housekeeper()
    for _ in range(5):
        assert fleet.tick(mine).dead_workers == []
    assert job_chunks(fleet.database, job_id)[0].state == "running"
    assert fleet.tick(mine).dead_workers == [worker]
    assert job_chunks(fleet.database, job_id)[0].state == "queued"
    assert fleet.tick(mine).dead_workers == []


def test_after_a_gap_it_counts_anew(fleet: Fleet) -> None:
    """A suspended machine, or a process that stood still: all leases lapsed meanwhile."""
    mine = fleet.housekeeper()
    for _ in range(10):
        fleet.tick(mine)
    worker, _ = held_by_dead_worker(fleet.database)
    assert fleet.tick(mine, after=21.5).dead_workers == []
    for _ in range(4):
        assert fleet.tick(mine).dead_workers == []
    assert fleet.tick(mine).dead_workers == [worker]


def test_a_late_tick_is_no_gap(fleet: Fleet) -> None:
    mine = fleet.housekeeper()
    for _ in range(10):
        fleet.tick(mine)
    worker, _ = held_by_dead_worker(fleet.database)
    assert fleet.tick(mine, after=20.0).dead_workers == [worker]


def test_after_an_outage_no_worker_is_declared_dead(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database was away: everybody's lease lapsed, and everybody renews in a moment."""
    mine = fleet.housekeeper()
    for _ in range(10):
        fleet.tick(mine)
    worker, _ = held_by_dead_worker(fleet.database)
    with monkeypatch.context() as away:

        def refuse(*_: Any, **__: Any) -> None:
            raise DatabaseError("away")

        away.setattr(Database, "retrying", refuse)
        for _ in range(6):
            fleet.now += 10
            with pytest.raises(DatabaseError):
                mine.tick()
    for _ in range(5):
        assert fleet.tick(mine).dead_workers == []
    assert fleet.tick(mine).dead_workers == [worker]


def test_a_database_that_stands_still_within_the_tick(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers in the end, and says that all leases have lapsed: that was its own doing."""
    mine = fleet.housekeeper()
    for _ in range(10):
        fleet.tick(mine)
    worker, job_id = held_by_dead_worker(fleet.database)
    real = leases.workers_to_reap

    def slow(connection: Any) -> list[str]:
        fleet.now += 60
        return real(connection)

    with monkeypatch.context() as standing:
        standing.setattr(leases, "workers_to_reap", slow)
        assert fleet.tick(mine).dead_workers == []
    assert job_chunks(fleet.database, job_id)[0].state == "running"
    assert fleet.tick(mine).dead_workers == []  # the gap, seen from the next tick
    for _ in range(4):
        assert fleet.tick(mine).dead_workers == []
    assert fleet.tick(mine).dead_workers == [worker]


def test_who_lapsed_only_while_the_reaper_waited_is_not_reaped(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = fleet.housekeeper()
    for _ in range(10):
        fleet.tick(mine)
    dead, _ = held_by_dead_worker(fleet.database)
    live = make_worker(fleet.database)
    real = leases.reap

    def late(connection: Any, expired: Any, **given: Any) -> list[str]:
        connection.execute(update(Worker).where(Worker.id == live).values(lease_until=db_now(-1)))
        return real(connection, expired, **given)

    monkeypatch.setattr(leases, "reap", late)
    assert fleet.tick(mine).dead_workers == [dead]


def test_the_sweep_runs_once_a_period_in_the_whole_fleet(fleet: Fleet) -> None:
    overdue = datetime.now(UTC) - timedelta(hours=1)
    first = make_job(fleet.database, deadline=overdue)
    one, other = fleet.housekeeper(), fleet.housekeeper()
    assert fleet.tick(one).expired == [first]
    second = make_job(fleet.database, deadline=overdue)
    assert other.tick().expired == []  # not due yet
    assert one.tick().expired == []
    assert fleet.tick(other).expired == [second]
    assert {job(fleet.database, one).state for one in (first, second)} == {"expired"}


def test_what_a_sweep_sets_right(fleet: Fleet) -> None:
    database = fleet.database
    done = make_job(database, 4)
    orphan = make_job(database, 5, storing=True)
    fresh = make_job(database, 5, storing=True)
    expired = make_job(database, 4, deadline=datetime.now(UTC) - timedelta(seconds=1))
    old = make_worker(database, state="stopped")
    with database.write() as connection:
        connection.execute(update(Chunk).where(Chunk.job_id == done).values(state="done", done=4))
        connection.execute(update(Job).where(Job.id == orphan).values(touched_at=db_now(-601)))
        connection.execute(
            update(Worker)
            .where(Worker.id == old)
            .values(renewed_at=db_now(-housekeeping.FORGET_WORKERS_SECONDS - 1))
        )
    report = fleet.tick(fleet.housekeeper())
    assert (report.completed, report.expired, report.orphan_rows) == ([done], [expired], 6)
    with database.read() as connection:
        assert connection.execute(select(Worker.id)).all() == []
        ids = set(connection.execute(select(Job.id)).scalars())
    assert ids == {done, fresh, expired}
    report = fleet.tick(fleet.housekeeper())
    assert (report.completed, report.expired, report.orphan_rows) == ([], [], 0)


def test_each_checkpoint_with_work_gets_wake_ups(fleet: Fleet) -> None:
    make_job(fleet.database, key="one")
    make_job(fleet.database, key="two")
    make_job(fleet.database, key="three", not_before=datetime.now(UTC) + timedelta(hours=1))
    assert fleet.tick(fleet.housekeeper()).wake_ups == 2
    assert sorted(fleet.dispatcher.published) == ["one", "two"]


def test_a_broker_that_is_down_hinders_nothing_else_and_is_said_once(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    make_job(fleet.database)
    overdue = make_job(fleet.database, deadline=datetime.now(UTC) - timedelta(hours=1))
    mine = fleet.housekeeper()
    fleet.dispatcher.error = BrokerError("the broker is down")
    caplog.set_level("INFO", "nightherd.housekeeping")
    report = fleet.tick(mine)
    assert (report.expired, report.wake_ups) == ([overdue], 0)
    fleet.tick(mine)
    assert sum("the broker is down" in record.message for record in caplog.records) == 1
    fleet.dispatcher.error = None
    assert fleet.tick(mine).wake_ups == 1
    assert "answers again" in caplog.text


def test_an_idle_tick_writes_nothing_but_the_election(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    """Ten workers tick beside the one that writes results: SQLite has one writer at a time."""
    fleet = Fleet(sqlite_database, make_settings(lease_seconds=45.0, tick_seconds=10.0))
    mine = fleet.housekeeper()
    for _ in range(8):
        fleet.tick(mine)
    with statements(sqlite_database) as seen:
        mine.tick()
    assert seen.count("BEGIN IMMEDIATE") == 1
    assert len(seen) <= 6


def test_ten_housekeepers_at_once(database: Database, make_settings: MakeSettings) -> None:
    """Real threads and connections: each thing is done once, and no deadlock."""
    fleet = Fleet(database, make_settings(lease_seconds=45.0, tick_seconds=10.0))
    ids = [make_job(database, 12, chunk_size=2) for _ in range(3)]
    dead = [make_worker(database) for _ in range(5)]
    for number in range(15):
        claim(database, dead[number % 5])
    keepers = [fleet.housekeeper() for _ in range(10)]
    for _ in range(5):
        fleet.now += 10
        for keeper in keepers:
            keeper.tick()
    late = make_job(database, deadline=datetime.now(UTC) - timedelta(hours=1))
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE sweeps SET last_at = '2000-01-01 00:00:00.000000'")
    lapse(database, *dead)
    fleet.now += 10
    start = threading.Barrier(len(keepers))

    def tick(keeper: Housekeeper) -> TickReport:
        start.wait()
        return keeper.tick()

    with ThreadPoolExecutor(len(keepers)) as pool:
        reports = list(pool.map(tick, keepers))
    assert sorted(one for report in reports for one in report.dead_workers) == sorted(dead)
    assert [one for report in reports for one in report.expired] == [late]
    rows = [row for job_id in ids for row in job_chunks(database, job_id)]
    assert {row.state for row in rows} == {"queued"}
    assert sum(row.deaths for row in rows) == 15
    work_off(database, make_worker(database))
    for job_id in ids:
        assert job(database, job_id).state == "completed"
        check_sums(database, job_id)


def test_a_job_goes_on_after_its_worker_died(fleet: Fleet) -> None:
    """A wake-up is published in the very tick that returns its chunk."""
    worker, job_id = held_by_dead_worker(fleet.database)
    mine = fleet.housekeeper()
    for _ in range(5):
        fleet.tick(mine)
    assert fleet.dispatcher.published == []
    report = fleet.tick(mine)
    assert (report.dead_workers, fleet.dispatcher.published) == ([worker], [KEY])
    other = make_worker(fleet.database)
    save(fleet.database, other, claim(fleet.database, other))
    assert job(fleet.database, job_id).state == "completed"
