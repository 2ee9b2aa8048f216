"""Retry: failed samples run again in a new pass, and every count stays right."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from models.base import db_now
from models.database import Database
from models.job import Result
from models.store import jobs
from nightherd.errors import ConflictError
from tests.seeding import (
    check_sums,
    claim,
    job,
    job_chunks,
    job_results,
    make_job,
    make_worker,
    pending_samples,
    save,
    try_claim,
    work_off,
)

BAD, WORSE = "engine_error", "out_of_memory"


def retry(
    database: Database, job_id: str, only_code: str | None = None, *, chunk_size: int = 4
) -> int:
    with database.write() as connection:
        return jobs.retry(connection, job_id, only_code=only_code, chunk_size=chunk_size)


def of_pass(database: Database, job_id: str, pass_: int) -> list[tuple[int, int, int]]:
    return [
        (row.first_position, row.size, row.samples)
        for row in job_chunks(database, job_id)
        if row.pass_ == pass_
    ]


def test_failed_samples_move_to_chunks_of_the_next_pass(database: Database) -> None:
    job_id = make_job(database, 12, chunk_size=3, samples=2)
    worker = make_worker(database)
    work_off(database, worker, failing={1: BAD, 2: BAD, 10: WORSE})
    assert job(database, job_id).state == "completed"
    assert check_sums(database, job_id)["failed"] == 6

    assert retry(database, job_id, chunk_size=2) == 6
    assert of_pass(database, job_id, 2) == [(1, 2, 4), (10, 1, 2)]
    row = job(database, job_id)
    assert (row.state, row.finished_at) == ("running", None)
    sums = check_sums(database, job_id)
    assert (sums["done"], sums["failed"]) == (18, 0)
    # The old errors stay until the new results are there.
    assert sum(code != "ok" for code in job_results(database, job_id).values()) == 6

    held = claim(database, worker)
    assert (held.pass_, pending_samples(database, held)) == (2, [(1, 0), (1, 1), (2, 0), (2, 1)])
    save(database, worker, held, failing={2: BAD})
    work_off(database, worker)
    assert job(database, job_id).state == "completed"
    assert check_sums(database, job_id)["failed"] == 2
    stored = job_results(database, job_id)
    assert len(stored) == 24
    assert {sample for sample, code in stored.items() if code != "ok"} == {(2, 0), (2, 1)}
    with database.read() as connection:
        query = select(Result.index, Result.pass_).where(Result.sample == 0)
        passes = dict(connection.execute(query).all())
    assert passes == {**dict.fromkeys(range(12), 1), 1: 2, 2: 2, 10: 2}


def test_retries_of_a_retry(database: Database) -> None:
    """A third pass takes what failed in the second and what the second left of the first."""
    job_id = make_job(database, 8)
    worker = make_worker(database)
    work_off(database, worker, failing={0: BAD, 3: WORSE, 4: BAD, 6: WORSE})
    assert retry(database, job_id, BAD) == 2
    work_off(database, worker, failing={4: WORSE})
    assert check_sums(database, job_id)["failed"] == 3
    assert retry(database, job_id, BAD) == 0
    assert job(database, job_id).state == "completed"
    assert retry(database, job_id) == 3
    assert of_pass(database, job_id, 3) == [(3, 4, 3)]
    (held,) = work_off(database, worker)
    assert held.samples == 3
    assert check_sums(database, job_id)["done"] == 8
    assert set(job_results(database, job_id).values()) == {"ok"}


def test_only_one_code(database: Database) -> None:
    job_id = make_job(database, 8)
    worker = make_worker(database)
    work_off(database, worker, failing={1: BAD, 2: WORSE, 6: BAD})
    assert retry(database, job_id, BAD) == 2
    assert of_pass(database, job_id, 2) == [(1, 6, 2)]
    held = claim(database, worker)
    assert (held.only_code, pending_samples(database, held)) == (BAD, [(1, 0), (6, 0)])
    save(database, worker, held)
    assert job_results(database, job_id)[2, 0] == WORSE
    assert check_sums(database, job_id)["failed"] == 1
    assert job(database, job_id).state == "completed"


def test_nothing_failed(database: Database) -> None:
    job_id = make_job(database, 2)
    assert retry(database, job_id) == 0
    work_off(database, make_worker(database))
    assert retry(database, job_id) == 0
    row = job(database, job_id)
    assert row.state == "completed"
    assert row.finished_at is not None


def test_a_repeated_retry_doubles_nothing(database: Database) -> None:
    """The answer to the commit was lost, or the user was impatient."""
    job_id = make_job(database, 8)
    worker = make_worker(database)
    work_off(database, worker, failing={1: BAD, 5: BAD, 6: BAD})
    assert [retry(database, job_id, chunk_size=2) for _ in range(3)] == [3, 3, 3]
    assert of_pass(database, job_id, 2) == [(1, 5, 2), (6, 1, 1)]
    save(database, worker, claim(database, worker))
    assert retry(database, job_id) == 1
    with pytest.raises(ConflictError, match="another retry"):
        retry(database, job_id, BAD)
    check_sums(database, job_id)


def test_a_retry_while_the_first_pass_goes_on(database: Database) -> None:
    """No chunk of the retry may reach over an open one: both would count its failures."""
    job_id = make_job(database, 12, chunk_size=2)
    worker = make_worker(database)
    held = [claim(database, worker) for _ in range(5)]
    for number in (0, 1, 3, 4):
        save(database, worker, held[number], failing={2: BAD, 3: BAD, 6: BAD, 9: BAD})
    save(database, worker, held[2], only=[4], failing={4: BAD}, end="return")
    assert retry(database, job_id, chunk_size=100) == 4
    assert of_pass(database, job_id, 2) == [(2, 2, 2), (6, 4, 2)]
    check_sums(database, job_id)
    again = claim(database, worker)
    assert (again.chunk_id, pending_samples(database, again)) == (held[2].chunk_id, [(5, 0)])
    save(database, worker, again, failing={5: BAD})
    check_sums(database, job_id)
    # Not part of the retry that runs, whose count is what it has left.
    assert retry(database, job_id) == 4
    work_off(database, worker)
    assert job(database, job_id).state == "completed"
    assert check_sums(database, job_id)["failed"] == 2
    assert retry(database, job_id) == 2
    work_off(database, worker)
    assert check_sums(database, job_id)["done"] == 12


def test_a_retry_that_is_handed_back_goes_on_where_it_was(database: Database) -> None:
    job_id = make_job(database, 4)
    worker = make_worker(database)
    work_off(database, worker, failing=dict.fromkeys(range(4), BAD))
    assert retry(database, job_id) == 4
    held = claim(database, worker)
    save(database, worker, held, only=[0, 1], failing={1: BAD}, end="return")
    held = claim(database, worker)
    assert pending_samples(database, held) == [(2, 0), (3, 0)]
    assert (held.done, held.failed) == (1, 1)
    save(database, worker, held)
    assert check_sums(database, job_id)["failed"] == 1


def test_one_chunk_of_a_retry_never_spans_too_much(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim reads its whole range: rare failures must not make that a whole job."""
    monkeypatch.setattr(jobs, "_MAX_SPAN", 6)
    job_id = make_job(database, 20)
    work_off(database, make_worker(database), failing={0: BAD, 5: BAD, 6: BAD, 19: BAD})
    assert retry(database, job_id, chunk_size=100) == 4
    assert of_pass(database, job_id, 2) == [(0, 6, 2), (6, 1, 1), (19, 1, 1)]


def test_a_paused_job_stays_paused(database: Database) -> None:
    job_id = make_job(database, 8)
    worker = make_worker(database)
    save(database, worker, claim(database, worker), failing={1: BAD})
    with database.write() as connection:
        jobs.pause(connection, job_id)
    assert retry(database, job_id) == 1
    assert job(database, job_id).state == "paused"
    assert try_claim(database, worker) == "nothing"
    with database.write() as connection:
        jobs.resume(connection, job_id)
    work_off(database, worker)
    assert job(database, job_id).state == "completed"


def test_a_deadline_that_has_passed_does_not_expire_the_retry(database: Database) -> None:
    job_id = make_job(database, 2)
    worker = make_worker(database)
    work_off(database, worker, failing={1: BAD})
    with database.write() as connection:
        connection.execute(
            jobs.Job.__table__.update().values(deadline=db_now(-60))  # it was done in time
        )
    assert retry(database, job_id) == 1
    with database.write() as connection:
        assert jobs.expire_overdue(connection) == []
    work_off(database, worker)
    assert job(database, job_id).state == "completed"


@pytest.mark.parametrize("running", [False, True])
def test_a_cancelled_retry_leaves_the_failures_failed(database: Database, running: bool) -> None:
    job_id = make_job(database, 8)
    worker = make_worker(database)
    work_off(database, worker, failing=dict.fromkeys(range(4), BAD))
    assert retry(database, job_id) == 4
    held = claim(database, worker) if running else None
    with database.write() as connection:
        jobs.cancel(connection, job_id)
    if held is not None:
        save(database, worker, held, only=[0], end="return")
    sums = check_sums(database, job_id)
    failed = 3 if running else 4
    assert (sums["done"], sums["failed"]) == (8 - failed, failed)
    assert {row.state for row in job_chunks(database, job_id)} == {"done", "cancelled"}


@pytest.mark.parametrize("state", ["cancelled", "expired"])
def test_a_job_that_ended_early_is_not_retried(database: Database, state: str) -> None:
    job_id = make_job(database, 8)
    worker = make_worker(database)
    save(database, worker, claim(database, worker), failing={1: BAD})
    with database.write() as connection:
        jobs._end_early(connection, job_id, state)
    with pytest.raises(ConflictError, match="submit what is missing as a new job"):
        retry(database, job_id)
    assert check_sums(database, job_id)["failed"] == 1


def test_a_retry_that_is_rolled_back_leaves_all_as_it_was(database: Database) -> None:
    job_id = make_job(database, 8)
    work_off(database, make_worker(database), failing={1: BAD})
    before = [tuple(row) for row in job_chunks(database, job_id)]
    with pytest.raises(KeyboardInterrupt):
        _interrupted_retry(database, job_id)
    assert [tuple(row) for row in job_chunks(database, job_id)] == before
    assert job(database, job_id).state == "completed"


def _interrupted_retry(database: Database, job_id: str) -> None:
    with database.write() as connection:
        jobs.retry(connection, job_id, only_code=None, chunk_size=4)
        raise KeyboardInterrupt
