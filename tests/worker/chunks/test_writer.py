from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import func, select, update

from models.database import Database
from models.job import Chunk, Job, ParameterSet, Provenance
from models.store import chunks, leases
from nightherd.settings import Settings
from tests.conftest import wait_until
from tests.fakes import FakeEngine, byte_text
from tests.worker.harness import TroubledDatabase, WorkerHarness, open_harness, store_job, troubled
from worker.chunks.inflight import ChunkRun
from worker.engine.interface import Output

MakeSettings = Callable[..., Settings]
PROMPTS = [f"prompt {number}" for number in range(8)]


@pytest.fixture
def trouble(database: Database) -> Iterator[TroubledDatabase]:
    opened = troubled(database)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_trouble(sqlite_database: Database) -> Iterator[TroubledDatabase]:
    opened = troubled(sqlite_database)
    yield opened
    opened.close()


def _give_to_another(harness: WorkerHarness, run: ChunkRun) -> None:
    """As if its worker was declared dead and another one claimed it."""
    with harness.database.write() as connection:
        connection.execute(
            update(Chunk)
            .where(Chunk.id == run.claim.chunk_id)
            .values(worker_id="other", fence=Chunk.fence + 1)
        )


def test_results_counters_and_end_are_saved_together(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(database, PROMPTS, samples=2)
    with open_harness(database, make_settings()) as harness:
        harness.work_off()
        harness.check_complete(job, PROMPTS, samples=2)
        assert harness.completed == [job]
        row = harness.results(job)[0]
        assert row.worker_id == harness.identity.id
        assert 0 <= (row.finished_at - row.started_at).total_seconds() < 5
        assert abs((database.now() - row.finished_at).total_seconds()) < 20


def test_a_chunk_that_was_lost_is_dropped_and_aborted(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(database, PROMPTS[:4])
    engine = FakeEngine(step_seconds=0.01)
    with open_harness(database, make_settings(save_samples=1), engine) as harness:
        engine.hang()
        wake = harness.wake()
        wait_until(lambda: engine.stats().running == 4)
        (run,) = harness.inflight.runs()
        _give_to_another(harness, run)
        engine.go_on()
        assert wake.result(10) == "returned"
        assert run.lost
        assert harness.results(job) == []
        (chunk,) = harness.chunks(job)
        assert (chunk.state, chunk.worker_id, chunk.done) == ("running", "other", 0)


def test_a_lost_chunk_ends_though_the_same_chunk_is_claimed_anew_meanwhile(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    """The writer has both at once, under one chunk id."""
    job = store_job(sqlite_database, PROMPTS[:4])
    with open_harness(sqlite_database, make_settings()) as harness:
        harness.engine.hang()
        first = harness.wake()
        wait_until(lambda: harness.engine.stats().running == 4)
        (run,) = harness.inflight.runs()
        with harness.database.write() as connection:
            connection.execute(
                update(Chunk)
                .where(Chunk.id == run.claim.chunk_id)
                .values(state="queued", worker_id=None)
            )
        # The writer must not get to it before the other comes.
        go_on = threading.Event()
        handle = harness.writer._handle

        def slowly(item: Any) -> None:
            go_on.wait(10)
            handle(item)

        harness.writer._handle = slowly  # type: ignore[method-assign]
        run.abort(lost=True)
        second = harness.wake()
        wait_until(lambda: harness.engine.stats().running == 4)
        harness.engine.go_on()
        go_on.set()
        assert (first.result(10), second.result(10)) == ("returned", "done")
        harness.check_complete(job, PROMPTS[:4])


def test_a_commit_whose_answer_was_lost_is_repeated_without_harm(
    trouble: TroubledDatabase, make_settings: MakeSettings
) -> None:
    job = store_job(trouble, PROMPTS, chunk_size=8)
    engine = FakeEngine(step_seconds=0.01)
    with open_harness(trouble, make_settings(save_samples=2), engine) as harness:
        engine.hang()
        wake = harness.wake()
        wait_until(lambda: engine.stats().running == 8)
        trouble.lost_answers = 3
        engine.go_on()
        assert wake.result(20)
        assert trouble.lost_answers == 0
        harness.check_complete(job, PROMPTS)


@pytest.mark.parametrize("answers", [1, 2, 3])
def test_losing_the_answer_to_the_last_commit_loses_nothing(
    sqlite_trouble: TroubledDatabase, make_settings: MakeSettings, answers: int
) -> None:
    job = store_job(sqlite_trouble, PROMPTS[:4])
    with open_harness(sqlite_trouble, make_settings(save_seconds=30)) as harness:
        harness.engine.hang()
        wake = harness.wake()
        wait_until(lambda: harness.engine.stats().running == 4)
        sqlite_trouble.lost_answers = answers
        harness.engine.go_on()
        wake.result(20)
        harness.check_complete(job, PROMPTS[:4])


def test_results_wait_while_the_database_is_away(
    sqlite_trouble: TroubledDatabase,
    make_settings: MakeSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "nightherd")
    job = store_job(sqlite_trouble, PROMPTS)
    with open_harness(sqlite_trouble, make_settings()) as harness:
        harness.engine.hang()
        wakes = [harness.wake(), harness.wake()]
        wait_until(lambda: harness.engine.stats().running == 8)
        sqlite_trouble.away = True
        harness.engine.go_on()
        time.sleep(3)
        assert not any(wake.done() for wake in wakes)
        sqlite_trouble.away = False
        assert [wake.result(10) for wake in wakes] == ["done", "done"]
        harness.check_complete(job, PROMPTS)
    said = [record.message for record in caplog.records if record.name == "nightherd.writer"]
    assert len([line for line in said if "results wait in memory" in line]) == 1
    assert "the database answers again" in said


def test_what_cannot_be_saved_in_the_drain_is_given_up_in_the_end(
    sqlite_trouble: TroubledDatabase, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_trouble, PROMPTS[:4])
    with open_harness(sqlite_trouble, make_settings()) as harness:
        harness.engine.hang()
        wake = harness.wake()
        wait_until(lambda: harness.engine.stats().running == 4)
        sqlite_trouble.away = True
        harness.engine.go_on()
        harness.drain()
        time.sleep(0.5)
        assert not wake.done()
        harness.writer.abandon()
        assert wake.result(5) == "returned"
        sqlite_trouble.away = False
        assert harness.results(job) == []
        assert harness.states(job) == ["running"], "left to the lease"


def _with_bad_finish_reason(number: int) -> Callable[[Output], Output]:
    """Gives one of the outputs a finish reason that the table refuses."""
    seen = 0

    def change(output: Output) -> Output:
        nonlocal seen
        seen += 1
        if seen == number:
            return dataclasses.replace(output, finish_reason="tired")  # type: ignore[arg-type]
        return output

    return change


def test_a_row_that_the_database_refuses_fails_alone(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(database, PROMPTS)
    engine = FakeEngine()
    engine.finishes = _with_bad_finish_reason(3)
    with open_harness(
        database, make_settings(save_seconds=30, save_samples=100), engine
    ) as harness:
        engine.hang()
        wakes = [harness.wake(), harness.wake()]
        wait_until(lambda: engine.stats().running == 8)
        engine.go_on()
        assert [wake.result(10) for wake in wakes] == ["done", "done"]
        assert harness.job_state(job) == "completed"
        codes = [row.error_code for row in harness.results(job)]
        assert sorted(codes, key=str) == [None] * 7 + ["engine_error"]
        chunks = harness.chunks(job)
        assert sum(chunk.done for chunk in chunks) == 7
        assert sum(chunk.failed for chunk in chunks) == 1
        assert sum(chunk.completion_tokens for chunk in chunks) == 7 * 8


def test_a_refusal_that_no_driver_foresaw_fails_its_row_alone(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    """sqlite3 raises OverflowError, which is none of its own errors."""
    job = store_job(sqlite_database, PROMPTS[:4])
    engine = FakeEngine()
    with open_harness(sqlite_database, make_settings(), engine) as harness:
        result_row = harness.writer._result_row

        def oversized(item: object) -> dict[str, object]:
            row = result_row(item)  # type: ignore[arg-type]
            return {**row, "seed": 2**70} if row["index"] == 1 else row

        harness.writer._result_row = oversized  # type: ignore[assignment, method-assign]
        harness.work_off()
        codes = [row.error_code for row in harness.results(job)]
        assert codes == [None, "engine_error", None, None]
        assert harness.broken == []


def test_a_database_that_goes_away_while_a_bad_row_is_looked_for_fails_no_other(
    sqlite_trouble: TroubledDatabase, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_trouble, PROMPTS[:4])
    engine = FakeEngine()
    engine.finishes = _with_bad_finish_reason(1)
    with open_harness(sqlite_trouble, make_settings(save_seconds=30), engine) as harness:
        engine.hang()
        wake = harness.wake()
        wait_until(lambda: engine.stats().running == 4)
        isolate = harness.writer._isolate_refused_rows

        def isolate_without_database(run: ChunkRun) -> bool:
            sqlite_trouble.away = True
            threading.Timer(1.0, lambda: setattr(sqlite_trouble, "away", False)).start()
            return isolate(run)

        harness.writer._isolate_refused_rows = isolate_without_database  # type: ignore[method-assign]
        engine.go_on()
        assert wake.result(20) == "done"
        codes = [row.error_code for row in harness.results(job)]
        assert sorted(codes, key=str) == [None] * 3 + ["engine_error"]


def test_a_chunk_that_can_never_be_saved_holds_nobody_up(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    """Its counters contradict its size: the table's own check refuses each save."""
    bad = store_job(sqlite_database, PROMPTS[:4], priority=1)
    good = store_job(sqlite_database, PROMPTS)
    with sqlite_database.write() as connection:
        connection.execute(update(Chunk).where(Chunk.job_id == bad).values(samples=3))
    with open_harness(sqlite_database, make_settings()) as harness:
        assert harness.wake().result(20) == "returned"
        assert harness.work_off() == ["done", "done"]
        harness.check_complete(good, PROMPTS)
        assert harness.results(bad) == []
        assert harness.broken == []


def test_nothing_is_written_before_its_time_or_number_has_come(
    sqlite_trouble: TroubledDatabase, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_trouble, PROMPTS, chunk_size=8)
    engine = FakeEngine()
    with open_harness(sqlite_trouble, make_settings(save_samples=3, save_seconds=1.0)) as harness:
        run = harness.claim()
        pending = harness.preparer.prepare_each(run.claim, _pending(harness, run))
        harness.writer.loaded(run, len(pending))

        def answer(first: int, last: int) -> None:
            for prepared in pending[first:last]:
                harness.writer.answer(run, prepared, 0, 1, Output((5,), "length"))

        answer(0, 2)
        time.sleep(0.4)
        assert harness.results(job) == [], "too few, too early"
        wait_until(lambda: len(harness.results(job)) == 2, seconds=3, what="a save after a second")
        answer(2, 5)
        wait_until(lambda: len(harness.results(job)) == 5, seconds=0.8, what="a save of three")
        answer(5, 8)
        assert run.ended.wait(2)
        assert harness.job_state(job) == "completed"
    assert engine.added == 0


def _pending(harness: WorkerHarness, run: ChunkRun) -> list[chunks.PendingRequest]:
    claim = run.claim
    with harness.database.read() as connection:
        return chunks.load_pending(
            connection,
            job_id=claim.job_id,
            first_position=claim.first_position,
            count=claim.count,
            pass_=claim.pass_,
            only_code=claim.only_code,
        )


def test_chunks_that_finish_together_share_a_transaction(
    sqlite_trouble: TroubledDatabase, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_trouble, PROMPTS, chunk_size=2)
    with open_harness(sqlite_trouble, make_settings(save_seconds=30, save_samples=1000)) as harness:
        harness.engine.hang()
        wakes = [harness.wake() for _ in range(4)]
        wait_until(lambda: harness.engine.stats().running == 8)
        sqlite_trouble.away = True
        harness.engine.go_on()
        wait_until(lambda: harness.engine.stats().running == 0)
        time.sleep(0.2)
        writes = sqlite_trouble.writes
        sqlite_trouble.away = False
        assert [wake.result(10) for wake in wakes] == ["done"] * 4
        # One for what the writer was at, one for all that had come meanwhile, and the facts.
        assert sqlite_trouble.writes - writes <= 4
        harness.check_complete(job, PROMPTS)


def test_a_chunk_whose_samples_all_have_results_ends(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    """Its last holder died after the last save and before it could end the chunk."""
    job = store_job(sqlite_database, PROMPTS[:4])
    settings = make_settings()
    with open_harness(sqlite_database, settings) as harness:
        harness.work_off()
        with sqlite_database.write() as connection:
            connection.execute(
                update(Chunk).where(Chunk.job_id == job).values(state="queued", worker_id=None)
            )
            connection.execute(update(Job).where(Job.id == job).values(state="running"))
        added = harness.engine.added
        assert harness.work_off() == ["done"]
        assert harness.engine.added == added
        harness.check_complete(job, PROMPTS[:4])


def test_an_abort_that_races_with_the_last_answer_ends_the_chunk_either_way(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, PROMPTS * 2, chunk_size=1)
    engine = FakeEngine(step_seconds=0.001)
    with open_harness(sqlite_database, make_settings(save_seconds=0.05), engine) as harness:
        for number in range(16):
            ended = len(harness.ended)
            wake = harness.wake()
            while not harness.inflight.runs() and len(harness.ended) == ended:
                time.sleep(0.0001)
            time.sleep(0.0003 * number)
            harness.inflight.abort_all()
            assert wake.result(10) in ("done", "returned")
        harness.work_off()
        harness.check_complete(job, PROMPTS * 2)


def test_facts_are_stored_once_and_before_the_results_that_point_at_them(
    database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(database, PROMPTS, chunk_size=2)
    other = store_job(database, PROMPTS, params={"temperature": 0.5})
    with open_harness(database, make_settings()) as harness:
        harness.work_off()
        for each in (job, other):
            harness.check_complete(each, PROMPTS)
    with database.read() as connection:
        counts = [
            connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in (ParameterSet, Provenance)
        ]
    assert counts == [2, 1]


def test_the_text_of_strange_tokens_is_storable(
    database: Database, make_settings: MakeSettings
) -> None:
    """NUL, which PostgreSQL refuses, and bytes that are no UTF-8."""
    job = store_job(database, PROMPTS[:2])
    engine = FakeEngine()
    with open_harness(database, make_settings(), engine) as harness:
        nul, half = harness.text.encode("\x00", False)[0], harness.text.encode("é", False)[0]
        engine.finishes = lambda output: dataclasses.replace(output, token_ids=(nul, half))
        harness.work_off()
        assert [row.text for row in harness.results(job)] == ["\ufffd\ufffd"] * 2


def test_the_writer_forgets_what_it_has_saved(
    sqlite_database: Database, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.chunks.writer._REMEMBERED_SETS", 5)
    for number in range(12):
        store_job(sqlite_database, PROMPTS[:2], params={"top_k": number + 1})
    with open_harness(sqlite_database, make_settings()) as harness:
        harness.work_off()
        assert len(harness.writer._stored_sets) <= 5
        assert not harness.writer._parameter_sets
        assert not harness.writer._dirty
        assert not harness.inflight.runs()
        assert not any(run.unsaved for run in harness.ended)


def test_a_writer_that_breaks_says_so(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    with open_harness(sqlite_database, make_settings()) as harness:
        harness.writer._inbox.put("nonsense")  # type: ignore[arg-type]
        wait_until(lambda: bool(harness.broken), what="the report")
        assert "writer" in harness.broken[0]


def test_what_a_broken_engine_aborted_stays_claimed_and_what_it_finished_is_saved(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    job = store_job(sqlite_database, PROMPTS[:4])
    engine = FakeEngine(step_seconds=0.05)
    doomed = tuple(byte_text().encode(PROMPTS[0], False))
    engine.fails = lambda request: (
        ("out_of_memory", "too big") if request.prompt_token_ids == doomed else None
    )
    with open_harness(sqlite_database, make_settings(save_seconds=0.1), engine) as harness:
        wake = harness.wake()
        wait_until(lambda: len(harness.results(job)) == 1)
        engine.break_down()
        assert wake.result(5) == "returned"
        assert harness.states(job) == ["running"]
        assert len(harness.results(job)) == 1
        harness.lease.lapse()
        time.sleep(0.01)
        with sqlite_database.write() as connection:
            assert leases.reap(connection, leases.workers_to_reap(connection), poison_deaths=3) == [
                harness.identity.id
            ]
        (chunk,) = harness.chunks(job)
        assert (chunk.state, chunk.deaths, chunk.failed) == ("queued", 1, 1)
