from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update

from models.database import Database
from models.job import Chunk
from models.store import chunks, leases
from models.store import jobs as store
from nightherd.settings import Settings
from tests.conftest import wait_until
from tests.fakes import CHECKPOINT, FakeEngine, byte_text
from tests.worker.harness import open_harness, store_job, troubled
from worker.chunks.prepare import PreparedRequest

MakeSettings = Callable[..., Settings]
PROMPTS = [f"prompt {number}" for number in range(10)]


def test_a_wake_up_becomes_a_chunk_and_the_chunk_results(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(database, PROMPTS, samples=2)
    with open_harness(database, make_settings()) as harness:
        assert harness.job_state(job) == "queued"
        assert harness.work_off() == ["done"] * 3
        harness.check_complete(job, PROMPTS, samples=2)
        assert [chunk.fence for chunk in harness.chunks(job)] == [1, 1, 1]
        assert harness.dispatcher.published == [CHECKPOINT] * 3, "wake-ups for the next chunks"
        assert harness.completed == [job]


def test_chunks_in_flight_share_one_engine(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, PROMPTS, chunk_size=3)
    engine = FakeEngine(step_seconds=0.05)
    with open_harness(sqlite_database, make_settings(), engine) as harness:
        wakes = [harness.wake() for _ in range(4)]
        assert [wake.result(10) for wake in wakes] == ["done"] * 4
        assert engine.most_running == 10
        harness.check_complete(job, PROMPTS)


def test_the_best_chunk_is_claimed_when_the_wake_up_comes(
    database: Database, make_settings: MakeSettings
) -> None:
    first = store_job(database, PROMPTS[:2])
    urgent = store_job(database, PROMPTS[:2], priority=1)
    paused = store_job(database, PROMPTS[:2], priority=9)
    with database.write() as connection:
        store.pause(connection, paused)
    with open_harness(database, make_settings()) as harness:
        assert harness.wake().result(10) == "done"
        assert (harness.job_state(urgent), harness.job_state(first)) == ("completed", "queued")
        assert harness.wake().result(10) == "done"
        assert harness.job_state(first) == "completed"
        assert harness.wake().result(10) == "nothing"
        assert harness.states(paused) == ["queued"]


def test_an_only_job_worker_claims_nothing_else(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    other = store_job(sqlite_database, PROMPTS, priority=5)
    mine = store_job(sqlite_database, PROMPTS)
    with open_harness(sqlite_database, make_settings(), only_job=mine) as harness:
        harness.work_off()
        harness.check_complete(mine, PROMPTS)
        assert set(harness.states(other)) == {"queued"}


def test_bad_requests_fail_alone_and_the_job_completes(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, ["good", "x" * 300, "good too"])
    with open_harness(sqlite_database, make_settings()) as harness:
        harness.work_off()
        rows = harness.results(job)
        assert [row.error_code for row in rows] == [None, "context_length_exceeded", None]
        assert harness.job_state(job) == "completed"
        (chunk,) = harness.chunks(job)
        assert (chunk.done, chunk.failed) == (2, 1)


def test_a_chunk_whose_requests_are_all_bad_ends_without_the_engine(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, ["x" * 300] * 4)
    with open_harness(sqlite_database, make_settings()) as harness:
        assert harness.work_off() == ["done"]
        assert harness.engine.added == 0
        assert harness.job_state(job) == "completed"


@pytest.mark.parametrize("fault", ["fails", "raises"])
def test_a_request_that_the_engine_cannot_run_fails_alone(
    sqlite_database: Database, make_settings: MakeSettings, fault: str
) -> None:
    job = store_job(sqlite_database, PROMPTS, samples=2, chunk_size=5)
    doomed = tuple(byte_text().encode(PROMPTS[3], False))
    engine = FakeEngine()
    what = ("out_of_memory", "too big") if fault == "fails" else MemoryError("too big")
    setattr(engine, fault, lambda request: what if request.prompt_token_ids == doomed else None)
    with open_harness(sqlite_database, make_settings(), engine) as harness:
        assert harness.work_off() == ["done", "done"]
        assert harness.job_state(job) == "completed"
        bad = [row for row in harness.results(job) if row.error_code is not None]
        assert [(row.number, row.sample) for row in bad] == [(3, 0), (3, 1)]
        code = "out_of_memory" if fault == "fails" else "engine_error"
        assert {row.error_code for row in bad} == {code}
        assert all("too big" in row.error_message for row in bad)


def _count_two_deaths(database: Database, job: str) -> None:
    """Two workers died of it."""
    with database.write() as connection:
        connection.execute(update(Chunk).where(Chunk.job_id == job).values(deaths=2))


def test_a_suspect_chunk_runs_with_nothing_beside_it(
    database: Database, make_settings: MakeSettings
) -> None:
    suspect = store_job(database, PROMPTS[:3])
    other = store_job(database, PROMPTS, chunk_size=5)
    _count_two_deaths(database, suspect)
    engine = FakeEngine()
    with open_harness(database, make_settings(), engine) as harness:
        engine.hang()
        alone = harness.wake()
        wait_until(lambda: engine.stats().running == 3)
        assert harness.wake().result(10) == "nothing", "not beside it"
        engine.go_on()
        assert alone.result(10) == "done"
        harness.work_off()
        harness.check_complete(suspect, PROMPTS[:3])
        harness.check_complete(other, PROMPTS)


def test_a_suspect_chunk_waits_until_nothing_else_runs(
    database: Database, make_settings: MakeSettings
) -> None:
    other = store_job(database, PROMPTS[:4], priority=1)
    suspect = store_job(database, PROMPTS[:3])
    _count_two_deaths(database, suspect)
    engine = FakeEngine()
    with open_harness(database, make_settings(), engine) as harness:
        engine.hang()
        first = harness.wake()
        wait_until(lambda: engine.stats().running == 4)
        assert harness.wake().result(10) == "nothing"
        assert harness.states(suspect) == ["queued"]
        engine.go_on()
        assert first.result(10) == "done"
        assert harness.work_off() == ["done"]
        assert harness.job_state(suspect) == harness.job_state(other) == "completed"


def test_a_drain_in_the_middle_saves_what_finished_and_returns_the_rest(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(
        database, PROMPTS, params={"max_tokens": 100}, own_params={0: {"max_tokens": 2}}
    )
    engine = FakeEngine(step_seconds=0.02)
    settings = make_settings(save_seconds=30)
    with open_harness(database, settings, engine) as harness:
        wakes = [harness.wake(), harness.wake()]
        wait_until(lambda: engine.stats().running == 7, what="the first to finish")
        started = time.monotonic()
        harness.drain()
        assert [wake.result(10) for wake in wakes] == ["returned", "returned"]
        assert time.monotonic() - started < 2
        assert [row.number for row in harness.results(job)] == [0]
        rows = harness.chunks(job)
        assert [chunk.state for chunk in rows] == ["queued"] * 3
        assert [chunk.deaths for chunk in rows] == [0, 0, 0]
        assert [chunk.done for chunk in rows] == [1, 0, 0]
        assert harness.wake().result(5) == "draining"
    with open_harness(database, settings) as harness:
        harness.work_off()
        assert harness.job_state(job) == "completed"
        assert len(harness.results(job)) == 10


def test_a_claim_under_way_when_the_drain_begins_is_handed_back(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, PROMPTS)
    reached, go_on = threading.Event(), threading.Event()
    with open_harness(sqlite_database, make_settings()) as harness:
        prepare = harness.preparer.prepare_each

        def slowly(*given: Any) -> list[PreparedRequest]:
            reached.set()
            go_on.wait(10)
            return prepare(*given)

        harness.preparer.prepare_each = slowly  # type: ignore[method-assign]
        wake = harness.wake()
        assert reached.wait(5)
        harness.drain()
        go_on.set()
        assert wake.result(10) == "returned"
        assert set(harness.states(job)) == {"queued"}
        assert harness.engine.added == 0


def test_a_claim_whose_answer_was_lost_is_returned_by_the_watch(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(database, PROMPTS, chunk_size=5)
    opened = troubled(database)
    settings = make_settings(watch_seconds=0.1)
    with open_harness(opened, settings, watching=True) as harness:
        harness.engine.hang()
        opened.lost_answers = 1
        wake = harness.wake()
        wait_until(lambda: harness.states(job) == ["queued", "running"], what="the return")
        harness.engine.go_on()
        assert wake.result(10) == "done"
        harness.work_off()
        harness.check_complete(job, PROMPTS)
        assert max(chunk.deaths for chunk in harness.chunks(job)) == 0
    opened.close()


def test_a_worker_that_was_declared_dead_claims_nothing(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, PROMPTS)
    with open_harness(sqlite_database, make_settings()) as harness:
        with sqlite_database.write() as connection:
            leases.leave(connection, harness.identity.id)
        assert harness.wake().result(10) == "nothing"
        assert set(harness.states(job)) == {"queued"}


def test_a_worker_whose_engine_is_broken_claims_nothing(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, PROMPTS)
    with open_harness(sqlite_database, make_settings()) as harness:
        harness.engine.break_down()
        assert harness.wake().result(10) == "nothing"
        assert set(harness.states(job)) == {"queued"}


def test_a_wake_up_while_the_database_is_away_is_no_error(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, PROMPTS)
    database = troubled(sqlite_database)
    with open_harness(database, make_settings()) as harness:
        database.away = True
        wake = harness.wake()
        time.sleep(0.2)
        assert not wake.done(), "it is patient"
        started = time.monotonic()
        harness.draining.set()
        assert wake.result(10) == "database down"
        assert time.monotonic() - started < 2, "but not in a drain"
        database.away = False
        harness.draining.clear()
        harness.work_off()
        harness.check_complete(job, PROMPTS)
    database.close()


def test_an_error_between_claim_and_engine_returns_the_chunk(
    sqlite_database: Database, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.chunks.task._FAILED_PAUSE", 0.01)
    job = store_job(sqlite_database, PROMPTS[:4])
    database = troubled(sqlite_database)

    def fail() -> None:
        raise ZeroDivisionError

    with open_harness(database, make_settings()) as harness:
        database.on_read = fail
        assert harness.wake().result(10) == "returned"
        database.on_read = None
        (chunk,) = harness.chunks(job)
        assert (chunk.state, chunk.deaths) == ("queued", 0)
        harness.work_off()
        harness.check_complete(job, PROMPTS[:4])
    database.close()


def test_a_wake_up_that_cannot_be_published_is_no_error(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, PROMPTS)
    with open_harness(sqlite_database, make_settings()) as harness:

        def broken(key: str) -> int:
            raise ConnectionResetError("redis")

        harness.dispatcher.top_up = broken  # type: ignore[method-assign]
        assert harness.work_off() == ["done"] * 3
        harness.check_complete(job, PROMPTS)


def test_of_a_half_done_chunk_only_what_lacks_results_is_computed(
    database: Database, make_settings: MakeSettings
) -> None:
    """As after a worker that was killed between two saves."""
    job = store_job(database, PROMPTS, chunk_size=10)
    engine = FakeEngine()
    with open_harness(database, make_settings(save_samples=1), engine) as harness:
        run = harness.claim()
        pending = harness.preparer.prepare_each(run.claim, _load(database, run.claim))
        harness.writer.loaded(run, 10)
        for prepared in pending[:4]:
            harness.runner._add(run, prepared, prepared.engine_request)  # type: ignore[arg-type]
        wait_until(lambda: len(harness.results(job)) == 4)
        with database.write() as connection:
            connection.execute(
                update(Chunk)
                .where(Chunk.job_id == job)
                .values(state="queued", worker_id=None, deaths=1)
            )
        run.abort(lost=True)
        harness.writer.aborted(run, 6)
        assert run.ended.wait(5)
        assert engine.added == 4
        harness.work_off()
        assert engine.added == 10
        harness.check_complete(job, PROMPTS)


def _load(database: Database, claim: chunks.Claim) -> list[chunks.PendingRequest]:
    with database.read() as connection:
        return chunks.load_pending(
            connection,
            job_id=claim.job_id,
            first_position=claim.first_position,
            count=claim.count,
            pass_=claim.pass_,
            only_code=claim.only_code,
        )


def test_a_retry_computes_only_what_failed_and_replaces_it(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(database, PROMPTS, chunk_size=5)
    engine = FakeEngine()
    doomed = {tuple(byte_text().encode(PROMPTS[number], False)) for number in (1, 7)}
    engine.fails = lambda request: (
        ("out_of_memory", "too big") if request.prompt_token_ids in doomed else None
    )
    with open_harness(database, make_settings(), engine) as harness:
        harness.work_off()
        assert sum(chunk.failed for chunk in harness.chunks(job)) == 2
        with database.write() as connection:
            assert store.retry(connection, job, only_code=None, chunk_size=5) == 2
        assert harness.job_state(job) == "running"
        engine.fails = lambda request: None
        before = engine.added
        harness.work_off()
        assert engine.added - before == 2
        harness.check_complete(job, PROMPTS)


def test_a_cancelled_job_keeps_what_finished(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(database, PROMPTS, chunk_size=5)
    with open_harness(database, make_settings(watch_seconds=0.1), watching=True) as harness:
        assert harness.wake().result(10) == "done"
        harness.engine.hang()
        wake = harness.wake()
        wait_until(lambda: harness.engine.stats().running == 5)
        with database.write() as connection:
            store.cancel(connection, job)
        assert wake.result(5) == "returned"
        assert harness.states(job) == ["done", "cancelled"]
        assert len(harness.results(job)) == 5
        assert harness.job_state(job) == "cancelled"
