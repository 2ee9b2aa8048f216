"""Claiming: the best chunk, by one worker alone; and which of its samples are pending."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from models.database import Database
from models.job import Chunk
from models.store import chunks, jobs, leases
from models.store.chunks import Claim
from tests.seeding import (
    KEY,
    claim,
    job,
    job_chunks,
    make_job,
    make_worker,
    pending_samples,
    save,
    statements,
    try_claim,
    work_off,
)

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)


def set_deaths(database: Database, chunk_id: int, deaths: int) -> None:
    with database.write() as connection:
        connection.execute(update(Chunk).where(Chunk.id == chunk_id).values(deaths=deaths))


def test_a_claim_holds_the_chunk_under_a_new_fence(database: Database) -> None:
    job_id = make_job(database, 6, params={"n": 1, "temperature": 0.5}, priority=3)
    worker = make_worker(database)
    held = claim(database, worker)
    assert (held.job_id, held.first_position, held.count, held.fence) == (job_id, 0, 4, 1)
    assert (held.pass_, held.samples, held.isolated, held.done) == (1, 4, False, 0)
    assert (held.params, held.seed, held.priority) == ({"n": 1, "temperature": 0.5}, 7, 3)
    first, second = job_chunks(database, job_id)
    assert (first.state, first.worker_id, first.fence) == ("running", worker, 1)
    assert first.claimed_at is not None
    assert second.state == "queued"
    row = job(database, job_id)
    assert row.state == "running"
    assert row.started_at is not None
    with database.read() as connection:
        assert chunks.held_by(connection, worker) == {
            held.chunk_id: chunks.Held(1, job_id, "running", priority=3)
        }
    save(database, worker, held, only=(), end="return")
    assert claim(database, worker).fence == 2


def test_jobs_go_by_priority_then_deadline_then_age(database: Database) -> None:
    def one(**changes: object) -> str:
        return make_job(database, 1, **changes)  # type: ignore[arg-type]

    old, young = one(), one()
    late = one(deadline=NOW + 2 * HOUR)
    soon = one(deadline=NOW + HOUR)
    low = one(priority=-1, deadline=NOW + HOUR)
    high = one(priority=1)
    order = [held.job_id for held in work_off(database, make_worker(database))]
    assert order == [high, soon, late, old, young, low]


def test_chunks_that_saw_a_worker_die_come_last(database: Database) -> None:
    job_id = make_job(database, 12)
    ids = [row.id for row in job_chunks(database, job_id)]
    set_deaths(database, ids[0], 1)
    order = [held.chunk_id for held in work_off(database, make_worker(database))]
    assert order == [ids[1], ids[2], ids[0]]


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "another"},
        {"not_before": NOW + HOUR},
        {"deadline": NOW - HOUR},
    ],
)
def test_what_may_not_be_claimed_is_neither_claimed_nor_counted(
    database: Database, changes: dict[str, object]
) -> None:
    make_job(database, **changes)  # type: ignore[arg-type]
    assert try_claim(database, make_worker(database)) == "nothing"
    with database.read() as connection:
        assert chunks.count_queued(connection, KEY, limit=9) == 0
        assert KEY not in chunks.keys_with_work(connection)


def test_a_job_for_later_becomes_claimable_by_itself(database: Database) -> None:
    make_job(database, 1, not_before=NOW - HOUR, deadline=NOW + HOUR)
    claim(database, make_worker(database))


def test_a_worker_claims_for_each_key_that_it_serves(database: Database) -> None:
    first, second = make_job(database, 1, key="one"), make_job(database, 1, key="two")
    worker = make_worker(database, key="one", serves=("two",))
    with database.write() as connection:
        both = [chunks.claim(connection, worker, keys=["one", "two"]) for _ in range(2)]
    assert [held.job_id for held in both if isinstance(held, Claim)] == [first, second]


def test_a_worker_of_one_job_claims_nothing_else(database: Database) -> None:
    make_job(database, 1, priority=9)
    own = make_job(database, 1)
    worker = make_worker(database, only_job=own)
    assert claim(database, worker, only_job=own).job_id == own
    assert try_claim(database, worker, only_job=own) == "nothing"


@pytest.mark.parametrize("state", ["starting", "draining", "stopped", "dead"])
def test_only_a_ready_worker_claims(database: Database, state: str) -> None:
    job_id = make_job(database)
    worker = make_worker(database, state=state)
    assert try_claim(database, worker) == "not registered"
    assert try_claim(database, "nobody") == "not registered"
    assert {row.state for row in job_chunks(database, job_id)} == {"queued"}
    assert job(database, job_id).state == "queued"


def test_pause_and_cancel_act_on_the_next_claim(database: Database) -> None:
    paused, cancelled = make_job(database, 1), make_job(database, 1)
    with database.write() as connection:
        jobs.pause(connection, paused)
        jobs.cancel(connection, cancelled)
    worker = make_worker(database)
    assert try_claim(database, worker) == "nothing"
    with database.write() as connection:
        jobs.resume(connection, paused)
    assert claim(database, worker).job_id == paused


def test_a_new_priority_acts_on_the_next_claim(database: Database) -> None:
    first, second = make_job(database, 8), make_job(database, 8)
    worker = make_worker(database)
    assert claim(database, worker).job_id == first
    with database.write() as connection:
        jobs.change(connection, second, {"priority": 1})
    assert claim(database, worker).job_id == second


def test_an_isolated_chunk_waits_for_an_idle_worker_and_holds_up_the_rest(
    database: Database,
) -> None:
    job_id = make_job(database, 4)
    make_job(database, 4, priority=-1)
    set_deaths(database, job_chunks(database, job_id)[0].id, chunks.ISOLATE_AFTER_DEATHS)
    worker = make_worker(database)
    assert try_claim(database, worker, idle=False) == "isolated waits"
    assert job_chunks(database, job_id)[0].state == "queued"
    assert claim(database, worker).isolated


def test_a_claim_is_eight_statements_at_most(database: Database) -> None:
    make_job(database)
    worker = make_worker(database)
    with statements(database) as seen:
        claim(database, worker)
    assert len([statement for statement in seen if statement != "BEGIN IMMEDIATE"]) == 5


def test_eight_claimers_never_get_the_same_chunk(database: Database) -> None:
    """Real threads and connections; each chunk is claimed once, and none is left."""
    ids = [make_job(database, 30, chunk_size=1), make_job(database, 30, chunk_size=1)]
    workers = [make_worker(database) for _ in range(8)]
    start = threading.Barrier(len(workers))

    def work(worker: str) -> list[Claim]:
        held = []
        start.wait()
        while True:
            outcome = database.retrying(lambda c: chunks.claim(c, worker, keys=[KEY]))
            if isinstance(outcome, Claim):
                held.append(outcome)
            elif outcome == "nothing":
                return held
            else:
                assert outcome == "again"

    with ThreadPoolExecutor(len(workers)) as pool:
        claims = [held for some in pool.map(work, workers) for held in some]
    assert Counter(held.chunk_id for held in claims) == Counter(
        row.id for job_id in ids for row in job_chunks(database, job_id)
    )
    assert {held.fence for held in claims} == {1}
    with database.read() as connection:
        held_in_sql = {worker: set(chunks.held_by(connection, worker)) for worker in workers}
    assert sum(len(held) for held in held_in_sql.values()) == 60


def test_whoever_waited_for_the_last_chunk_looks_again(postgresql_database: Database) -> None:
    """Two claimers meet at the last chunk of the best job: one has it, the other is told so."""
    database = postgresql_database
    make_job(database, 1, priority=1)
    second = make_job(database, 1)
    first_worker, second_worker = make_worker(database), make_worker(database)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as connection:
            assert isinstance(chunks.claim(connection, first_worker, keys=[KEY]), Claim)
            waiting = pool.submit(try_claim, database, second_worker)
            with pytest.raises(TimeoutError):
                waiting.result(0.3)  # it waits for the job's row
        assert waiting.result(5) == "again"
    assert claim(database, second_worker).job_id == second


def test_a_cancel_that_a_claim_waited_for_wins(database: Database) -> None:
    job_id = make_job(database, 1)
    worker = make_worker(database)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as connection:
            jobs.cancel(connection, job_id)
            waiting = pool.submit(try_claim, database, worker)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
        assert waiting.result(5) in ("again", "nothing")
    assert job_chunks(database, job_id)[0].state == "cancelled"


# Which samples of a chunk are pending.


def test_samples_without_a_result_are_pending(database: Database) -> None:
    make_job(database, 4, chunk_size=2, samples=3)
    worker = make_worker(database)
    held = claim(database, worker)
    assert pending_samples(database, held) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    save(database, worker, held, only=[1], end="return")
    held = claim(database, worker)
    assert pending_samples(database, held) == [(0, 0), (0, 1), (0, 2)]
    assert (held.done, held.prompt_tokens, held.completion_tokens) == (3, 3, 15)


def test_a_failed_sample_is_not_pending_any_more(database: Database) -> None:
    make_job(database, 2)
    worker = make_worker(database)
    held = claim(database, worker)
    save(database, worker, held, only=[0], failing={0: "engine_error"}, end="return")
    held = claim(database, worker)
    assert pending_samples(database, held) == [(1, 0)]
    assert held.failed == 1


# Counting, for the wake-ups.


def test_queued_chunks_are_counted_up_to_a_limit(database: Database) -> None:
    first = make_job(database, 20)
    make_job(database, 20, key="another")
    second = make_job(database, 8)
    with database.write() as connection:
        jobs.pause(connection, second)
    claim(database, make_worker(database))
    with database.read() as connection:
        assert chunks.count_queued(connection, KEY, limit=100) == 4
        assert chunks.count_queued(connection, KEY, limit=3) == 3
        assert chunks.count_queued(connection, KEY, limit=100, only_job=first) == 4
        assert chunks.count_queued(connection, KEY, limit=100, only_job=second) == 0
        assert sorted(chunks.keys_with_work(connection)) == ["another", KEY]


def test_what_goes_before_a_priority_is_counted_best_first(database: Database) -> None:
    make_job(database, 8, priority=5)
    make_job(database, 4, priority=9)
    make_job(database, 12, priority=1)
    make_job(database, 8, priority=9, key="another")
    paused = make_job(database, 4, priority=9)
    with database.write() as connection:
        jobs.pause(connection, paused)

    def above(priority: int, limit: int = 9) -> list[int]:
        with database.read() as connection:
            return chunks.queued_above(connection, [KEY], priority, limit=limit)

    assert above(0) == [9, 5, 5, 1, 1, 1]
    assert above(0, limit=2) == [9, 5]
    assert above(1) == [9, 5, 5]
    assert above(9) == []


def test_live_slots_are_summed_by_the_one_job_that_they_serve(database: Database) -> None:
    make_worker(database, slots=4)
    make_worker(database, slots=3, state="starting")
    make_worker(database, slots=2, only_job="j")
    make_worker(database, key="another", serves=(KEY,), slots=1)
    make_worker(database, slots=64, state="stopped")
    make_worker(database, slots=64, lease_seconds=-1)
    make_worker(database, key="another", slots=64)
    with database.read() as connection:
        assert chunks.live_slots(connection, KEY) == {None: 8, "j": 2}
        assert chunks.live_slots(connection, "nobody's") == {}


def test_a_job_has_ended_when_it_is_over_or_gone(database: Database) -> None:
    job_id = make_job(database, 1)
    with database.read() as connection:
        assert not chunks.job_has_ended(connection, job_id)
        assert chunks.job_has_ended(connection, "gone")
    work_off(database, make_worker(database))
    with database.read() as connection:
        assert chunks.job_has_ended(connection, job_id)


def test_a_claim_whose_answer_was_lost_is_handed_back(database: Database) -> None:
    job_id = make_job(database, 4)
    worker, other = make_worker(database), make_worker(database)
    held = claim(database, worker)
    for _ in range(2):
        with database.write() as connection:
            leases.return_chunk(connection, worker, held.chunk_id, job_id)
    (row,) = job_chunks(database, job_id)
    assert (row.state, row.worker_id, row.deaths) == ("queued", None, 0)
    claim(database, other)
    with database.write() as connection:
        leases.return_chunk(connection, worker, held.chunk_id, job_id)
    assert job_chunks(database, job_id)[0].worker_id == other
