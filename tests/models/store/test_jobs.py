"""The state table of jobs: each state, each action, what comes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, update

from models.base import db_now
from models.database import Database
from models.job import JOB_STATES, Chunk, Job
from models.store import jobs
from nightherd.errors import ConflictError, NightherdError, NotFoundError
from tests.seeding import (
    check_sums,
    claim,
    job,
    job_chunks,
    make_job,
    make_worker,
    save,
    statements,
    work_off,
)


def in_state(database: Database, state: str, *, failing: bool = False) -> str:
    """A job of two chunks that came into this state on the usual way."""
    job_id = make_job(database, 8, storing=state == "storing")
    if state in ("storing", "queued"):
        return job_id
    worker = make_worker(database)
    held = claim(database, worker, only_job=job_id)
    save(database, worker, held, failing={0: "engine_error"} if failing else {})
    if state == "completed":
        work_off(database, worker, only_job=job_id)
    with database.write() as connection:
        if state == "paused":
            jobs.pause(connection, job_id)
        elif state == "cancelled":
            jobs.cancel(connection, job_id)
        elif state == "expired":
            connection.execute(update(Job).values(deadline=db_now(-1)))
            assert jobs.expire_overdue(connection) == [job_id]
    assert job(database, job_id).state == state
    return job_id


def retry(connection: Connection, job_id: str) -> int:
    return jobs.retry(connection, job_id, only_code=None, chunk_size=4)


def raise_priority(connection: Connection, job_id: str) -> None:
    jobs.change(connection, job_id, {"priority": 5})


REFUSED, UNKNOWN = ConflictError, NotFoundError

TABLE: dict[str, tuple[Callable[[Connection, str], Any], dict[str, tuple[Any, str]]]] = {
    "cancel": (
        jobs.cancel,
        {
            "storing": (UNKNOWN, "storing"),
            "queued": (True, "cancelled"),
            "running": (True, "cancelled"),
            "paused": (True, "cancelled"),
            "completed": (REFUSED, "completed"),
            "cancelled": (False, "cancelled"),
            "expired": (REFUSED, "expired"),
        },
    ),
    "pause": (
        jobs.pause,
        {
            "storing": (UNKNOWN, "storing"),
            "queued": (True, "paused"),
            "running": (True, "paused"),
            "paused": (False, "paused"),
            "completed": (REFUSED, "completed"),
            "cancelled": (REFUSED, "cancelled"),
            "expired": (REFUSED, "expired"),
        },
    ),
    "resume": (
        jobs.resume,
        {
            "storing": (UNKNOWN, "storing"),
            "queued": (False, "queued"),
            "running": (False, "running"),
            "paused": (True, "running"),
            "completed": (REFUSED, "completed"),
            "cancelled": (REFUSED, "cancelled"),
            "expired": (REFUSED, "expired"),
        },
    ),
    "change": (
        raise_priority,
        {
            "storing": (UNKNOWN, "storing"),
            "queued": (None, "queued"),
            "running": (None, "running"),
            "paused": (None, "paused"),
            "completed": (REFUSED, "completed"),
            "cancelled": (REFUSED, "cancelled"),
            "expired": (REFUSED, "expired"),
        },
    ),
    "retry": (
        retry,
        {
            "storing": (UNKNOWN, "storing"),
            "queued": (0, "queued"),
            "running": (1, "running"),
            "paused": (1, "paused"),
            "completed": (1, "running"),
            "cancelled": (REFUSED, "cancelled"),
            "expired": (REFUSED, "expired"),
        },
    ),
}


@pytest.mark.parametrize("state", JOB_STATES)
@pytest.mark.parametrize("action", TABLE)
def test_the_state_table(sqlite_database: Database, action: str, state: str) -> None:
    database = sqlite_database
    act, expected = TABLE[action]
    answer, after = expected[state]
    job_id = in_state(database, state, failing=True)

    def attempt() -> Any:
        with database.write() as connection:
            return act(connection, job_id)

    if isinstance(answer, type) and issubclass(answer, NightherdError):
        before = [tuple(job(database, job_id)), *map(tuple, job_chunks(database, job_id))]
        with pytest.raises(answer, match=job_id) as refusal:
            attempt()
        assert (state in str(refusal.value)) == (answer is ConflictError)
        assert [tuple(job(database, job_id)), *map(tuple, job_chunks(database, job_id))] == before
    else:
        assert attempt() == answer
    row = job(database, job_id)
    assert row.state == after
    assert (row.finished_at is not None) == (after in ("completed", "cancelled", "expired"))
    if state != "storing":
        check_sums(database, job_id)


@pytest.mark.parametrize("action", TABLE)
def test_a_job_that_is_not_there(database: Database, action: str) -> None:
    with pytest.raises(NotFoundError, match="nightherd jobs"), database.write() as connection:
        TABLE[action][0](connection, "nosuchjob1")


def test_a_paused_job_that_had_not_started_is_queued_again(database: Database) -> None:
    job_id = make_job(database)
    with database.write() as connection:
        jobs.pause(connection, job_id)
        assert jobs.resume(connection, job_id)
    assert job(database, job_id).state == "queued"


@pytest.mark.parametrize("action", ["cancel", "expire"])
def test_an_early_end_takes_the_queued_chunks_and_leaves_the_running(
    database: Database, action: str
) -> None:
    job_id, other = make_job(database, 16), make_job(database, 4)
    worker = make_worker(database)
    save(database, worker, claim(database, worker))
    claim(database, worker)
    with database.write() as connection:
        if action == "cancel":
            jobs.cancel(connection, job_id)
        else:
            jobs.change(connection, job_id, {"deadline": datetime.now(UTC) - timedelta(hours=1)})
            assert jobs.expire_overdue(connection) == [job_id]
            assert jobs.expire_overdue(connection) == []
    states = [row.state for row in job_chunks(database, job_id)]
    assert states == ["done", "running", "cancelled", "cancelled"]
    assert job_chunks(database, other)[0].state == "queued"
    assert check_sums(database, job_id)["done"] == 4


@pytest.mark.parametrize("state", ["queued", "running", "paused"])
def test_a_deadline_ends_any_open_job(database: Database, state: str) -> None:
    job_id = in_state(database, state)
    with database.write() as connection:
        jobs.change(connection, job_id, {"deadline": datetime.now(UTC) + timedelta(hours=1)})
        assert jobs.expire_overdue(connection) == []
        connection.execute(update(Job).values(deadline=db_now(-0.001)))
        assert jobs.expire_overdue(connection) == [job_id]
    assert job(database, job_id).state == "expired"


@pytest.mark.parametrize("state", ["completed", "cancelled", "expired", "storing"])
def test_a_deadline_does_nothing_to_any_other(database: Database, state: str) -> None:
    job_id = in_state(database, state)
    with database.write() as connection:
        connection.execute(update(Job).values(deadline=db_now(-1)))
        assert jobs.expire_overdue(connection) == []
    assert job(database, job_id).state == state


def test_what_is_changed_and_unset(database: Database) -> None:
    job_id = make_job(database)
    later = datetime.now(UTC).replace(microsecond=123456) + timedelta(days=1)
    with database.write() as connection:
        jobs.change(connection, job_id, {"deadline": later, "not_before": later, "priority": -3})
    row = job(database, job_id)
    assert (row.deadline, row.not_before, row.priority) == (later, later, -3)
    with database.write() as connection:
        jobs.change(connection, job_id, {"deadline": None})
    assert job(database, job_id).deadline is None


def test_the_tick_completes_only_open_jobs_without_an_open_chunk(database: Database) -> None:
    ids = {state: in_state(database, state) for state in JOB_STATES if state != "expired"}
    with database.write() as connection, statements(database) as seen:
        assert jobs.complete_all(connection) == []
    assert len(seen) == 1
    with database.write() as connection:
        # As two that ended the last two chunks at once would leave it without the job's lock.
        connection.execute(
            update(Chunk)
            .where(Chunk.job_id.in_([ids["running"], ids["paused"]]))
            .values(state="done")
        )
        expected = sorted([ids["running"], ids["paused"]])
        assert jobs.complete_all(connection) == expected
        assert jobs.complete_all(connection) == []
    for state in ("storing", "queued", "cancelled"):
        assert job(database, ids[state]).state == state


def test_actions_of_many_users_at_once_leave_one_consistent_job(database: Database) -> None:
    """Cancel, pause, resume, retry and expiry race: each waits for the job's row."""
    job_id = make_job(database, 16, chunk_size=2)
    worker = make_worker(database)
    save(database, worker, claim(database, worker), failing={0: "engine_error"})
    acts: list[Callable[[Connection, str], Any]] = [
        jobs.pause,
        jobs.resume,
        retry,
        raise_priority,
        jobs.pause,
        jobs.resume,
        jobs.cancel,
        jobs.cancel,
    ]
    start = threading.Barrier(len(acts))

    def run(act: Callable[[Connection, str], Any]) -> Any:
        start.wait()
        try:
            return database.retrying(lambda connection: act(connection, job_id))
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(len(acts)) as pool:
        outcomes = list(pool.map(run, acts))
    assert [outcomes[-1], outcomes[-2]].count(True) == 1
    assert job(database, job_id).state == "cancelled"
    assert {row.state for row in job_chunks(database, job_id)} <= {"done", "cancelled"}
    check_sums(database, job_id)
