"""How far jobs are: in a few statements, however many requests there are."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Connection, update

from models.database import Database
from models.store import jobs, leases
from models.worker import Worker
from nightherd.errors import NotFoundError
from producer.jobs.follow import exit_code, follow
from producer.jobs.status import (
    JobView,
    failures_by_code,
    job_view,
    job_views,
    latest_job,
    serving_workers,
    worker_views,
)
from tests.seeding import (
    KEY,
    claim,
    die,
    job_chunks,
    make_job,
    make_worker,
    save,
    statements,
    work_off,
)


def view(database: Database, job_id: str) -> JobView:
    with database.read() as connection:
        return job_view(connection, job_id)


def set_speed(database: Database, worker: str, speed: float) -> None:
    with database.write() as connection:
        connection.execute(update(Worker).where(Worker.id == worker).values(speed=speed))


def test_a_new_job(database: Database) -> None:
    job_id = make_job(database, 10, samples=2, name="nightly", priority=4)
    seen = view(database, job_id)
    assert (seen.id, seen.name, seen.state, seen.checkpoint) == (job_id, "nightly", "queued", KEY)
    assert (seen.requests, seen.samples, seen.done, seen.failed, seen.pending) == (10, 20, 0, 0, 20)
    assert (seen.chunks_queued, seen.chunks_running, seen.priority, seen.seed) == (3, 0, 4, 7)
    assert (seen.workers, seen.workers_serving, seen.tokens_per_second) == (0, 0, 0.0)
    assert seen.seconds_left is None
    assert seen.open
    assert abs(seen.database_now - datetime.now(UTC)) < timedelta(seconds=30)


def test_progress_is_what_the_chunks_sum_to(database: Database) -> None:
    job_id = make_job(database, 12, samples=2)
    worker = make_worker(database)
    save(database, worker, claim(database, worker), failing={1: "engine_error"})
    save(database, worker, claim(database, worker), only=[4], end=None)
    seen = view(database, job_id)
    assert (seen.state, seen.done, seen.failed, seen.pending) == ("running", 8, 2, 14)
    assert (seen.prompt_tokens, seen.completion_tokens) == (12, 40)
    assert (seen.chunks_queued, seen.chunks_running, seen.workers) == (1, 1, 1)


def test_the_time_left_is_by_speed_and_mean_length(database: Database) -> None:
    """22 samples left of 5 tokens each, at 10 tokens a second."""
    job_id = make_job(database, 24)
    worker = make_worker(database)
    held = claim(database, worker)
    save(database, worker, held, only=[0, 1], end=None)
    assert view(database, job_id).seconds_left is None
    set_speed(database, worker, 10.0)
    seen = view(database, job_id)
    assert seen.tokens_per_second == 10
    assert seen.seconds_left == pytest.approx(11)
    with database.write() as connection:
        jobs.cancel(connection, job_id)
    assert view(database, job_id).seconds_left is None


def test_a_workers_speed_is_shared_out_by_its_chunks(database: Database) -> None:
    first = make_job(database, 12, priority=1)
    second = make_job(database, 4)
    one, two = make_worker(database), make_worker(database, serves=("alias",))
    for _ in range(3):
        claim(database, one)
    claim(database, one)
    set_speed(database, one, 100.0)
    set_speed(database, two, 7.0)
    views = {job_id: view(database, job_id) for job_id in (first, second)}
    assert [seen.tokens_per_second for seen in views.values()] == [75, 25]
    assert [seen.workers for seen in views.values()] == [1, 1]
    assert {seen.workers_serving for seen in views.values()} == {2}


def test_the_dead_neither_serve_nor_speed(database: Database) -> None:
    job_id = make_job(database, 4)
    worker = make_worker(database)
    claim(database, worker)
    set_speed(database, worker, 10.0)
    make_worker(database, key="another")
    assert view(database, job_id).workers_serving == 1
    die(database, worker)
    seen = view(database, job_id)
    assert (seen.workers_serving, seen.workers, seen.tokens_per_second) == (0, 0, 0.0)


def test_statements_do_not_grow_with_jobs_chunks_or_workers(database: Database) -> None:
    job_id = make_job(database, 60, chunk_size=1)
    for _ in range(4):
        make_job(database, 4)
        worker = make_worker(database)
        for _ in range(3):
            save(database, worker, claim(database, worker), failing={0: "engine_error"})
        claim(database, worker)

    def count(work: object) -> int:
        with database.read() as connection, statements(database) as seen:
            work(connection)  # type: ignore[operator]
        return len(seen)

    assert count(lambda c: job_view(c, job_id)) == 3
    assert count(lambda c: job_views(c)) == 3
    assert count(lambda c: job_views(c, open_only=True, limit=2)) == 3
    assert count(lambda c: failures_by_code(c, job_id)) == 1
    assert count(latest_job) == 1
    assert count(lambda c: worker_views(c, include_ended=True)) == 2


def test_status_never_looks_at_requests_and_counts_only_failures(database: Database) -> None:
    job_id = make_job(database, 4)
    with database.read() as connection, statements(database) as seen:
        job_view(connection, job_id)
        failures_by_code(connection, job_id)
    assert not any("requests" in statement.partition("FROM")[2] for statement in seen)
    (only,) = [statement for statement in seen if "FROM results" in statement]
    assert "error_code IS NOT NULL" in only


def test_failures_by_code(database: Database) -> None:
    job_id = make_job(database, 8, samples=2)
    other = make_job(database, 4)
    worker = make_worker(database)
    failing = {0: "out_of_memory", 1: "engine_error", 5: "engine_error"}
    work_off(database, worker, only_job=job_id, failing=failing)
    work_off(database, worker, only_job=other, failing={0: "poison"})
    with database.read() as connection:
        assert failures_by_code(connection, job_id) == {"engine_error": 4, "out_of_memory": 2}
        assert failures_by_code(connection, other) == {"poison": 1}


def test_lists_are_newest_first(database: Database) -> None:
    ids = [make_job(database, 1) for _ in range(4)]
    make_job(database, 1, storing=True)
    work_off(database, make_worker(database), only_job=ids[1])
    with database.read() as connection:
        assert [seen.id for seen in job_views(connection)] == ids[::-1]
        assert [seen.id for seen in job_views(connection, limit=2)] == ids[:1:-1]
        assert [seen.id for seen in job_views(connection, open_only=True)] == [
            ids[3],
            ids[2],
            ids[0],
        ]
        assert job_views(connection, []) == []
        assert latest_job(connection) == ids[3]


def test_no_jobs_and_no_such_job(database: Database) -> None:
    with database.read() as connection:
        assert job_views(connection) == []
        assert latest_job(connection) is None
        with pytest.raises(NotFoundError, match="nightherd jobs"):
            job_view(connection, "nosuch")


def test_as_json(database: Database) -> None:
    job_id = make_job(database, 4, deadline=datetime.now(UTC) + timedelta(hours=1))
    out = view(database, job_id).as_json()
    assert json.loads(json.dumps(out)) == out
    assert out["pending"] == 4
    assert datetime.fromisoformat(out["created_at"]).tzinfo is not None
    assert "database_now" not in out


@pytest.mark.parametrize(("failing", "code"), [({}, 0), ({0: "engine_error"}, 5)])
def test_following_a_job_to_its_end(database: Database, failing: dict[int, str], code: int) -> None:
    job_id = make_job(database, 8)
    worker = make_worker(database)
    states: list[str] = []

    def step(seen: JobView) -> None:
        states.append(seen.state)
        held = claim(database, worker) if seen.open else None
        if held is not None:
            save(database, worker, held, failing=failing)

    seen = follow(database, job_id, poll_seconds=0.01, on_poll=step)
    assert states == ["queued", "running", "completed"]
    assert exit_code(seen) == code


@pytest.mark.parametrize("state", ["cancelled", "expired"])
def test_a_job_that_ended_early_has_a_code_of_its_own(database: Database, state: str) -> None:
    job_id = make_job(database, 8)
    with database.write() as connection:
        jobs._end_early(connection, job_id, state)
    assert exit_code(follow(database, job_id)) == 6


# Workers.


def workers(database: Database, **options: bool) -> list[tuple[str, str, int]]:
    with database.read() as connection:
        return [(one.id, one.state, one.chunks) for one in worker_views(connection, **options)]


def test_workers_oldest_first(database: Database) -> None:
    make_job(database, 12)
    first = make_worker(database)
    second = make_worker(database, serves=("alias",), only_job="j", slots=2)
    third = make_worker(database, lease_seconds=-5)
    fourth = make_worker(database)
    with database.write() as connection:
        leases.leave(connection, fourth)
    claim(database, second)
    claim(database, second)
    live = [(first, "ready", 0), (second, "ready", 2), (third, "lapsed", 0)]
    assert workers(database) == live
    assert workers(database, include_ended=True) == [*live, (fourth, "stopped", 0)]
    with database.read() as connection:
        shown = worker_views(connection)[1]
    assert (shown.serves, shown.only_job, shown.slots) == (["alias", KEY], "j", 2)
    assert 3500 < shown.lease_seconds_left <= 3600
    assert json.loads(json.dumps(shown.as_json())) == shown.as_json()


def test_who_takes_any_job_of_a_checkpoint(database: Database) -> None:
    good = [make_worker(database), make_worker(database, state="starting")]
    good.append(make_worker(database, key="another", serves=(KEY,)))
    make_worker(database, only_job="j")
    make_worker(database, state="draining")
    make_worker(database, lease_seconds=-1)
    make_worker(database, key="another")

    def serving(connection: Connection) -> list[str]:
        return serving_workers(connection, KEY)

    with database.read() as connection:
        assert serving(connection) == sorted(good)


def test_a_retry_is_pending_again(database: Database) -> None:
    job_id = make_job(database, 4)
    work_off(database, make_worker(database), failing={2: "engine_error"})
    with database.write() as connection:
        jobs.retry(connection, job_id, only_code=None, chunk_size=4)
    seen = view(database, job_id)
    assert (seen.state, seen.done, seen.failed, seen.pending) == ("running", 3, 0, 1)
    assert len(job_chunks(database, job_id)) == 2
