"""Webhooks in SQL: what becomes due and with which body, who may claim it, when it is over."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Row, delete, event, insert, select, update

from models.base import db_now
from models.database import Database
from models.job import Job
from models.schedule import Firing, Schedule
from models.store import jobs, webhooks
from models.store.webhooks import Delivery
from models.webhook import Webhook
from tests.seeding import claim as claim_chunk
from tests.seeding import make_job, make_worker, save, work_off

URL = "https://hooks.example/a"


def expect(
    database: Database, job_id: str, *, complete: str | None = URL, failure: str | None = None
) -> None:
    with database.write() as connection:
        webhooks.expect(connection, job_id=job_id, on_complete=complete, on_failure=failure)


def rows(database: Database) -> list[Row[Any]]:
    with database.read() as connection:
        return list(connection.execute(select(Webhook).order_by(Webhook.occasion)))


def make_due(database: Database) -> int:
    with database.write() as connection:
        return webhooks.make_due(connection)


def poll(database: Database) -> tuple[bool, int]:
    with database.read() as connection:
        return webhooks.poll(connection, limit=4)


def claim(database: Database, *, lease: float = 60.0, attempts: int = 3) -> Delivery | None:
    with database.write() as connection:
        return webhooks.claim(connection, lease_seconds=lease, attempts=attempts)


def claimed(database: Database, **options: Any) -> Delivery:
    delivery = claim(database, **options)
    assert delivery is not None
    return delivery


def refuse(database: Database, delivery: Delivery, retry: float | None) -> None:
    with database.write() as connection:
        webhooks.not_delivered(
            connection, delivery, status=500, error="it was answered with 500", retry_seconds=retry
        )


def deliver(database: Database, delivery: Delivery) -> None:
    with database.write() as connection:
        webhooks.delivered(connection, delivery.id, 204)


def due_one(database: Database) -> None:
    worker = make_worker(database)
    job_id = make_job(database, 1)
    expect(database, job_id)
    work_off(database, worker)
    assert make_due(database) == 1


# What becomes due.


def test_expected_twice_is_expected_once(database: Database) -> None:
    job_id = make_job(database)
    for _ in range(2):
        expect(database, job_id, failure=f"{URL}/b")
    assert [(row.occasion, row.url, row.state) for row in rows(database)] == [
        ("complete", URL, "waiting"),
        ("failure", f"{URL}/b", "waiting"),
    ]
    assert poll(database) == (False, 0)
    assert make_due(database) == 0


def test_a_job_that_is_completed(database: Database) -> None:
    worker = make_worker(database)
    job_id = make_job(database, 8, name="nightly")
    expect(database, job_id, failure=URL)
    work_off(database, worker)
    assert poll(database) == (True, 0)
    assert make_due(database) == 2
    assert poll(database) == (False, 1)
    complete, failure = rows(database)
    assert (complete.state, failure.state) == ("due", "dropped")
    with database.read() as connection:
        finished = connection.execute(select(Job.finished_at)).scalar_one()
    assert complete.payload["type"] == "job.completed"
    assert complete.payload["timestamp"] == finished.isoformat()
    data = complete.payload["data"]
    assert {name: data[name] for name in ("job", "name", "state", "requests", "samples")} == {
        "job": job_id,
        "name": "nightly",
        "state": "completed",
        "requests": 8,
        "samples": 8,
    }
    assert (data["done"], data["failed"], data["prompt_tokens"]) == (8, 0, 24)
    assert (data["schedule"], data["firing"], data["scheduled_for"]) == (None, None, None)


def test_a_job_with_failed_rows_is_completed_and_failed(database: Database) -> None:
    worker = make_worker(database)
    job_id = make_job(database, 4, chunk_size=4)
    expect(database, job_id, failure=URL)
    save(database, worker, claim_chunk(database, worker), failing={1: "engine_error"})
    assert make_due(database) == 2
    types = {row.occasion: (row.state, row.payload["type"]) for row in rows(database)}
    assert types == {"complete": ("due", "job.completed"), "failure": ("due", "job.failed")}
    assert {row.payload["data"]["failed"] for row in rows(database)} == {1}


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_job_that_ends_early_waits_for_what_is_being_saved(database: Database, end: str) -> None:
    worker = make_worker(database)
    job_id = make_job(database, 8, chunk_size=4)
    expect(database, job_id, failure=URL)
    held = claim_chunk(database, worker)
    with database.write() as connection:
        if end == "cancelled":
            jobs.cancel(connection, job_id)
        else:
            connection.execute(update(Job).values(deadline=db_now(-1)))
            assert jobs.expire_overdue(connection) == [job_id]
    assert poll(database) == (False, 0)
    assert make_due(database) == 0
    save(database, worker, held)
    assert make_due(database) == 2
    complete, failure = rows(database)
    assert (complete.state, failure.state) == ("dropped", "due")
    assert failure.payload["type"] == f"job.{end}"
    assert failure.payload["data"]["done"] == 4


def test_a_firings_job_names_its_schedule(database: Database) -> None:
    with database.write() as connection:
        schedule_id = connection.execute(
            insert(Schedule).values(
                name="nightly",
                cron="0 2 * * *",
                timezone="Europe/Berlin",
                input={"path": "/a"},
                options={},
            )
        ).inserted_primary_key[0]
        firing_id = connection.execute(
            insert(Firing).values(
                schedule_id=schedule_id, scheduled_for_utc=db_now(), state="submitted"
            )
        ).inserted_primary_key[0]
    job_id = make_job(database, 1, firing_id=firing_id)
    expect(database, job_id)
    work_off(database, make_worker(database))
    make_due(database)
    data = rows(database)[0].payload["data"]
    assert (data["schedule"], data["firing"]) == ("nightly", firing_id)
    assert data["scheduled_for"].endswith("+00:00")


def test_a_firing_that_failed_is_due_at_once(database: Database) -> None:
    with database.write() as connection:
        schedule_id = connection.execute(
            insert(Schedule).values(
                name="nightly", cron="@daily", timezone="UTC", input={"path": "/a"}, options={}
            )
        ).inserted_primary_key[0]
        firing_id = connection.execute(
            insert(Firing).values(
                schedule_id=schedule_id, scheduled_for_utc=db_now(), state="failed"
            )
        ).inserted_primary_key[0]
        webhooks.firing_failed(connection, firing_id, "firing.failed", None, {"a": 1})
        webhooks.firing_failed(connection, firing_id, "firing.failed", URL, {"a": 1})
    delivery = claimed(database)
    assert delivery.payload["type"] == "firing.failed"
    assert delivery.payload["data"] == {"a": 1}
    assert claim(database) is None


def test_more_than_a_page(database: Database) -> None:
    worker = make_worker(database)
    job_id = make_job(database, 1)
    with database.write() as connection:
        connection.execute(
            insert(Webhook),
            [
                {"id": f"{n}", "job_id": job_id, "occasion": "complete", "url": URL,
                 "state": "waiting"}
                for n in range(150)
            ],
        )  # fmt: skip
    work_off(database, worker)
    assert [make_due(database) for _ in range(3)] == [100, 50, 0]
    assert poll(database) == (False, 4)


def test_a_job_that_goes_takes_its_webhooks_along(database: Database) -> None:
    job_id = make_job(database)
    expect(database, job_id)
    with database.write() as connection:
        connection.execute(delete(Job).where(Job.id == job_id))
    assert rows(database) == []


# Claims and answers.


def test_a_claim_excludes_others_until_it_lapses(database: Database) -> None:
    due_one(database)
    first = claimed(database)
    assert (first.attempt, first.url) == (1, URL)
    assert claim(database) is None
    assert poll(database) == (False, 0)
    with database.write() as connection:
        connection.execute(update(Webhook).values(next_attempt_at=db_now(-1)))
    second = claimed(database)
    assert (second.id, second.attempt, second.payload) == (first.id, 2, first.payload)
    # The first one comes back: its failure counts no more, a 2xx of it does.
    refuse(database, first, None)
    assert rows(database)[0].state == "due"
    deliver(database, first)
    assert rows(database)[0].state == "delivered"
    refuse(database, second, 1.0)
    assert rows(database)[0].state == "delivered"
    assert (rows(database)[0].last_status, rows(database)[0].last_error) == (204, None)


def test_a_pause_between_attempts_and_an_end(database: Database) -> None:
    due_one(database)
    refuse(database, claimed(database), 3600.0)
    (row,) = rows(database)
    assert (row.state, row.attempts, row.last_status) == ("due", 1, 500)
    assert claim(database) is None
    with database.write() as connection:
        connection.execute(update(Webhook).values(next_attempt_at=db_now(-1)))
    refuse(database, claimed(database), None)
    (row,) = rows(database)
    assert (row.state, row.attempts, row.next_attempt_at) == ("failed", 2, None)
    assert row.finished_at is not None
    assert claim(database) is None


def test_a_last_attempt_whose_answer_was_not_recorded(database: Database) -> None:
    due_one(database)
    claimed(database, lease=-1.0, attempts=1)
    assert claim(database, attempts=1) is None
    (row,) = rows(database)
    assert (row.state, row.attempts, row.last_error) == ("failed", 1, webhooks.LOST)


def test_recording_an_answer_again_changes_nothing(database: Database) -> None:
    """The commit took place, and only its answer was lost."""
    due_one(database)
    delivery = claimed(database)
    for _ in range(2):
        refuse(database, delivery, 60.0)
    (row,) = rows(database)
    assert (row.state, row.attempts) == ("due", 1)
    for _ in range(2):
        deliver(database, delivery)
    finished = rows(database)[0].finished_at
    deliver(database, delivery)
    assert rows(database)[0].finished_at == finished


def test_the_oldest_goes_first_and_one_jobs_own_can_be_asked_for(database: Database) -> None:
    worker = make_worker(database)
    old, new = (make_job(database, 1) for _ in range(2))
    for job_id in (old, new):
        expect(database, job_id)
    work_off(database, worker)
    make_due(database)
    with database.write() as connection:
        connection.execute(
            update(Webhook).where(Webhook.job_id == old).values(next_attempt_at=db_now(-9))
        )
        mine = webhooks.claim(connection, lease_seconds=60, attempts=3, job_id=new)
        assert mine is not None
        assert mine.payload["data"]["job"] == new
    assert claimed(database).payload["data"]["job"] == old


def test_polling_is_one_statement_by_an_index(database: Database) -> None:
    executed: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, given: Any, *_rest: Any) -> None:
        executed.append((statement, given))

    event.listen(database.engine, "before_cursor_execute", note)
    poll(database)
    event.remove(database.engine, "before_cursor_execute", note)
    ((statement, given),) = [one for one in executed if not one[0].startswith("BEGIN")]
    if database.dialect == "postgresql":
        return  # without statistics its plans say nothing
    with database.read() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", given).all()
    steps = [step[-1] for step in plan if "webhooks" in step[-1]]
    assert len(steps) == 2
    assert all("SEARCH webhooks USING" in step for step in steps), steps
    assert all("INDEX ix_webhooks_open (state=" in step for step in steps), steps
