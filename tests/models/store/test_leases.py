"""Leases: who is dead, what becomes of its chunks, and how the request that kills is found."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from models.base import db_now
from models.database import Database
from models.job import Result
from models.store import chunks, jobs, leases, results
from models.store.chunks import Claim
from models.worker import ServedCheckpoint, Worker
from tests.seeding import (
    KEY,
    POISON_DEATHS,
    as_save,
    check_sums,
    claim,
    die,
    job,
    job_chunks,
    job_results,
    lapse,
    make_job,
    make_worker,
    pending_samples,
    reap,
    result_row,
    save,
    try_claim,
    work_off,
)


def worker_state(database: Database, worker_id: str) -> str:
    with database.read() as connection:
        return connection.execute(select(Worker.state).where(Worker.id == worker_id)).scalar_one()


def renew(database: Database, worker_id: str, state: str = "ready") -> bool:
    with database.write() as connection:
        return leases.renew(connection, worker_id, lease_seconds=60, state=state)


# Registration and renewal.


def a_worker(**changes: object) -> leases.NewWorker:
    values = {
        "id": "w1",
        "host": "h",
        "pid": 1,
        "device": "cpu",
        "checkpoint_key": KEY,
        "serves": (KEY, "alias", KEY),
        "slots": 4,
        "only_job": None,
        "version": "0.1.0.dev123+gabcdef0123456789.d20300101",
        **changes,
    }
    return leases.NewWorker(**values)  # type: ignore[arg-type]


def test_a_registration_may_be_repeated(database: Database) -> None:
    """By the same process; another's id is refused."""
    for _ in range(2):
        with database.write() as connection:
            leases.register(connection, a_worker(), lease_seconds=45)
    with pytest.raises(IntegrityError), database.write() as connection:
        leases.register(connection, a_worker(pid=2), lease_seconds=45)
    with database.read() as connection:
        keys = connection.execute(select(ServedCheckpoint.checkpoint_key)).scalars().all()
        row = connection.execute(select(Worker)).one()
    assert sorted(keys) == ["alias", KEY]
    assert row.state == "starting"
    assert 40 < (row.lease_until - database.now()).total_seconds() < 46


def test_a_renewed_lease_does_not_lapse(database: Database) -> None:
    worker = make_worker(database, lease_seconds=-1)
    assert renew(database, worker)
    assert reap(database) == []
    assert worker_state(database, worker) == "ready"


@pytest.mark.parametrize("end", ["dead", "stopped"])
def test_a_worker_that_ended_cannot_renew(database: Database, end: str) -> None:
    worker = make_worker(database)
    if end == "dead":
        die(database, worker)
    else:
        with database.write() as connection:
            leases.leave(connection, worker)
    assert not renew(database, worker)
    assert worker_state(database, worker) == end
    assert reap(database) == []


# Reaping.


def test_a_dead_workers_chunks_go_back_with_a_death(database: Database) -> None:
    job_id = make_job(database, 12)
    dead, live = make_worker(database), make_worker(database)
    lost = claim(database, dead)
    other = claim(database, live)
    with database.write() as connection:
        part = as_save(lost, [result_row(0)])
        chunks_of_dead = results.save(connection, dead, [part])
    assert not chunks_of_dead.lost
    die(database, dead)
    assert worker_state(database, dead) == "dead"
    rows = {row.id: row for row in job_chunks(database, job_id)}
    back = rows[lost.chunk_id]
    assert (back.state, back.worker_id, back.deaths, back.done) == ("queued", None, 1, 1)
    assert (rows[other.chunk_id].state, rows[other.chunk_id].deaths) == ("running", 0)
    assert {row.deaths for row in rows.values()} == {0, 1}
    assert reap(database) == []
    work_off(database, live)
    save(database, live, other)
    assert job(database, job_id).state == "completed"
    assert check_sums(database, job_id)["done"] == 12


def test_a_lease_that_is_not_over_is_left_alone(database: Database) -> None:
    worker = make_worker(database, lease_seconds=5)
    make_job(database, 4)
    claim(database, worker)
    with database.write() as connection:
        assert leases.workers_to_reap(connection) == []
        assert leases.reap(connection, [worker], poison_deaths=3) == []
    assert worker_state(database, worker) == "ready"


def test_only_workers_seen_expired_before_are_reaped(database: Database) -> None:
    """A lease that lapsed after `workers_to_reap` was asked is left for the next time."""
    first, second = make_worker(database, lease_seconds=-1), make_worker(database)
    with database.read() as connection:
        expired = leases.workers_to_reap(connection)
    assert expired == [first]
    lapse(database, second)
    with database.write() as connection:
        assert leases.reap(connection, expired, poison_deaths=3) == [first]
    assert worker_state(database, second) == "ready"


def test_an_expired_worker_that_renewed_meanwhile_lives(database: Database) -> None:
    worker = make_worker(database, lease_seconds=-1)
    with database.read() as connection:
        expired = leases.workers_to_reap(connection)
    renew(database, worker)
    with database.write() as connection:
        assert leases.reap(connection, expired, poison_deaths=3) == []
    assert worker_state(database, worker) == "ready"


@pytest.mark.parametrize("end", ["dead", "stopped", "forgotten"])
def test_a_chunk_claimed_by_a_worker_that_had_ended_goes_back_without_a_death(
    database: Database, end: str
) -> None:
    """The claim raced with the worker's end: nothing has computed it."""
    job_id = make_job(database, 4)
    worker = make_worker(database)
    claim(database, worker)
    with database.write() as connection:
        if end == "forgotten":
            connection.execute(Worker.__table__.delete())
        else:
            connection.execute(update(Worker).values(state=end))
    assert reap(database) == []
    (row,) = job_chunks(database, job_id)
    assert (row.state, row.deaths, row.worker_id) == ("queued", 0, None)


def test_a_drain_is_no_death(database: Database) -> None:
    job_id = make_job(database, 8)
    for _ in range(5):
        worker = make_worker(database)
        claim(database, worker)
        claim(database, worker)
        with database.write() as connection:
            assert leases.leave(connection, worker) == 2
        with database.write() as connection:
            assert leases.leave(connection, worker) == 0  # again, after a lost answer
        assert worker_state(database, worker) == "stopped"
    assert {(row.state, row.deaths) for row in job_chunks(database, job_id)} == {("queued", 0)}


@pytest.mark.parametrize("state", ["cancelled", "paused"])
def test_chunks_of_a_dead_worker_go_where_their_job_went(database: Database, state: str) -> None:
    job_id = make_job(database, 4)
    worker = make_worker(database)
    claim(database, worker)
    with database.write() as connection:
        (jobs.cancel if state == "cancelled" else jobs.pause)(connection, job_id)
    die(database, worker)
    expected = "cancelled" if state == "cancelled" else "queued"
    assert job_chunks(database, job_id)[0].state == expected
    assert job(database, job_id).state == state


def test_ten_reapers_at_once_declare_each_worker_dead_once(database: Database) -> None:
    ids = [make_job(database, 6, chunk_size=1) for _ in range(2)]
    dead = [make_worker(database) for _ in range(4)]
    for number in range(12):
        claim(database, dead[number % 4])
    lapse(database, *dead)
    start = threading.Barrier(10)

    def work(_: int) -> list[str]:
        start.wait()
        return database.retrying(
            lambda c: leases.reap(c, leases.workers_to_reap(c), poison_deaths=3)
        )

    with ThreadPoolExecutor(10) as pool:
        declared_dead = [worker for some in pool.map(work, range(10)) for worker in some]
    assert sorted(declared_dead) == sorted(dead)
    rows = [row for job_id in ids for row in job_chunks(database, job_id)]
    assert {(row.state, row.deaths) for row in rows} == {("queued", 1)}


def test_a_worker_that_leaves_while_it_is_reaped(postgresql_database: Database) -> None:
    """Both lock the worker's row before any job's: one waits for the other, no deadlock."""
    database = postgresql_database
    job_id = make_job(database, 4)
    worker = make_worker(database, lease_seconds=-1)
    with database.write() as connection:
        connection.execute(update(Worker).values(lease_until=db_now(60)))
    claim(database, worker)
    lapse(database, worker)

    def leave() -> int:
        with database.write() as connection:
            return leases.leave(connection, worker)

    with ThreadPoolExecutor(1) as pool:
        with database.write() as connection:
            assert leases.reap(connection, [worker], poison_deaths=3) == [worker]
            leaving = pool.submit(leave)
            with pytest.raises(TimeoutError):
                leaving.result(0.3)
        assert leaving.result(5) == 0
    assert (worker_state(database, worker), job_chunks(database, job_id)[0].deaths) == ("dead", 1)


def test_reaping_and_saving_do_not_deadlock(postgresql_database: Database) -> None:
    """All jobs of all the dead are locked in one go, in the order in which a save locks them."""
    database = postgresql_database
    for _ in range(10):
        make_job(database, 2, chunk_size=1), make_job(database, 2, chunk_size=1)
        live = make_worker(database)
        dead = [make_worker(database) for _ in range(2)]
        # The second dead holds a chunk of the first job, the first one of the second.
        held = [claim(database, live), claim(database, dead[1])]
        held += [claim(database, live), claim(database, dead[0])]
        lapse(database, *dead)
        ends = [as_save(one, [result_row(one.first_position)], end="done") for one in held[::2]]
        start = threading.Barrier(2)

        def end(
            live: str = live, ends: list[results.ChunkSave] = ends, start: threading.Barrier = start
        ) -> None:
            start.wait()
            with database.write() as connection:
                assert not results.save(connection, live, ends).lost

        with ThreadPoolExecutor(1) as pool:
            saving = pool.submit(end)
            start.wait()
            assert len(reap(database)) == 2
            saving.result(5)
        work_off(database, live)


# What kills workers.


def test_the_second_death_splits_a_chunk(database: Database) -> None:
    job_id = make_job(database, 8, chunk_size=8, samples=2)
    first, second = make_worker(database), make_worker(database)
    held = claim(database, first)
    save(database, first, held, only=[0, 5], failing={5: "engine_error"}, end=None)
    die(database, first)
    (row,) = job_chunks(database, job_id)
    assert (row.deaths, row.size, row.done, row.failed) == (1, 8, 2, 2)
    assert not claim(database, second).isolated
    die(database, second)
    low, high = job_chunks(database, job_id)
    # Pending were 1 2 3 | 4 6 7: the cut is at the fourth.
    assert (low.first_position, low.size, low.samples, low.done, low.failed) == (0, 4, 8, 2, 0)
    assert (high.first_position, high.size, high.samples, high.done, high.failed) == (4, 4, 8, 0, 2)
    assert (low.prompt_tokens, low.completion_tokens) == (3, 10)
    assert low.deaths == high.deaths == chunks.ISOLATE_AFTER_DEATHS
    assert high.fence >= low.fence
    check_sums(database, job_id)
    third = make_worker(database)
    one, two = claim(database, third), claim(database, third)
    assert one.isolated
    assert two.isolated
    assert {index for index, _ in pending_samples(database, one)} == {1, 2, 3}
    assert {index for index, _ in pending_samples(database, two)} == {4, 6, 7}
    save(database, third, one)
    save(database, third, two)
    assert job(database, job_id).state == "completed"
    assert check_sums(database, job_id)["done"] == 14


def test_a_retry_can_be_split_too(database: Database) -> None:
    job_id = make_job(database, 12)
    worker = make_worker(database)
    work_off(database, worker, failing=dict.fromkeys((1, 4, 5, 9), "engine_error"))
    with database.write() as connection:
        assert jobs.retry(connection, job_id, only_code=None, chunk_size=4) == 4
    held = claim(database, worker)
    save(database, worker, held, only=[5], failing={5: "engine_error"}, end=None)
    die(database, worker)
    die_with_all(database)
    low, high = (row for row in job_chunks(database, job_id) if row.pass_ == 2)
    assert (low.first_position, low.size, low.samples) == (1, 3, 1)
    assert (high.first_position, high.size, high.samples, high.failed) == (4, 6, 3, 1)
    check_sums(database, job_id)
    work_off(database, make_worker(database))
    assert job(database, job_id).state == "completed"
    assert check_sums(database, job_id)["failed"] == 1


def die_with_all(database: Database) -> list[Claim]:
    """A worker claims all that it may and dies."""
    worker = make_worker(database)
    held: list[Claim] = []
    while True:
        outcome = try_claim(database, worker, idle=not held)
        if not isinstance(outcome, Claim):
            break
        held.append(outcome)
        if outcome.isolated:
            break
    die(database, worker)
    return held


def test_a_worker_that_died_after_its_last_save_leaves_nothing_to_split(
    database: Database,
) -> None:
    job_id = make_job(database, 4)
    die_with_all(database)
    worker = make_worker(database)
    held = claim(database, worker)
    save(database, worker, held, end=None)
    die(database, worker)
    assert [row.state for row in job_chunks(database, job_id)] == ["done"]
    assert job(database, job_id).state == "completed"
    assert check_sums(database, job_id)["done"] == 4


def test_a_single_request_fails_as_poison_after_three_deaths_alone(database: Database) -> None:
    job_id = make_job(database, 1, samples=2)
    for deaths in range(1, chunks.ISOLATE_AFTER_DEATHS + POISON_DEATHS):
        (held,) = die_with_all(database)
        assert held.isolated == (deaths > chunks.ISOLATE_AFTER_DEATHS)
        assert job_results(database, job_id) == {}
        assert job_chunks(database, job_id)[0].deaths == deaths
    die_with_all(database)
    assert job_results(database, job_id) == {(0, 0): "poison", (0, 1): "poison"}
    assert job(database, job_id).state == "completed"
    assert check_sums(database, job_id)["failed"] == 2
    with database.read() as connection:
        message = connection.execute(select(Result.error_message)).scalars().first()
    assert message is not None
    assert "5 workers died while they ran this request, the last 3 with nothing else" in message


def test_a_late_save_does_not_replace_poison(database: Database) -> None:
    """The last worker was only suspended: its result comes after `poison`, and is refused."""
    job_id = make_job(database, 1)
    for _ in range(chunks.ISOLATE_AFTER_DEATHS + POISON_DEATHS - 1):
        die_with_all(database)
    suspended = make_worker(database)
    held = claim(database, suspended)
    die(database, suspended)
    with database.write() as connection:
        late = as_save(held, [result_row(0)], end="done")
        assert results.save(connection, suspended, [late]).lost == {held.chunk_id}
    assert job_results(database, job_id) == {(0, 0): "poison"}


@pytest.mark.parametrize("poison", [0, 11, 15])
def test_the_request_that_kills_is_found_and_no_other_fails(
    database: Database, poison: int
) -> None:
    """Beside another job, whose chunk dies along and must come through."""
    job_id = make_job(database, 16, chunk_size=16)
    bystander = make_job(database, 4, priority=1)
    deaths = 0
    while job(database, job_id).state != "completed":
        worker = make_worker(database)
        held: list[Claim] = []
        while len(held) < 4:
            outcome = try_claim(database, worker, idle=not held)
            if not isinstance(outcome, Claim):
                break
            held.append(outcome)
            if outcome.isolated:
                break
        kills = any(
            one.job_id == job_id
            and poison in {index for index, _ in pending_samples(database, one)}
            for one in held
        )
        if kills:
            deaths += 1
            die(database, worker)
        else:
            for one in held:
                save(database, worker, one)
        assert deaths <= 2 + math.log2(16) + 2
    stored = job_results(database, job_id)
    assert {index for (index, _), code in stored.items() if code != "ok"} == {poison}
    assert stored[poison, 0] == "poison"
    check_sums(database, job_id)
    work_off(database, make_worker(database))
    assert set(job_results(database, bystander).values()) == {"ok"}
    check_sums(database, bystander)


# The sweep.


def test_a_sweep_is_run_by_one_once_a_period(database: Database) -> None:
    start = threading.Barrier(8)

    def run(_: int) -> bool:
        start.wait()
        return database.retrying(lambda c: leases.elect(c, "fleet", period_seconds=60))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(run, range(8))) == 1
    with database.write() as connection:
        assert not leases.elect(connection, "fleet", period_seconds=60)
        assert leases.elect(connection, "fleet", period_seconds=0)
        assert not leases.elect(connection, "no such sweep", period_seconds=0)


def test_workers_that_ended_long_ago_are_forgotten(database: Database) -> None:
    old, young, live = (make_worker(database) for _ in range(3))
    with database.write() as connection:
        connection.execute(update(Worker).where(Worker.id != young).values(renewed_at=db_now(-100)))
        connection.execute(update(Worker).where(Worker.id != live).values(state="stopped"))
        assert leases.forget_old_workers(connection, keep_seconds=50) == 1
    with database.read() as connection:
        assert set(connection.execute(select(Worker.id)).scalars()) == {young, live}
        served = set(connection.execute(select(ServedCheckpoint.worker_id)).scalars())
    assert old not in served
