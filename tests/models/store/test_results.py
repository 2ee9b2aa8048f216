"""Saving: results and counters together, under the fence; the end of a chunk and of its job."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.exc import IntegrityError

from models.database import Database
from models.job import ParameterSet, Provenance, Result
from models.store import jobs, results
from nightherd.errors import ConflictError
from tests.conftest import wait_until
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
    save,
    try_claim,
    work_off,
)


def test_results_counters_and_the_end_are_one_transaction(database: Database) -> None:
    job_id = make_job(database, 4, samples=2)
    worker = make_worker(database)
    held = claim(database, worker)
    rows = [
        result_row(i, j, code="engine_error" if i == 2 else None)
        for i, j in pending_samples(database, held)
    ]
    part = as_save(held, rows[:5])
    with database.write() as connection:
        assert results.save(connection, worker, [part]) == results.SaveOutcome(frozenset(), ())
    (row,) = job_chunks(database, job_id)
    assert (row.state, row.done, row.failed) == ("running", 4, 1)
    assert check_sums(database, job_id)["prompt_tokens"] == 6
    whole = as_save(held, rows, end="done")
    whole.results = rows[5:]
    with contextlib.suppress(KeyboardInterrupt), database.write() as connection:
        results.save(connection, worker, [whole])
        raise KeyboardInterrupt  # before the commit
    assert len(job_results(database, job_id)) == 5
    with database.write() as connection:
        assert results.save(connection, worker, [whole]).completed == (job_id,)
    (row,) = job_chunks(database, job_id)
    assert (row.state, row.done, row.failed) == ("done", 6, 2)
    assert row.finished_at is not None
    assert check_sums(database, job_id)["done"] == 6
    assert job(database, job_id).finished_at is not None


def test_a_save_may_be_repeated(database: Database) -> None:
    """The answer to a commit was lost: the counters are absolute, the results are there."""
    job_id = make_job(database, 4)
    worker = make_worker(database)
    held = claim(database, worker)
    part = as_save(held, [result_row(0), result_row(1, code="engine_error")])
    for _ in range(3):
        with database.write() as connection:
            assert results.save(connection, worker, [part]).lost == frozenset()
    assert check_sums(database, job_id) == {
        "samples": 4,
        "done": 1,
        "failed": 1,
        "prompt_tokens": 3,
        "completion_tokens": 5,
    }


def test_a_repeated_end_says_lost_and_changes_nothing(database: Database) -> None:
    job_id = make_job(database, 4)
    worker = make_worker(database)
    held = claim(database, worker)
    whole = as_save(held, [result_row(i) for i in range(4)], end="done")
    with database.write() as connection:
        assert results.save(connection, worker, [whole]).completed == (job_id,)
    with database.write() as connection:
        again = results.save(connection, worker, [whole])
    assert again == results.SaveOutcome(frozenset({held.chunk_id}), ())
    assert check_sums(database, job_id)["done"] == 4
    assert job(database, job_id).state == "completed"


@pytest.mark.parametrize("first", [None, "engine_error"])
def test_a_result_that_is_there_is_never_replaced_by_the_same_pass(
    database: Database, first: str | None
) -> None:
    """Not a failure either: only a retry replaces one."""
    job_id = make_job(database, 1)
    worker = make_worker(database)
    held = claim(database, worker)
    for row in (result_row(0, code=first), {**result_row(0), "text": "another"}):
        with database.write() as connection:
            results.save(connection, worker, [as_save(held, [row])])
    with database.read() as connection:
        query = select(Result.text, Result.error_code).where(Result.job_id == job_id)
        assert connection.execute(query).all() == [(None if first else "text 0.0", first)]


def test_a_save_of_a_lost_chunk_writes_nothing_and_the_others_are_saved(
    database: Database,
) -> None:
    """A zombie's late write: its lease lapsed, another holds the chunk."""
    job_id = make_job(database, 8)
    zombie = make_worker(database)
    lost, kept = claim(database, zombie), claim(database, zombie)
    other = make_worker(database)
    die(database, zombie)
    held = [claim(database, other), claim(database, other)]
    assert {one.chunk_id for one in held} == {lost.chunk_id, kept.chunk_id}
    for worker in (zombie, other):
        # By its id, or by the new holder's name: the fence alone decides.
        with database.write() as connection:
            outcome = results.save(
                connection, worker, [as_save(lost, [result_row(lost.first_position)], end="done")]
            )
        assert outcome.lost == {lost.chunk_id}
    assert job_results(database, job_id) == {}
    live = next(one for one in held if one.chunk_id == kept.chunk_id)
    with database.write() as connection:
        outcome = results.save(
            connection,
            other,
            [
                as_save(lost, [result_row(lost.first_position)]),
                as_save(live, [result_row(live.first_position)]),
            ],
        )
    assert outcome.lost == {lost.chunk_id}
    assert list(job_results(database, job_id)) == [(live.first_position, 0)]


def test_a_returned_chunk_is_queued_and_keeps_its_counters(database: Database) -> None:
    job_id = make_job(database, 4)
    worker = make_worker(database)
    held = claim(database, worker)
    save(database, worker, held, only=[0, 1], end="return")
    (row,) = job_chunks(database, job_id)
    assert (row.state, row.worker_id, row.done, row.deaths) == ("queued", None, 2, 0)
    assert job(database, job_id).state == "running"
    (again,) = work_off(database, worker)
    assert (again.done, again.fence) == (2, 2)
    assert job(database, job_id).state == "completed"
    assert check_sums(database, job_id)["done"] == 4


@pytest.mark.parametrize("end", ["cancel", "expire"])
def test_a_chunk_of_an_ended_job_may_still_be_saved_and_goes_with_it(
    database: Database, end: str
) -> None:
    job_id = make_job(database, 8)
    worker = make_worker(database)
    first, second = claim(database, worker), claim(database, worker)
    with database.write() as connection:
        jobs._end_early(connection, job_id, "cancelled" if end == "cancel" else "expired")
    state = job(database, job_id).state
    assert save(database, worker, first, only=[0], end="return").lost == frozenset()
    assert save(database, worker, second, end="done").completed == ()
    assert [row.state for row in job_chunks(database, job_id)] == ["cancelled", "done"]
    assert job(database, job_id).state == state
    assert check_sums(database, job_id)["done"] == 5


def test_a_paused_job_completes_when_its_last_chunk_ends(database: Database) -> None:
    job_id = make_job(database, 4)
    worker = make_worker(database)
    held = claim(database, worker)
    with database.write() as connection:
        jobs.pause(connection, job_id)
    assert save(database, worker, held).completed == (job_id,)
    assert job(database, job_id).state == "completed"


def test_one_save_ends_chunks_of_several_jobs(database: Database) -> None:
    ids = [make_job(database, 1) for _ in range(3)]
    worker = make_worker(database)
    held = [claim(database, worker) for _ in ids]
    saves = [as_save(one, [result_row(0)], end="done") for one in reversed(held)]
    with database.write() as connection:
        assert results.save(connection, worker, saves).completed == tuple(sorted(ids))


def test_counters_beyond_the_samples_are_refused(database: Database) -> None:
    """A net under all arithmetic: more results than samples is a mistake somewhere."""
    make_job(database, 1)
    worker = make_worker(database)
    held = claim(database, worker)
    with pytest.raises(IntegrityError), database.write() as connection:
        results.save(connection, worker, [as_save(held, [result_row(0), result_row(1)])])


def test_parameter_sets_and_provenance_are_stored_once(database: Database) -> None:
    facts = {
        "id": "p" * 32,
        "checkpoint_key": "demo",
        "revision": None,
        "weights_hash": "w",
        "tokenizer_hash": "t",
        "template_hash": None,
        "dtype": "float32",
        "device": "cpu",
        "engine": "plain",
        "versions": {"torch": "2"},
    }
    for _ in range(2):
        with database.write() as connection:
            results.store_parameter_set(connection, "s" * 32, {"temperature": 0.5})
            results.store_provenance(connection, facts)
    with database.read() as connection:
        assert connection.execute(select(ParameterSet.params)).scalars().all() == [
            {"temperature": 0.5}
        ]
        assert connection.execute(select(Provenance.versions)).scalars().all() == [{"torch": "2"}]


def test_long_texts_and_logprobs_come_back_as_they_were(database: Database) -> None:
    job_id = make_job(database, 1)
    worker = make_worker(database)
    held = claim(database, worker)
    text = "é🐑\n" * 100_000
    logprobs = {"content": [{"token": "a", "logprob": -0.1234567890123}]}
    row = {**result_row(0), "text": text, "logprobs": logprobs, "seed": 2**63 - 1}
    with database.write() as connection:
        results.save(connection, worker, [as_save(held, [row], end="done")])
    with database.read() as connection:
        got = connection.execute(select(Result).where(Result.job_id == job_id)).one()
    assert (got.text, got.logprobs, got.seed) == (text, logprobs, 2**63 - 1)


# The last two chunks at the same instant.


@contextmanager
def before(database: Database, words: str, then: Callable[[], None]) -> Iterator[None]:
    """Calls `then` in whichever thread is about to execute a statement with these words."""

    def look(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if words in statement:
            then()

    event.listen(database.engine, "before_cursor_execute", look)
    try:
        yield
    finally:
        event.remove(database.engine, "before_cursor_execute", look)


@pytest.fixture
def last_two(postgresql_database: Database) -> tuple[Database, str, Callable[[int], Any]]:
    """A job on PostgreSQL whose two chunks two workers hold; a function that ends one."""
    database = postgresql_database
    job_id = make_job(database, 8)
    workers = [make_worker(database) for _ in range(2)]
    held = [claim(database, worker) for worker in workers]
    saves = [
        as_save(
            one,
            [result_row(index, sample) for index, sample in pending_samples(database, one)],
            end="done",
        )
        for one in held
    ]

    def end(number: int) -> Any:
        with database.write() as connection:
            return results.save(connection, workers[number], [saves[number]])

    return database, job_id, end


def test_two_workers_end_the_last_two_chunks_at_once(
    last_two: tuple[Database, str, Callable[[int], Any]],
) -> None:
    """Both stand before the job's lock at the same instant; the second sees that it is the last."""
    database, job_id, end = last_two
    both = threading.Barrier(2, timeout=10)
    with before(database, "FOR NO KEY UPDATE", both.wait), ThreadPoolExecutor(2) as pool:  # type: ignore[arg-type]
        outcomes = list(pool.map(end, range(2)))
    assert sorted(outcome.completed for outcome in outcomes) == [(), (job_id,)]
    assert job(database, job_id).state == "completed"
    assert check_sums(database, job_id)["done"] == 8


def waits_for_a_lock(database: Database) -> bool:
    with database.read() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        return bool(connection.exec_driver_sql(query).scalar_one())


def test_the_second_to_end_waits_until_the_first_has_committed(
    last_two: tuple[Database, str, Callable[[int], Any]],
) -> None:
    """The first has done all but its commit when the second arrives."""
    database, job_id, end = last_two
    arrived, go_on = threading.Event(), threading.Event()

    def hold(connection: Any) -> None:
        if not arrived.is_set():
            arrived.set()
            assert go_on.wait(10)

    event.listen(database.engine, "commit", hold)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(end, 0)
        assert arrived.wait(10)
        second = pool.submit(end, 1)
        wait_until(lambda: waits_for_a_lock(database), what="the second at the job's lock")
        go_on.set()
        assert first.result(10).completed == ()
        assert second.result(10).completed == (job_id,)
    assert job(database, job_id).state == "completed"


def test_without_the_lock_both_miss_it_and_the_tick_completes_the_job(
    last_two: tuple[Database, str, Callable[[int], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same interleaving without the job's lock: it is this lock that the promise rests on."""
    database, job_id, end = last_two
    monkeypatch.setattr(results, "lock_jobs", lambda _connection, _ids: {})
    both, committing = (threading.Barrier(2, timeout=10) for _ in range(2))

    def together(_connection: Any) -> None:
        committing.wait()  # neither before the other has looked

    event.listen(database.engine, "commit", together)
    try:
        with before(database, "UPDATE jobs SET state", both.wait), ThreadPoolExecutor(2) as pool:  # type: ignore[arg-type]
            outcomes = list(pool.map(end, range(2)))
    finally:
        event.remove(database.engine, "commit", together)
    assert [outcome.completed for outcome in outcomes] == [(), ()]
    assert job(database, job_id).state == "running"
    with database.write() as connection:
        assert jobs.complete_all(connection) == [job_id]
    assert job(database, job_id).state == "completed"


def test_a_cancel_races_with_the_last_chunk(database: Database) -> None:
    """One terminal state, whoever is first; the results are there in any case."""
    ends = set()
    for _ in range(6):
        job_id = make_job(database, 1)
        worker = make_worker(database)
        held = claim(database, worker)
        start = threading.Barrier(2)

        def cancel(job_id: str = job_id, start: threading.Barrier = start) -> bool:
            start.wait()
            try:
                return database.retrying(lambda c: jobs.cancel(c, job_id))
            except ConflictError:
                return False

        def end(
            worker: str = worker, held: Any = held, start: threading.Barrier = start
        ) -> tuple[str, ...]:
            start.wait()
            return save(database, worker, held).completed

        with ThreadPoolExecutor(2) as pool:
            cancelled, completed = pool.submit(cancel), pool.submit(end)
            won = "cancelled" if cancelled.result(10) else "completed"
            assert completed.result(10) == ((job_id,) if won == "completed" else ())
        assert job(database, job_id).state == won
        assert job_results(database, job_id) == {(0, 0): "ok"}
        assert check_sums(database, job_id)["done"] == 1
        ends.add(won)
    assert ends <= {"cancelled", "completed"}
    assert try_claim(database, make_worker(database)) == "nothing"


def test_saves_of_many_workers_do_not_deadlock(database: Database) -> None:
    """Each ends chunks of the same jobs, named in another order."""
    ids = [make_job(database, 8, chunk_size=1) for _ in range(3)]
    workers = [make_worker(database) for _ in range(4)]
    held: dict[str, list[Any]] = {worker: [] for worker in workers}
    for number in range(24):
        held[workers[number % 4]].append(claim(database, workers[number % 4]))

    def end(worker: str) -> None:
        mine = held[worker]
        saves = [as_save(one, [result_row(one.first_position)], end="done") for one in mine]
        order = saves if workers.index(worker) % 2 else saves[::-1]
        with database.write() as connection:
            assert not results.save(connection, worker, order).lost

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(end, workers))
    assert {job(database, job_id).state for job_id in ids} == {"completed"}
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(Result)).scalar_one() == 24
