"""Fault: a deliverer is killed with -9 at each of its statements; some meet; a receiver hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, delete, select, update

from models.base import db_now
from models.database import Database
from models.job import Job
from models.store import webhooks as store
from models.webhook import Webhook
from nightherd.settings import Settings
from producer.inputs.reader import Row
from producer.jobs.create import JobOptions, submit
from producer.webhooks.delivery import WebhookDeliverer
from tests.conftest import wait_until
from tests.faults.conftest import PROMPTS, Fleet
from tests.faults.killing import at_once, kills, url_of, wait_for_rollback
from tests.receiver import SECRET, Receiver, receiver
from tests.seeding import make_job, make_worker, work_off

SENT = "producer.webhooks.sender:Sender.send"
"""Sending is no statement, so before and after it are points of their own."""


def _settings() -> Settings:
    return Settings.model_validate({"webhook_secret": SECRET, "webhook_allow_private": True})


def deliver_in_child(url: str) -> None:
    WebhookDeliverer(Database(url), _settings()).round()


def deliver_when_all_are_ready(go: Callable[[], None], url: str) -> None:
    database = Database(url)
    database.now()
    go()
    WebhookDeliverer(database, _settings()).round()


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as started:
        yield started


def _ended_jobs(database: Database, worker: str, hook: Receiver, count: int = 1) -> None:
    jobs = [make_job(database, 1) for _ in range(count)]
    with database.write() as connection:
        for job_id in jobs:
            store.expect(connection, job_id=job_id, on_complete=hook.url, on_failure=None)
    work_off(database, worker)


def _state(database: Database) -> str:
    with database.read() as connection:
        return connection.execute(select(Webhook.state)).scalar_one()


def _next_deliverer(database: Database) -> None:
    """Another one, when the dead one's claim has lapsed."""
    with database.write() as connection:
        connection.execute(
            update(Webhook).where(Webhook.state == "due").values(next_attempt_at=db_now(-1))
        )
    WebhookDeliverer(database, _settings()).round()


def test_deliverer_kill9_at_every_statement_of_a_delivery(
    database: Database, hook: Receiver
) -> None:
    worker = make_worker(database)
    times: dict[str, set[int]] = {}
    points = 0
    _ended_jobs(database, worker, hook)
    for point in kills(deliver_in_child, url_of(database), also=[SENT]):
        points += 1
        wait_for_rollback(database)
        before = _state(database)
        _next_deliverer(database)
        assert _state(database) == "delivered", point
        assert len({(received.id, received.raw) for received in hook.received}) == 1, point
        received = len(hook.received)
        times.setdefault(before, set()).add(received)
        _next_deliverer(database)
        assert len(hook.received) == received, point
        with database.write() as connection:
            connection.execute(delete(Job))
        hook.received.clear()
        _ended_jobs(database, worker, hook)
    # And the one that survived.
    assert len(hook.received) == 1
    assert _state(database) == "delivered"
    # Between the answer and its record it is sent again, after a recorded 2xx never.
    assert times == {"waiting": {1}, "due": {1, 2}, "delivered": {1}}
    assert points > 10


def submit_in_child(url: str, home: str, store_batch: int) -> None:
    def before_commit(connection: Connection, job_id: str) -> None:
        store.expect(connection, job_id=job_id, on_complete="https://a.example", on_failure=None)

    settings = Settings.model_validate({"home": home, "store_batch": store_batch})
    rows = [Row(line, {"prompt": "a"}, None, None) for line in (1, 2)]
    submit(
        Database(url),
        settings,
        rows,
        JobOptions(checkpoint_key="demo"),
        before_commit=before_commit,
    )


def test_producer_kill9_leaves_no_live_job_without_its_webhook(
    database: Database, tmp_path: Path
) -> None:
    """A small job, which is stored in one transaction, and one in several."""
    states: set[tuple[str, str | None]] = set()
    found = select(Job.state, Webhook.state).outerjoin(Webhook, Webhook.job_id == Job.id)
    for store_batch in (2, 1):
        for _ in kills(submit_in_child, url_of(database), str(tmp_path), store_batch):
            wait_for_rollback(database)
            with database.read() as connection:
                states |= {(row[0], row[1]) for row in connection.execute(found)}
        assert ("queued", "waiting") in states
    assert states == {("storing", None), ("queued", "waiting")}


def test_deliverers_of_several_processes_at_once(database: Database, hook: Receiver) -> None:
    worker = make_worker(database)
    _ended_jobs(database, worker, hook, count=30)
    at_once([(deliver_when_all_are_ready, [url_of(database)])] * 3)
    assert len(hook.received) == 30
    assert len({received.id for received in hook.received}) == 30
    with database.read() as connection:
        assert set(connection.execute(select(Webhook.state)).scalars()) == {"delivered"}


def test_worker_goes_on_and_leaves_at_once_while_a_receiver_hangs(
    sqlite_fleet: Fleet, hook: Receiver
) -> None:
    over = threading.Event()
    hook.answers.append(lambda handler: over.wait(60) and None)
    variables = {
        "NIGHTHERD_WEBHOOK_SECRET": SECRET,
        "NIGHTHERD_WEBHOOK_ALLOW_PRIVATE": "true",
        "NIGHTHERD_WEBHOOK_TIMEOUT": "60",
    }
    worker = sqlite_fleet.start(variables=variables)
    try:
        job = sqlite_fleet.submit(PROMPTS[:4], publish=False)
        with sqlite_fleet.database.write() as connection:
            store.expect(connection, job_id=job.job_id, on_complete=hook.url, on_failure=None)
        sqlite_fleet.publish_wakeups()
        wait_until(lambda: len(hook.received) == 1, seconds=30, what="the attempt")
        sqlite_fleet.submit(PROMPTS)
        sqlite_fleet.is_clean(seconds=30)
        assert sqlite_fleet.workers() == ["ready"]
        worker.terminate()
        assert sqlite_fleet.ends(worker, within=5) == 0
    finally:
        over.set()
    assert sqlite_fleet.workers() == ["stopped"]
    assert _state(sqlite_fleet.database) == "due"
    _next_deliverer(sqlite_fleet.database)
    assert _state(sqlite_fleet.database) == "delivered"
    assert len({received.id for received in hook.received}) == 1
