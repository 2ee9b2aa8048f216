"""Fault 4: a worker is killed inside the commit of a save, or the commit's answer is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from models.database import Database
from models.store import results
from models.worker import LIVE_WORKER_STATES, Worker
from nightherd.settings import Settings
from tests.conftest import wait_until
from tests.fakes import FakeEngine
from tests.faults.killing import (
    kills,
    postgresql_copy,
    url_of,
    wait_for_rollback,
    wire_to,
    without_kills,
)
from tests.seeding import (
    as_save,
    check_sums,
    claim,
    die,
    job,
    job_chunks,
    job_results,
    make_job,
    make_worker,
    pending_samples,
    result_row,
    work_off,
)
from tests.worker.harness import TroubledDatabase, WorkerHarness, open_harness, store_job, troubled

MakeSettings = Callable[..., Settings]
PROMPTS = [f"prompt {number}" for number in range(8)]


# Killed.


def save_in_child(url: str) -> None:
    """Claims both chunks of the one job; one save has half of the first and ends the second."""
    database = Database(url)
    with without_kills():
        worker = make_worker(database)
        first, second = claim(database, worker), claim(database, worker)
        saves = [
            as_save(
                held,
                [result_row(index) for index, _ in pending_samples(database, held)[:rows]],
                end=end,
            )
            for held, rows, end in ((first, 2, None), (second, 4, "done"))
        ]
    database.retrying(lambda connection: results.save(connection, worker, saves))


def _declare_all_dead(database: Database) -> None:
    """Declares all workers dead that are not so yet."""
    with database.read() as connection:
        alive = select(Worker.id).where(Worker.state.in_(LIVE_WORKER_STATES))
        found = list(connection.execute(alive).scalars())
    for worker in found:
        die(database, worker)


def test_kill9_inside_commit(database: Database) -> None:
    """Results, counters and the chunk's state: both or neither."""
    seen = set()
    job_id = make_job(database, 8)

    def saved() -> tuple[list[tuple[str, int]], int]:
        chunks = [(chunk.state, chunk.done) for chunk in job_chunks(database, job_id)]
        return chunks, len(job_results(database, job_id))

    neither, both = ([("running", 0), ("running", 0)], 0), ([("running", 2), ("done", 4)], 6)
    for point in kills(save_in_child, url_of(database)):
        wait_for_rollback(database)
        found = saved()
        assert found in (neither, both), point
        seen.add(found[1])
        _declare_all_dead(database)
        # The next worker computes what is not there, and nothing twice.
        done = work_off(database, make_worker(database))
        assert sum(held.samples - held.done for held in done) == 8 - found[1], point
        assert job(database, job_id).state == "completed", point
        assert check_sums(database, job_id)["done"] == 8, point
        job_id = make_job(database, 8)
    assert seen == {0, 6}
    assert saved() == both


def work_in_child(url: str, home: str) -> None:
    """A whole worker but for Celery works off what there is."""
    with without_kills():
        harness = WorkerHarness(Database(url), _settings(home), FakeEngine())
        harness.open()
    harness.work_off()


def _settings(home: str) -> Settings:
    return Settings.model_validate({"home": home, "save_samples": 2, "save_seconds": 0.2})


@pytest.mark.faults
def test_kill9_at_every_statement_of_a_worker(database: Database, tmp_path: Path) -> None:
    """Claim, load, facts, saves, end: wherever it dies, the next one does the rest alone."""
    home = str(tmp_path / "home")
    points = 0
    computed = set()
    job_id = store_job(database, PROMPTS[:4])
    for point in kills(work_in_child, url_of(database), home):
        points += 1
        wait_for_rollback(database)
        there = len(job_results(database, job_id))
        assert sum(chunk.done for chunk in job_chunks(database, job_id)) == there, point
        _declare_all_dead(database)
        with open_harness(database, _settings(home)) as harness:
            harness.work_off()
            assert harness.engine.added == 4 - there, point
            harness.check_complete(job_id, PROMPTS[:4])
        computed.add(4 - there)
        job_id = store_job(database, PROMPTS[:4])
    assert points > 25
    assert {0, 2, 4} <= computed


# The answer is lost.


@pytest.fixture
def trouble(sqlite_database: Database) -> Iterator[TroubledDatabase]:
    opened = troubled(sqlite_database)
    yield opened
    opened.close()


def _loses_answers(database: Database, settings: Settings, lose: Callable[[], Any]) -> None:
    """A worker whose saves take place, and are not answered."""
    store_job(database, PROMPTS[:1], samples=2)
    engine = FakeEngine()
    with open_harness(database, settings, engine) as harness:
        # Parameters and provenance are there before: the answers are those to results.
        harness.work_off()
        job_id = store_job(database, PROMPTS, chunk_size=4, samples=2)
        engine.hang()
        wakes = [harness.wake(), harness.wake()]
        wait_until(lambda: engine.stats().running == 16)
        lose()
        engine.go_on()
        for wake in wakes:
            wake.result(20)
        # `returned` or `done`: an end whose answer was lost looks like a chunk that was lost.
        harness.check_complete(job_id, PROMPTS, samples=2)
        assert engine.added == 1 + 8


@pytest.mark.parametrize("answers", [1, 2, 4])
def test_the_connection_dies_after_the_commit_and_before_its_answer(
    postgresql: str, postgresql_template: str, make_settings: MakeSettings, answers: int
) -> None:
    with (
        postgresql_copy(postgresql, postgresql_template) as url,
        wire_to(url) as wire,
        contextlib.closing(Database(wire.url, pool_size=10)) as database,
    ):

        def lose() -> None:
            wire.lose_answers = answers

        _loses_answers(database, make_settings(save_samples=4), lose)
        assert wire.lose_answers == 0


@pytest.mark.parametrize("answers", [1, 2, 4])
def test_the_answer_to_a_commit_is_lost_on_sqlite(
    trouble: TroubledDatabase, make_settings: MakeSettings, answers: int
) -> None:
    def lose() -> None:
        trouble.lost_answers = answers

    _loses_answers(trouble, make_settings(save_samples=4), lose)
    assert trouble.lost_answers == 0
