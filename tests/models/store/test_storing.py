"""Storing a job: in batches, repeatable, invisible until it is whole."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import event, func, select, update
from sqlalchemy.exc import IntegrityError

from models.base import db_now, new_id
from models.database import Database
from models.job import Chunk, Job, Request
from models.store import chunks, storing
from nightherd.errors import ConflictError
from tests.seeding import KEY, job, job_chunks, make_job, make_worker, pending_requests, try_claim
from tests.seeding import claim as claim_one


def new_job(**changes: object) -> storing.NewJob:
    values = {"id": new_id(), "checkpoint_key": KEY, "seed": 1, "params": {}, **changes}
    return storing.NewJob(**values)  # type: ignore[arg-type]


def requests(first: int, count: int) -> list[storing.NewRequest]:
    return [
        storing.NewRequest(i, {"prompt": f"p{i}"}, {"max_tokens": i + 1}, f"id-{i}", 1)
        for i in range(first, first + count)
    ]


def live_in_tokyo(connection: Any, _record: object) -> None:
    connection.execute("SET timezone = 'Asia/Tokyo'")
    connection.commit()


def count_rows(database: Database, job_id: str) -> int:
    with database.read() as connection:
        return connection.execute(
            select(func.count()).select_from(Request).where(Request.job_id == job_id)
        ).scalar_one()


def test_every_transaction_may_be_repeated(database: Database) -> None:
    """A commit whose answer was lost took place: doing it again changes nothing."""
    new = new_job()
    ranges = [storing.ChunkRange(0, 3, 3), storing.ChunkRange(3, 3, 3)]
    with database.write() as connection:
        storing.begin_storing(connection, new)
    for batch in (requests(0, 4), requests(4, 2)):
        for _ in range(2):
            with database.write() as connection:
                storing.store_requests(connection, new.id, batch)
    for _ in range(2):
        with database.write() as connection:
            storing.finish_storing(connection, new.id, ranges)
    assert count_rows(database, new.id) == 6
    assert [(row.first_position, row.size) for row in job_chunks(database, new.id)] == [
        (0, 3),
        (3, 3),
    ]
    row = job(database, new.id)
    assert (row.state, row.total_requests, row.total_samples) == ("queued", 6, 6)


def test_the_repeated_end_changes_nothing_even_when_the_job_runs_already(
    database: Database,
) -> None:
    job_id = make_job(database, 8)
    held = claim_one(database, make_worker(database))
    with database.write() as connection:
        storing.finish_storing(connection, job_id, [storing.ChunkRange(0, 8, 8)])
    assert job(database, job_id).state == "running"
    assert job_chunks(database, job_id)[0].id == held.chunk_id
    assert len(job_chunks(database, job_id)) == 2


def test_an_id_that_is_taken_is_refused(database: Database) -> None:
    new = new_job()
    with database.write() as connection:
        storing.begin_storing(connection, new)
    with pytest.raises(IntegrityError), database.write() as connection:
        storing.begin_storing(connection, new)


def test_a_job_that_is_being_stored_can_be_neither_claimed_nor_counted(
    database: Database,
) -> None:
    job_id = make_job(database, storing=True)
    assert try_claim(database, make_worker(database)) == "nothing"
    with database.read() as connection:
        assert chunks.keys_with_work(connection) == []
        assert chunks.count_queued(connection, KEY, limit=10) == 0
    assert job(database, job_id).state == "storing"


@pytest.mark.parametrize(
    "text",
    [
        "a\tb\nc\\N\r",
        'quotes " and \\ backslashes',
        "umlauts äöü, 漢字, 🐑",
        "\u2028 line separators \u2029",
        "",
    ],
)
def test_text_comes_back_as_it_was(database: Database, text: str) -> None:
    new = new_job(name=text, metadata={"note": text})
    with database.write() as connection:
        storing.begin_storing(connection, new)
        row = storing.NewRequest(0, {"prompt": text}, {"stop": [text]}, text or None, 1)
        storing.store_requests(connection, new.id, [row])
        storing.finish_storing(connection, new.id, [storing.ChunkRange(0, 1, 1)])
    (got,) = pending_requests(database, claim_one(database, make_worker(database)))
    assert got.body == {"prompt": text}
    assert got.params == {"stop": [text]}
    assert (job(database, new.id).name, job(database, new.id).metadata_) == (text, {"note": text})


def test_numbers_keep_all_their_bits(database: Database) -> None:
    """Seeds have 63 bits; a chunk of many samples has more than 32."""
    seed = 2**63 - 1
    new = new_job(seed=seed, params={"seed": -(2**63), "temperature": 0.1 + 0.2})
    with database.write() as connection:
        storing.begin_storing(connection, new)
        storing.store_requests(connection, new.id, requests(0, 1))
        storing.finish_storing(connection, new.id, [storing.ChunkRange(0, 1, 2**40)])
    held = claim_one(database, make_worker(database))
    assert (held.seed, held.samples) == (seed, 2**40)
    assert held.params == {"seed": -(2**63), "temperature": 0.1 + 0.2}
    assert job(database, new.id).total_samples == 2**40


def test_times_are_utc_whatever_zone_they_came_in(database: Database) -> None:
    if database.dialect == "postgresql":
        event.listen(database.engine, "connect", live_in_tokyo)
        with database.read() as connection:
            assert connection.exec_driver_sql("SHOW timezone").scalar_one() == "Asia/Tokyo"
    local = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=-5)))
    job_id = make_job(database, deadline=local)
    row = job(database, job_id)
    assert row.deadline == local
    assert row.deadline.utcoffset() == timedelta(0)
    assert abs(row.created_at - datetime.now(UTC)) < timedelta(seconds=30)
    assert abs(database.now() - datetime.now(UTC)) < timedelta(seconds=30)


def test_a_time_without_a_zone_never_reaches_the_database(sqlite_database: Database) -> None:
    with pytest.raises(Exception, match="without a zone"):
        make_job(sqlite_database, deadline=datetime(2030, 1, 1))


# Removal of what a killed submit left.


def stand_still(database: Database, job_id: str, seconds: float) -> None:
    with database.write() as connection:
        connection.execute(update(Job).where(Job.id == job_id).values(touched_at=db_now(-seconds)))


def remove_orphans(database: Database, limit: int = 20_000) -> int:
    with database.write() as connection:
        return storing.remove_orphans(connection, idle_seconds=600, limit=limit)


def test_an_orphan_is_removed_in_batches(database: Database) -> None:
    job_id = make_job(database, 10, storing=True)
    assert remove_orphans(database) == 0
    stand_still(database, job_id, 601)
    assert [remove_orphans(database, limit=4) for _ in range(3)] == [4, 4, 3]
    assert count_rows(database, job_id) == 0
    assert remove_orphans(database, limit=4) == 0
    with database.read() as connection:
        assert connection.execute(select(Job.id)).all() == []


def test_a_stored_job_is_never_an_orphan(database: Database) -> None:
    job_id = make_job(database)
    stand_still(database, job_id, 10_000)
    assert remove_orphans(database) == 0
    with database.write() as connection:
        assert storing.discard_storing(connection, job_id) == 0
    assert count_rows(database, job_id) == 8


def test_a_submit_that_wakes_up_while_it_is_removed_is_refused(database: Database) -> None:
    """Else it would go on and end with a job that has holes."""
    job_id = make_job(database, 10, storing=True)
    stand_still(database, job_id, 601)
    assert remove_orphans(database, limit=4) == 4
    with pytest.raises(ConflictError, match="submit it again"), database.write() as connection:
        storing.store_requests(connection, job_id, requests(10, 2))
    with pytest.raises(ConflictError), database.write() as connection:
        storing.finish_storing(connection, job_id, [storing.ChunkRange(0, 12, 12)])
    assert remove_orphans(database) == 7
    with pytest.raises(ConflictError), database.write() as connection:
        storing.store_requests(connection, job_id, requests(10, 2))


def test_a_batch_is_whole_or_absent(database: Database) -> None:
    """A failure within a batch (here: a custom_id twice) leaves nothing of it."""
    new = new_job()
    with database.write() as connection:
        storing.begin_storing(connection, new)
    twice = [*requests(0, 3), storing.NewRequest(3, {"prompt": "p"}, None, "id-0", 1)]
    with pytest.raises(IntegrityError), database.write() as connection:
        storing.store_requests(connection, new.id, twice)
    assert count_rows(database, new.id) == 0
    with database.write() as connection:
        storing.store_requests(connection, new.id, requests(0, 3))
    assert count_rows(database, new.id) == 3


def test_the_same_custom_id_may_stand_in_two_jobs(database: Database) -> None:
    for _ in range(2):
        new = new_job()
        with database.write() as connection:
            storing.begin_storing(connection, new)
            storing.store_requests(connection, new.id, requests(0, 2))
        assert count_rows(database, new.id) == 2


def test_deleting_a_job_deletes_all_that_belongs_to_it(database: Database) -> None:
    job_id = make_job(database)
    with database.write() as connection:
        connection.execute(Job.__table__.delete().where(Job.id == job_id))
    with database.read() as connection:
        for table in (Request, Chunk):
            rows = connection.execute(select(func.count()).select_from(table)).scalar_one()
            assert rows == 0
