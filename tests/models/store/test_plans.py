"""Every statement of the hot paths goes through an index, on both databases.

Tables are small here: what counts is that the planner can use the index, not what it would choose.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, event

from models.database import Database
from models.store import chunks, jobs, leases, storing
from producer.jobs import status
from producer.results import export
from producer.results.export import ExportOptions
from tests.seeding import KEY, claim, lapse, make_job, make_worker, save

Work = Callable[[Connection, str, str], Any]


def load(pass_: int) -> Work:
    return lambda connection, job_id, worker: chunks.load_pending(
        connection,
        job_id=job_id,
        first_position=0,
        count=100,
        pass_=pass_,
        only_code="engine_error" if pass_ > 1 else None,
    )


def page(**options: Any) -> Work:
    return lambda connection, job_id, worker: connection.execute(
        export._page(job_id, (5, 0), 10, ExportOptions(**options))
    ).all()


WORK: dict[str, Work] = {
    "claim": lambda c, job_id, worker: chunks.claim(c, worker, keys=[KEY]),
    "load": load(1),
    "load a retry": load(2),
    "held": lambda c, job_id, worker: chunks.held_by(c, worker),
    "count": lambda c, job_id, worker: chunks.count_queued(c, KEY, limit=9),
    "count of a job": lambda c, job_id, worker: chunks.count_queued(
        c, KEY, limit=9, only_job=job_id
    ),
    "queued above": lambda c, job_id, worker: chunks.queued_above(c, [KEY], 0, limit=4),
    "keys": lambda c, job_id, worker: chunks.keys_with_work(c),
    "slots": lambda c, job_id, worker: chunks.live_slots(c, KEY),
    "workers to reap": lambda c, job_id, worker: leases.workers_to_reap(c),
    "reap": lambda c, job_id, worker: leases.reap(c, leases.workers_to_reap(c), poison_deaths=3),
    "leave": lambda c, job_id, worker: leases.leave(c, worker),
    "complete": lambda c, job_id, worker: jobs.complete_all(c),
    "cancel": lambda c, job_id, worker: jobs.cancel(c, job_id),
    "retry": lambda c, job_id, worker: jobs.retry(
        c, job_id, only_code="engine_error", chunk_size=9
    ),
    "discard": lambda c, job_id, worker: storing.discard_storing(c, job_id),
    "status": lambda c, job_id, worker: status.job_view(c, job_id),
    "failures": lambda c, job_id, worker: status.failures_by_code(c, job_id),
    "page": page(),
    "page with input": page(with_input=True),
    "page of failures": page(failed=True),
    "page of one code": page(code="engine_error"),
}


def plans(database: Database, job_id: str, worker: str, work: Work) -> dict[str, str]:
    """Each statement of `work`, and how the database goes about it; nothing is committed."""
    seen: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, _x: Any, many: bool) -> None:
        if not many and re.match("SELECT|UPDATE|DELETE", statement):
            seen.append((statement, parameters))

    found = {}
    connection = database.engine.connect()
    try:
        connection.begin()
        if database.dialect == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        event.listen(database.engine, "before_cursor_execute", note)
        try:
            work(connection, job_id, worker)
        finally:
            event.remove(database.engine, "before_cursor_execute", note)
        explain = "EXPLAIN QUERY PLAN " if database.dialect == "sqlite" else "EXPLAIN "
        cursor = connection.connection.driver_connection.cursor()  # type: ignore[union-attr]
        for statement, parameters in seen:
            cursor.execute(explain + statement, parameters)
            found[statement] = "\n".join(str(row[-1]) for row in cursor.fetchall())
    finally:
        connection.rollback()
        connection.close()
    return found


@pytest.fixture
def prepared(database: Database) -> tuple[Database, str, str]:
    job_id = make_job(database, 40, chunk_size=2, priority=1)
    make_job(database, 40, chunk_size=2)
    worker, dead = make_worker(database), make_worker(database)
    save(database, worker, claim(database, worker), failing={0: "engine_error"})
    claim(database, worker)
    claim(database, dead)
    lapse(database, dead)
    return database, job_id, worker


@pytest.mark.parametrize("name", WORK)
def test_no_statement_reads_a_whole_table(prepared: tuple[Database, str, str], name: str) -> None:
    database, job_id, worker = prepared
    found = plans(database, job_id, worker, WORK[name])
    assert found
    # A scan of a partial index is meant: it holds the few running chunks alone.
    whole = re.compile(
        r"SCAN (chunks|requests|results)(?! USING INDEX ix_chunks_running)"
        if database.dialect == "sqlite"
        else r"Seq Scan on (chunks|requests|results)"
    )
    for statement, plan in found.items():
        assert not whole.search(plan), f"{statement}\n{plan}"


def test_states_are_spelt_out_where_an_index_is_partial(
    prepared: tuple[Database, str, str],
) -> None:
    """A plan for any value, as PostgreSQL makes of a prepared statement, has no such index."""
    database, job_id, worker = prepared
    for name in ("claim", "held", "count", "keys", "workers to reap", "complete", "status"):
        for statement in plans(database, job_id, worker, WORK[name]):
            where = statement.partition("FROM chunks")[2]
            assert not re.search(r"state (=|IN) \(?(%\(|\?)", where), statement


def test_the_index_of_queued_chunks_gives_the_next_one(
    prepared: tuple[Database, str, str],
) -> None:
    """In its order, without a sort of all that wait."""
    database, job_id, worker = prepared
    found = plans(database, job_id, worker, WORK["claim"])
    (plan,) = [plan for statement, plan in found.items() if "ORDER BY chunks.deaths" in statement]
    assert "ix_chunks_queued" in plan
    assert not re.search("Sort|TEMP B-TREE", plan)
