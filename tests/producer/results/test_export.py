"""Results out of SQL: in input order, in pages, also while the job runs."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from sqlalchemy import insert, update
from sqlalchemy.exc import OperationalError

from models.database import Database
from models.job import Request, Result
from models.store import jobs, results, storing
from nightherd.errors import NotFoundError
from producer.results import export
from producer.results.export import ExportOptions, iterate_results, show_request
from tests.seeding import (
    KEY,
    as_save,
    claim,
    make_job,
    make_worker,
    result_row,
    save,
    statements,
    work_off,
)


def indices(database: Database, job_id: str, **options: Any) -> list[tuple[int, int]]:
    rows = iterate_results(database, job_id, ExportOptions(**options))
    return [(row["index"], row["sample"]) for row in rows]


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PAGE", 3)


def test_a_row(database: Database) -> None:
    job_id = make_job(database, 2)
    work_off(database, make_worker(database), failing={1: "engine_error"})
    assert list(iterate_results(database, job_id)) == [
        {
            "index": 0,
            "sample": 0,
            "custom_id": None,
            "text": "text 0.0",
            "finish_reason": "stop",
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "error": None,
        },
        {
            "index": 1,
            "sample": 0,
            "custom_id": None,
            "text": None,
            "finish_reason": "error",
            "prompt_tokens": 3,
            "completion_tokens": 0,
            "error": {"code": "engine_error", "message": "it failed: engine_error"},
        },
    ]


def test_input_order_whatever_order_the_work_was_in(database: Database, small_pages: None) -> None:
    job_id, other = make_job(database, 7, chunk_size=2, samples=2), make_job(database, 7)
    worker = make_worker(database)
    held = [claim(database, worker, only_job=job_id) for _ in range(4)]
    for one in reversed(held):
        save(database, worker, one)
    work_off(database, worker)
    everything = [(index, sample) for index in range(7) for sample in range(2)]
    assert indices(database, job_id) == everything
    assert len(indices(database, other)) == 7
    for limit in range(1, 15):
        assert indices(database, job_id, limit=limit) == everything[:limit]
    assert indices(database, job_id, limit=100) == everything


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7])
def test_pages_end_where_they_end(database: Database, small_pages: None, count: int) -> None:
    """No row is lost or doubled at the edge of a page, and none is asked for in vain twice."""
    job_id = make_job(database, 8, chunk_size=8)
    worker = make_worker(database)
    save(database, worker, claim(database, worker), only=range(count), end=None)
    with statements(database) as seen:
        assert indices(database, job_id) == [(index, 0) for index in range(count)]
    pages = [one for one in seen if "FROM results" in one]
    assert len(pages) == count // 3 + 1


def test_only_failures_and_only_one_code(database: Database, small_pages: None) -> None:
    job_id = make_job(database, 20)
    failing = dict.fromkeys(range(0, 20, 2), "engine_error") | {3: "out_of_memory"}
    work_off(database, make_worker(database), failing=failing)
    assert indices(database, job_id, failed=True) == [(index, 0) for index in sorted(failing)]
    assert indices(database, job_id, failed=True, limit=4) == [(0, 0), (2, 0), (3, 0), (4, 0)]
    assert indices(database, job_id, code="out_of_memory") == [(3, 0)]
    assert indices(database, job_id, code="nosuch") == []


def test_more_fields_only_when_asked_for(database: Database) -> None:
    new = storing.NewJob(id="job1", checkpoint_key=KEY, seed=1, params={})
    body = {"messages": [{"role": "user", "content": "Hi"}], "metadata": {"url": "x"}}
    facts: dict[str, Any] = dict.fromkeys(
        ("checkpoint_key", "tokenizer_hash", "dtype", "device", "engine"), "x"
    )
    with database.write() as connection:
        storing.begin_storing(connection, new)
        row = storing.NewRequest(0, body, {"top_k": 5}, "my-id", 1)
        storing.store_requests(connection, new.id, [row])
        storing.finish_storing(connection, new.id, [storing.ChunkRange(0, 1, 1)])
        results.store_provenance(connection, {"id": "p" * 32, "versions": {"a": "1"}, **facts})
        results.store_parameter_set(connection, "s" * 32, {"top_k": 5})
    worker = make_worker(database)
    held = claim(database, worker)
    result = {
        **result_row(0),
        "provenance_id": "p" * 32,
        "parameter_set_id": "s" * 32,
        "logprobs": {"content": []},
        "stop_reason": "END",
    }
    with database.write() as connection:
        results.save(connection, worker, [as_save(held, [result], end="done")])
    (plain,) = iterate_results(database, new.id)
    assert plain["custom_id"] == "my-id"
    assert not plain.keys() & {"input", "metadata", "provenance", "logprobs", "stop_reason"}
    options = ExportOptions(
        with_input=True, with_metadata=True, with_provenance=True, with_logprobs=True
    )
    (full,) = iterate_results(database, new.id, options)
    assert full["input"] == {"messages": [{"role": "user", "content": "Hi"}]}
    assert full["metadata"] == {"url": "x"}
    assert full["provenance"]["versions"] == {"a": "1"}
    assert (full["logprobs"], full["stop_reason"]) == ({"content": []}, "END")
    assert json.loads(json.dumps(full)) == full
    detail = show_request(database, new.id, 0)
    assert json.loads(json.dumps(detail)) == detail
    assert detail["custom_id"] == "my-id"
    assert detail["params"] == {"request": {"top_k": 5}, "job": {}}
    (sample,) = detail["samples"]
    assert (sample["effective_params"], sample["pass"]) == ({"top_k": 5}, 1)
    assert sample["provenance"]["engine"] == "x"


def test_while_the_job_runs(database: Database, small_pages: None) -> None:
    """What is saved behind the reader's place is not seen, what is saved ahead is; none twice."""
    job_id = make_job(database, 12, chunk_size=4)
    worker = make_worker(database)
    first, second, third = (claim(database, worker) for _ in range(3))
    save(database, worker, second)
    rows = iterate_results(database, job_id)
    seen = [next(rows)["index"] for _ in range(2)]
    save(database, worker, first)
    save(database, worker, third)
    seen += [row["index"] for row in rows]
    assert seen == list(range(4, 12))
    assert indices(database, job_id) == [(index, 0) for index in range(12)]


def test_a_retry_replaces_the_error(database: Database) -> None:
    job_id = make_job(database, 4)
    worker = make_worker(database)
    work_off(database, worker, failing={1: "engine_error"})
    with database.write() as connection:
        jobs.retry(connection, job_id, only_code=None, chunk_size=4)
    assert indices(database, job_id, failed=True) == [(1, 0)]
    work_off(database, worker)
    assert indices(database, job_id, failed=True) == []
    assert indices(database, job_id) == [(index, 0) for index in range(4)]


def test_no_transaction_is_open_between_pages(database: Database, small_pages: None) -> None:
    """A reader that stops half-way, as `| less` does, holds up nobody."""
    job_id = make_job(database, 8)
    work_off(database, make_worker(database))
    rows = iterate_results(database, job_id)
    next(rows)
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    rows.close()  # type: ignore[attr-defined]


def test_a_database_that_is_away_for_a_moment(
    database: Database, small_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = make_job(database, 8)
    work_off(database, make_worker(database))
    rows = iterate_results(database, job_id)
    seen = [next(rows)["index"] for _ in range(3)]
    real, faults = Database._begin, [OperationalError(None, None, Exception("away"))]

    def flaky(self: Database, *, reading: bool) -> Any:
        if faults:
            raise faults.pop()
        return real(self, reading=reading)

    monkeypatch.setattr(Database, "_begin", flaky)
    assert seen + [row["index"] for row in rows] == list(range(8))


def test_one_request(database: Database) -> None:
    job_id = make_job(database, 3, samples=2)
    worker = make_worker(database)
    held = claim(database, worker)
    save(database, worker, held, only=[1], failing={1: "engine_error"}, end=None)
    shown = show_request(database, job_id, 1)
    assert (shown["job"], shown["index"], shown["samples_asked"]) == (job_id, 1, 2)
    assert (shown["request"], shown["job_seed"]) == ({"prompt": "prompt 1"}, 7)
    assert [one["error"]["code"] for one in shown["samples"]] == ["engine_error"] * 2
    assert show_request(database, job_id, 0)["samples"] == []
    for index in (3, -1, 10**30):
        with pytest.raises(NotFoundError, match=f"no row {index}; its rows are 0 to 2"):
            show_request(database, job_id, index)


def test_a_late_page_costs_no_more_than_the_first(database: Database) -> None:
    """A page is found by its key: the rows before it are not read again."""
    total = 40_000
    job_id = make_job(database, 1)
    with database.write() as connection:
        for start in range(0, total, 10_000):
            numbers = range(max(1, start), start + 10_000)
            connection.execute(
                insert(Request),
                [{"job_id": job_id, "index": i, "position": i, "body": {}} for i in numbers],
            )
            connection.execute(
                insert(Result),
                [
                    {**result_row(i), "job_id": job_id, "pass_": 1}
                    for i in range(start, start + 10_000)
                ],
            )

    def seconds(after: int) -> float:
        best = 9.0
        for _ in range(3):
            with database.read() as connection:
                begin = time.perf_counter()
                page = export._page(job_id, (after, 0), 200, ExportOptions())
                assert len(connection.execute(page).all()) == 200
                best = min(best, time.perf_counter() - begin)
        return best

    first, last = seconds(-1), seconds(total - 201)
    assert last < 5 * first + 0.01


def test_the_planner_is_left_no_choice(postgresql_database: Database) -> None:
    """With the statistics of a tiny job, a large new one is still read by the keys of its rows."""
    database = postgresql_database
    make_job(database, 20)
    work_off(database, make_worker(database), failing={3: "engine_error"})
    autocommit = database.engine.execution_options(isolation_level="AUTOCOMMIT")
    with autocommit.connect() as connection:
        connection.exec_driver_sql("ANALYZE requests, results, chunks, jobs")
    job_id = make_job(database, 20_000, chunk_size=250)
    worker = make_worker(database)
    with database.write() as connection:
        for start in range(0, 20_000, 10_000):
            rows = [
                {**result_row(i, code=None if i % 10 else "x"), "job_id": job_id, "pass_": 1}
                for i in range(start, start + 10_000)
            ]
            connection.execute(insert(Result), rows)
        connection.execute(
            update(jobs.Chunk)
            .where(jobs.Chunk.job_id == job_id)
            .values(state="done", done=225, failed=25)
        )
    begin = time.perf_counter()
    with database.write() as connection:
        assert jobs.retry(connection, job_id, only_code=None, chunk_size=500) == 2_000
    held = claim(database, worker)
    save(database, worker, held, end=None)
    assert sum(1 for _ in iterate_results(database, job_id)) == 20_000
    assert sum(1 for _ in iterate_results(database, job_id, ExportOptions(failed=True))) == 1_500
    # 0.5 s on an idle machine; a join in a nested loop takes a minute.
    assert time.perf_counter() - begin < 20
