from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from models.base import db_now
from models.database import Database
from models.store import jobs, leases
from models.worker import Worker
from nightherd.settings import Settings
from tests.conftest import wait_until
from tests.fakes import FakeEngine
from tests.worker.harness import WorkerHarness, open_harness, store_job, troubled
from worker.engine.interface import EngineStats
from worker.process import hang_detector as module
from worker.process.hang_detector import HangDetector
from worker.process.lease import DatabaseClock

MakeSettings = Callable[..., Settings]
PROMPTS = [f"prompt {number}" for number in range(6)]


def _declare_dead(harness: WorkerHarness) -> None:
    """Its lease has lapsed, and a tick has noticed."""
    with harness.database.write() as connection:
        connection.execute(
            update(Worker).where(Worker.id == harness.identity.id).values(lease_until=db_now(-1))
        )
        assert leases.reap(connection, leases.workers_to_reap(connection), poison_deaths=3) == [
            harness.identity.id
        ]


def test_a_lease_is_renewed_again_and_again(
    database: Database, make_settings: MakeSettings
) -> None:
    with open_harness(database, make_settings(), watching=True) as harness:
        first = harness.worker()
        assert first.state == "ready"
        wait_until(
            lambda: harness.worker().lease_until > first.lease_until + timedelta(seconds=0.5)
        )
        harness.draining.set()
        wait_until(lambda: harness.worker().state == "draining")
    harness.lease.leave()
    assert harness.worker().state == "stopped"


def test_a_worker_that_loads_renews_its_lease_too(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    harness = WorkerHarness(sqlite_database, make_settings())
    harness.lease.register()
    harness.lease.start()
    first = harness.worker()
    assert first.state == "starting"
    wait_until(lambda: harness.worker().renewed_at > first.renewed_at)
    assert harness.worker().state == "starting"
    harness.lease.stop()


def test_declared_dead_it_registers_anew_and_drops_everything(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(database, PROMPTS)
    with open_harness(database, make_settings(), watching=True) as harness:
        harness.engine.hang()
        wakes = [harness.wake(), harness.wake()]
        wait_until(lambda: harness.engine.stats().running == 6)
        old = harness.identity.id
        _declare_dead(harness)
        assert [wake.result(10) for wake in wakes] == ["returned", "returned"]
        wait_until(lambda: harness.identity.id != old)
        wait_until(lambda: harness.worker_state() == "ready")
        assert harness.results(job) == []
        assert [chunk.deaths for chunk in harness.chunks(job)] == [1, 1]
        harness.engine.go_on()
        harness.work_off()
        harness.check_complete(job, PROMPTS)
        assert {row.worker_id for row in harness.results(job)} == {harness.identity.id}


def test_it_stays_under_its_new_name_when_the_database_is_away_in_that_moment(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    database = troubled(sqlite_database)
    with open_harness(database, make_settings(), watching=True) as harness:
        old = harness.identity.id
        _declare_dead(harness)
        database.lost_answers = 2
        wait_until(lambda: harness.identity.id != old)
        wait_until(lambda: database.lost_answers == 0)
        time.sleep(0.5)
        assert harness.worker().state == "ready"
    database.close()


def test_a_worker_that_has_left_does_not_come_back(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    with open_harness(sqlite_database, make_settings(), watching=True) as harness:
        harness.lease.stop()
        harness.lease.leave()
        name = harness.identity.id
        harness.lease._renew(patience=1)
        assert harness.identity.id == name
        assert harness.worker().state == "stopped"


def test_an_id_that_is_taken_is_replaced(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    first, second = (
        WorkerHarness(sqlite_database, settings),
        WorkerHarness(sqlite_database, settings),
    )
    first.lease.register()
    with sqlite_database.write() as connection:
        connection.execute(update(Worker).values(host="another machine"))
    second.identity.id = first.identity.id
    second.lease.register()
    assert second.identity.id != first.identity.id
    assert first.worker().state == second.worker().state == "starting"


def _stats(step_started: float | None, longest: float = 0.0) -> EngineStats:
    return EngineStats(0, 0, 0, 0, 0, step_started, longest)


def _hang_detector(
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[HangDetector, Callable[[float], None]]:
    """A new one, and a function that moves its clock on."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def after(seconds: float) -> None:
        now[0] += seconds

    return HangDetector(), after


def test_a_step_may_take_a_minute_or_twenty_times_the_longest_recent_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for longest, limit in ((0.0, 60), (2.0, 60), (10.0, 200)):
        with monkeypatch.context() as patch:
            detector, after = _hang_detector(patch)
            seconds = 0
            while detector.alive(_stats(5.0, longest)):
                after(1)
                seconds += 1
            assert seconds == limit + 1


def test_an_engine_that_steps_or_idles_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, after = _hang_detector(monkeypatch)
    for second in range(300):
        after(1)
        assert detector.alive(_stats(float(second // 50)))
    for _ in range(300):
        after(1)
        assert detector.alive(_stats(None))


def test_a_process_that_was_stopped_does_not_blame_its_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detector, after = _hang_detector(monkeypatch)
    assert detector.alive(_stats(5.0))
    after(1)
    assert detector.alive(_stats(5.0))
    after(3600)  # SIGSTOP, and an hour later SIGCONT: the very same step
    assert detector.alive(_stats(5.0))


def test_the_lease_is_not_renewed_while_the_engine_hangs(
    sqlite_database: Database, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHORTEST_STEP_LIMIT", 0.3)
    store_job(sqlite_database, PROMPTS)
    settings = make_settings(lease_seconds=1.0)
    with open_harness(sqlite_database, settings, watching=True) as harness:
        wake = harness.wake()
        assert wake.result(5) == "done"
        harness.engine.hang()
        wake = harness.wake()
        wait_until(lambda: harness.engine.stats().step_started is not None)
        time.sleep(0.6)
        renewed = harness.worker().renewed_at
        assert not harness.hung.is_set(), "the lease is not over yet"
        assert harness.hung.wait(3)
        assert harness.worker().renewed_at == renewed
        harness.engine.go_on()
        assert wake.result(5) == "done"
        wait_until(lambda: harness.worker().renewed_at > renewed, what="renewal once it goes on")


@pytest.mark.parametrize("act", [jobs.pause, jobs.cancel])
def test_what_is_not_wanted_any_more_comes_back_within_two_watches(
    database: Database, make_settings: MakeSettings, act: Callable[..., object]
) -> None:
    job = store_job(database, PROMPTS, params={"max_tokens": 200})
    engine = FakeEngine(step_seconds=0.02)
    settings = make_settings(watch_seconds=0.3)
    with open_harness(database, settings, engine, watching=True) as harness:
        wakes = [harness.wake(), harness.wake()]
        wait_until(lambda: engine.stats().running == 6)
        with database.write() as connection:
            act(connection, job)
        started = time.monotonic()
        assert [wake.result(10) for wake in wakes] == ["returned", "returned"]
        assert time.monotonic() - started < 1.0
        assert engine.stats().running == 0
        state = "queued" if act is jobs.pause else "cancelled"
        assert harness.states(job) == [state] * 2


def test_chunks_are_preempted_for_a_higher_priority_when_no_slot_is_free(
    database: Database, make_settings: MakeSettings
) -> None:
    long = {"max_tokens": 200}
    low = store_job(database, PROMPTS, params=long)
    high = store_job(database, PROMPTS[:3], params=long)
    engine = FakeEngine(step_seconds=0.02)
    settings = make_settings(watch_seconds=0.2, slots=2)
    with open_harness(database, settings, engine, watching=True) as harness:
        wakes = [harness.wake(), harness.wake()]
        wait_until(lambda: harness.states(low) == ["running"] * 2)
        time.sleep(3 * settings.watch_seconds)
        assert harness.states(low) == ["running"] * 2, "equals do not preempt each other"
        with database.write() as connection:
            jobs.change(connection, high, {"priority": 1})
        wait_until(lambda: harness.states(low).count("queued") == 1, seconds=2)
        wakes.append(harness.wake())
        wait_until(lambda: harness.states(high) == ["running"], seconds=2)
        assert harness.states(low).count("running") == 1, "one was enough"
        harness.drain()
        for wake in wakes:
            wake.result(10)


def test_a_broken_engine_is_reported(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    with open_harness(sqlite_database, make_settings(), watching=True) as harness:
        harness.engine.break_down("the bus was missed")
        wait_until(lambda: bool(harness.broken))
        assert harness.broken[0] == "the bus was missed"


@pytest.mark.parametrize("end", ["completed", "cancelled", "gone"])
def test_a_worker_for_one_job_notices_its_end(
    sqlite_database: Database, make_settings: MakeSettings, end: str
) -> None:
    job = store_job(sqlite_database, PROMPTS)
    settings = make_settings()
    only = "nosuchjob0" if end == "gone" else job
    with open_harness(sqlite_database, settings, watching=True, only_job=only) as harness:
        if end != "gone":
            assert not harness.job_ended.wait(0.5)
        if end == "completed":
            harness.work_off()
        if end == "cancelled":
            with sqlite_database.write() as connection:
                jobs.cancel(connection, job)
        assert harness.job_ended.wait(2)


def test_the_lease_does_not_wait_for_a_claim_that_waits(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    with (
        open_harness(sqlite_database, make_settings(), watching=True) as harness,
        harness.inflight.claim_lock,
    ):
        first = harness.worker().renewed_at
        wait_until(lambda: harness.worker().renewed_at > first, seconds=3)


def test_readiness_waits_for_the_database_and_for_nothing_in_a_drain(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    database = troubled(sqlite_database)
    harness = WorkerHarness(database, make_settings())
    harness.lease.register()
    database.away = True
    threading.Timer(0.5, lambda: setattr(database, "away", False)).start()
    assert harness.lease.ready(harness.engine)
    assert harness.worker().state == "ready"
    database.away = True
    threading.Timer(0.5, harness.draining.set).start()
    assert not harness.lease.ready(harness.engine)
    database.close()


def test_an_unforeseen_error_does_not_end_the_leases_thread(
    sqlite_database: Database, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_harness(sqlite_database, make_settings(), watching=True) as harness:

        def broken() -> EngineStats:
            raise ZeroDivisionError

        monkeypatch.setattr(harness.engine, "stats", broken)
        time.sleep(0.5)
        monkeypatch.undo()
        renewed = harness.worker().renewed_at
        wait_until(lambda: harness.worker().renewed_at > renewed)


def test_times_are_the_databases_however_wrong_the_own_clock() -> None:
    clock = DatabaseClock()
    assert abs((clock.now() - datetime.now(UTC)).total_seconds()) < 1
    for skew in (timedelta(minutes=5), timedelta(minutes=-5)):
        clock.set(datetime.now(UTC) + skew)
        assert abs((clock.now() - datetime.now(UTC) - skew).total_seconds()) < 1


def test_results_carry_the_databases_time(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, PROMPTS)
    with open_harness(sqlite_database, make_settings()) as harness:
        harness.lease.clock.set(datetime.now(UTC) + timedelta(minutes=5))
        harness.work_off()
        (row, *_) = harness.results(job)
        ahead = (row.finished_at - datetime.now(UTC)).total_seconds()
        assert 280 < ahead < 310
        assert row.started_at <= row.finished_at
