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
from tests.worker.house import House, open_house, store_job, troubled
from worker import lease as module
from worker.engine.interface import EngineStats
from worker.lease import DatabaseClock, Pulse

MakeSettings = Callable[..., Settings]
PROMPTS = [f"prompt {number}" for number in range(6)]


def _lapse(house: House) -> None:
    """Its lease is over, and somebody notices."""
    with house.database.write() as connection:
        connection.execute(
            update(Worker).where(Worker.id == house.identity.id).values(lease_until=db_now(-1))
        )
        assert leases.reap(connection, leases.suspects(connection), poison_deaths=3) == [
            house.identity.id
        ]


def test_a_lease_is_renewed_again_and_again(
    database: Database, make_settings: MakeSettings
) -> None:
    with open_house(database, make_settings(), watching=True) as house:
        first = house.worker()
        assert first.state == "ready"
        wait_until(lambda: house.worker().lease_until > first.lease_until + timedelta(seconds=0.5))
        house.draining.set()
        wait_until(lambda: house.worker().state == "draining")
    house.lease.leave()
    assert house.worker().state == "stopped"


def test_a_worker_that_loads_renews_its_lease_too(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    house = House(sqlite_database, make_settings())
    house.lease.register()
    house.lease.start()
    first = house.worker()
    assert first.state == "starting"
    wait_until(lambda: house.worker().renewed_at > first.renewed_at)
    assert house.worker().state == "starting"
    house.lease.stop()


def test_declared_dead_it_registers_anew_and_drops_everything(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(database, PROMPTS)
    with open_house(database, make_settings(), watching=True) as house:
        house.engine.hang()
        wakes = [house.wake(), house.wake()]
        wait_until(lambda: house.engine.stats().running == 6)
        old = house.identity.id
        _lapse(house)
        assert [wake.result(10) for wake in wakes] == ["returned", "returned"]
        wait_until(lambda: house.identity.id != old)
        wait_until(lambda: house.worker_state() == "ready")
        assert house.results(job) == []
        assert [chunk.deaths for chunk in house.chunks(job)] == [1, 1]
        house.engine.go_on()
        house.work_off()
        house.check_complete(job, PROMPTS)
        assert {row.worker_id for row in house.results(job)} == {house.identity.id}


def test_it_stays_under_its_new_name_when_the_database_is_away_in_that_moment(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    database = troubled(sqlite_database)
    with open_house(database, make_settings(), watching=True) as house:
        old = house.identity.id
        _lapse(house)
        database.lost_answers = 2
        wait_until(lambda: house.identity.id != old)
        wait_until(lambda: database.lost_answers == 0)
        time.sleep(0.5)
        assert house.worker().state == "ready"
    database.close()


def test_a_worker_that_has_left_does_not_come_back(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    with open_house(sqlite_database, make_settings(), watching=True) as house:
        house.lease.stop()
        house.lease.leave()
        name = house.identity.id
        house.lease._renew(patience=1)
        assert house.identity.id == name
        assert house.worker().state == "stopped"


def test_an_id_that_is_taken_is_replaced(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    first, second = House(sqlite_database, settings), House(sqlite_database, settings)
    first.lease.register()
    with sqlite_database.write() as connection:
        connection.execute(update(Worker).values(host="another machine"))
    second.identity.id = first.identity.id
    second.lease.register()
    assert second.identity.id != first.identity.id
    assert first.worker().state == second.worker().state == "starting"


def _stats(step_started: float | None, longest: float = 0.0) -> EngineStats:
    return EngineStats(0, 0, 0, 0, 0, step_started, longest)


def _pulse(monkeypatch: pytest.MonkeyPatch) -> tuple[Pulse, Callable[[float], None]]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def after(seconds: float) -> None:
        now[0] += seconds

    return Pulse(), after


def test_a_step_may_take_a_minute_or_twenty_times_the_longest_of_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for longest, limit in ((0.0, 60), (2.0, 60), (10.0, 200)):
        with monkeypatch.context() as patch:
            pulse, after = _pulse(patch)
            seconds = 0
            while pulse.alive(_stats(5.0, longest)):
                after(1)
                seconds += 1
            assert seconds == limit + 1


def test_an_engine_that_steps_or_idles_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse, after = _pulse(monkeypatch)
    for second in range(300):
        after(1)
        assert pulse.alive(_stats(float(second // 50)))
    for _ in range(300):
        after(1)
        assert pulse.alive(_stats(None))


def test_a_process_that_was_stopped_does_not_blame_its_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pulse, after = _pulse(monkeypatch)
    assert pulse.alive(_stats(5.0))
    after(1)
    assert pulse.alive(_stats(5.0))
    after(3600)  # SIGSTOP, and an hour later SIGCONT: the very same step
    assert pulse.alive(_stats(5.0))


def test_an_engine_that_hangs_is_not_covered_for(
    sqlite_database: Database, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHORTEST_STEP_LIMIT", 0.3)
    store_job(sqlite_database, PROMPTS)
    settings = make_settings(lease_seconds=1.0)
    with open_house(sqlite_database, settings, watching=True) as house:
        wake = house.wake()
        assert wake.result(5) == "done"
        house.engine.hang()
        wake = house.wake()
        wait_until(lambda: house.engine.stats().step_started is not None)
        time.sleep(0.6)
        renewed = house.worker().renewed_at
        assert not house.hung.is_set(), "the lease is not over yet"
        assert house.hung.wait(3)
        assert house.worker().renewed_at == renewed
        house.engine.go_on()
        assert wake.result(5) == "done"
        wait_until(lambda: house.worker().renewed_at > renewed, what="renewal once it goes on")


@pytest.mark.parametrize("act", [jobs.pause, jobs.cancel])
def test_what_is_not_wanted_any_more_comes_back_within_two_watches(
    database: Database, make_settings: MakeSettings, act: Callable[..., object]
) -> None:
    job = store_job(database, PROMPTS, params={"max_tokens": 200})
    engine = FakeEngine(step_seconds=0.02)
    settings = make_settings(watch_seconds=0.3)
    with open_house(database, settings, engine, watching=True) as house:
        wakes = [house.wake(), house.wake()]
        wait_until(lambda: engine.stats().running == 6)
        with database.write() as connection:
            act(connection, job)
        started = time.monotonic()
        assert [wake.result(10) for wake in wakes] == ["returned", "returned"]
        assert time.monotonic() - started < 1.0
        assert engine.stats().running == 0
        state = "queued" if act is jobs.pause else "cancelled"
        assert house.states(job) == [state] * 2


def test_chunks_give_way_to_a_higher_priority_when_no_slot_is_free(
    database: Database, make_settings: MakeSettings
) -> None:
    long = {"max_tokens": 200}
    low = store_job(database, PROMPTS, params=long)
    high = store_job(database, PROMPTS[:3], params=long)
    engine = FakeEngine(step_seconds=0.02)
    settings = make_settings(watch_seconds=0.2, slots=2)
    with open_house(database, settings, engine, watching=True) as house:
        wakes = [house.wake(), house.wake()]
        wait_until(lambda: house.states(low) == ["running"] * 2)
        time.sleep(3 * settings.watch_seconds)
        assert house.states(low) == ["running"] * 2, "equals do not push each other out"
        with database.write() as connection:
            jobs.change(connection, high, {"priority": 1})
        wait_until(lambda: house.states(low).count("queued") == 1, seconds=2)
        wakes.append(house.wake())
        wait_until(lambda: house.states(high) == ["running"], seconds=2)
        assert house.states(low).count("running") == 1, "one was enough"
        house.drain()
        for wake in wakes:
            wake.result(10)


def test_a_broken_engine_is_reported(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    with open_house(sqlite_database, make_settings(), watching=True) as house:
        house.engine.break_down("the bus was missed")
        wait_until(lambda: bool(house.broken))
        assert house.broken[0] == "the bus was missed"


@pytest.mark.parametrize("end", ["completed", "cancelled", "gone"])
def test_a_worker_for_one_job_notices_its_end(
    sqlite_database: Database, make_settings: MakeSettings, end: str
) -> None:
    job = store_job(sqlite_database, PROMPTS)
    settings = make_settings()
    only = "nosuchjob0" if end == "gone" else job
    with open_house(sqlite_database, settings, watching=True, only_job=only) as house:
        if end != "gone":
            assert not house.job_ended.wait(0.5)
        if end == "completed":
            house.work_off()
        if end == "cancelled":
            with sqlite_database.write() as connection:
                jobs.cancel(connection, job)
        assert house.job_ended.wait(2)


def test_the_lease_does_not_wait_for_a_claim_that_waits(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    with open_house(sqlite_database, make_settings(), watching=True) as house, house.inflight.gate:
        first = house.worker().renewed_at
        wait_until(lambda: house.worker().renewed_at > first, seconds=3)


def test_readiness_waits_for_the_database_and_for_nothing_in_a_drain(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    database = troubled(sqlite_database)
    house = House(database, make_settings())
    house.lease.register()
    database.away = True
    threading.Timer(0.5, lambda: setattr(database, "away", False)).start()
    assert house.lease.ready(house.engine)
    assert house.worker().state == "ready"
    database.away = True
    threading.Timer(0.5, house.draining.set).start()
    assert not house.lease.ready(house.engine)
    database.close()


def test_an_unforeseen_error_does_not_end_the_leases_thread(
    sqlite_database: Database, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_house(sqlite_database, make_settings(), watching=True) as house:

        def broken() -> EngineStats:
            raise ZeroDivisionError

        monkeypatch.setattr(house.engine, "stats", broken)
        time.sleep(0.5)
        monkeypatch.undo()
        renewed = house.worker().renewed_at
        wait_until(lambda: house.worker().renewed_at > renewed)


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
    with open_house(sqlite_database, make_settings()) as house:
        house.lease.clock.set(datetime.now(UTC) + timedelta(minutes=5))
        house.work_off()
        (row, *_) = house.results(job)
        ahead = (row.finished_at - datetime.now(UTC)).total_seconds()
        assert 280 < ahead < 310
        assert row.started_at <= row.finished_at
