"""The deliverer and a real receiver: signatures, refusals, retries, limits of time."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Row, select, update

from models.base import db_now
from models.database import Database
from models.store import webhooks as store
from models.webhook import Webhook
from nightherd.settings import Settings
from producer.webhooks.delivery import RETRY_SECONDS, WebhookDeliverer
from producer.webhooks.urls import job_webhooks
from tests.conftest import wait_until
from tests.receiver import SECRET, Receiver, receiver
from tests.seeding import make_job, make_worker, statements, work_off

MakeSettings = Callable[..., Settings]
NO_SECRET = "webhooks wait: NIGHTHERD_WEBHOOK_SECRET is not set where this process runs"


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as started:
        yield started


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings(
        webhook_secret=SECRET,
        webhook_allow_private=True,
        webhook_timeout=2,
        webhook_poll_seconds=0.1,
    )


def ended_job(database: Database, url: str | None, *, failure: str | None = None) -> str:
    """A completed job, with a webhook that waits for its end if there is a `url`."""
    job_id = make_job(database, 2, name="a name")
    with database.write() as connection:
        store.expect(connection, job_id=job_id, on_complete=url, on_failure=failure)
    work_off(database, make_worker(database))
    return job_id


def one(database: Database) -> Row[Any]:
    with database.read() as connection:
        return connection.execute(select(Webhook)).one()


def later(database: Database) -> None:
    """The pause before the next attempt is over."""
    with database.write() as connection:
        connection.execute(
            update(Webhook).where(Webhook.state == "due").values(next_attempt_at=db_now(-1))
        )


# Signatures.


def test_a_delivery_is_signed_and_says_how_the_job_ended(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    job_id = ended_job(database, f"{hook.url}/path?query=1")
    before = time.time()
    WebhookDeliverer(database, settings).round()
    (received,) = hook.received
    assert received.path == "/path?query=1"
    assert received.is_signed()
    assert abs(int(received.headers["webhook-timestamp"]) - before) < 60
    assert received.headers["content-type"] == "application/json"
    assert received.body["type"] == "job.completed"
    assert received.body["data"]["job"] == job_id
    assert (received.body["data"]["done"], received.body["data"]["name"]) == (2, "a name")
    row = one(database)
    assert (row.state, row.attempts, row.last_status, row.id) == ("delivered", 1, 204, received.id)
    WebhookDeliverer(database, settings).round()
    assert len(hook.received) == 1


# What is sent again, and what is not.


def test_500_then_200_is_the_same_delivery_twice(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    ended_job(database, hook.url)
    hook.answers += [500, 200]
    deliverer = WebhookDeliverer(database, settings)
    deliverer.round()
    row = one(database)
    assert (row.state, row.attempts, row.last_status) == ("due", 1, 500)
    deliverer.round()
    assert len(hook.received) == 1, "not before its pause is over"
    later(database)
    deliverer.round()
    first, second = hook.received
    assert (first.id, first.raw) == (second.id, second.raw)
    assert second.is_signed()
    assert one(database).state == "delivered"


def test_pauses_grow_and_an_exhausted_delivery_fails(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    ended_job(database, hook.url)
    hook.answers += [503] * 20
    deliverer = WebhookDeliverer(database, settings)
    pauses = []
    for _ in range(settings.webhook_attempts):
        deliverer.round()
        row = one(database)
        if row.state == "due":
            pauses.append((row.next_attempt_at - database.now()).total_seconds())
            later(database)
    assert (row.state, row.attempts) == ("failed", 10)
    assert row.last_error == "it was answered with 503"
    assert [round(pause / 5) for pause in pauses] == [round(pause / 5) for pause in RETRY_SECONDS]
    assert 3 * 86_400 < sum(RETRY_SECONDS) < 3.3 * 86_400
    later(database)
    deliverer.round()
    assert len(hook.received) == 10


@pytest.mark.parametrize(
    ("answer", "state", "error"),
    [
        (302, "due", "it was answered with 302, a redirect, which is not followed"),
        (307, "due", "it was answered with 307, a redirect, which is not followed"),
        (404, "due", "it was answered with 404"),
        (410, "failed", "it was answered with 410"),
        (200, "delivered", None),
    ],
)
def test_answers(
    sqlite_database: Database,
    settings: Settings,
    hook: Receiver,
    answer: int,
    state: str,
    error: str,
) -> None:
    ended_job(sqlite_database, hook.url)
    hook.answers.append(answer)
    WebhookDeliverer(sqlite_database, settings).round()
    row = one(sqlite_database)
    assert (row.state, row.last_status, row.last_error) == (state, answer, error)
    assert [received.path for received in hook.received] == ["/"]


def test_a_url_that_is_a_secret_is_read_when_it_is_needed(
    sqlite_database: Database, settings: Settings, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended_job(sqlite_database, "env:HOOK_OF_THE_TESTS")
    deliverer = WebhookDeliverer(sqlite_database, settings)
    for value, said in {
        "": "HOOK_OF_THE_TESTS is not set here",
        "https://me:hush@a.example": "HOOK_OF_THE_TESTS must hold no user or password",
    }.items():
        monkeypatch.setenv("HOOK_OF_THE_TESTS", value)
        deliverer.round()
        assert one(sqlite_database).last_error.startswith(said)
        assert "hush" not in one(sqlite_database).last_error
        later(sqlite_database)
    monkeypatch.setenv("HOOK_OF_THE_TESTS", f"{hook.url}/hush")
    deliverer.round()
    assert one(sqlite_database).state == "delivered"
    assert [received.path for received in hook.received] == ["/hush"]


def test_without_a_secret_they_wait_and_it_is_said_once(
    sqlite_database: Database,
    make_settings: MakeSettings,
    hook: Receiver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended_job(sqlite_database, hook.url)
    deliverer = WebhookDeliverer(sqlite_database, make_settings(webhook_allow_private=True))
    for _ in range(3):
        deliverer.round()
    assert (one(sqlite_database).state, one(sqlite_database).attempts) == ("due", 0)
    assert [record.message for record in caplog.records] == [NO_SECRET]
    assert not hook.received


# How long it takes.


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte of the answer's head every 50 ms: no single step is ever late."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
    with contextlib.suppress(OSError):
        for _ in range(200):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)


def silence(handler: BaseHTTPRequestHandler) -> None:
    with contextlib.suppress(OSError):
        handler.rfile.read(1)


@pytest.mark.parametrize("behaviour", [drip, silence])
def test_a_receiver_that_takes_its_time(
    sqlite_database: Database, make_settings: MakeSettings, hook: Receiver, behaviour: Any
) -> None:
    ended_job(sqlite_database, hook.url)
    hook.answers.append(behaviour)
    settings = make_settings(webhook_secret=SECRET, webhook_allow_private=True, webhook_timeout=0.5)
    began = time.monotonic()
    WebhookDeliverer(sqlite_database, settings).round()
    assert time.monotonic() - began < 5
    row = one(sqlite_database)
    assert (row.state, row.last_status, row.last_error) == ("due", None, "no answer within 0.5 s")


def endless(handler: BaseHTTPRequestHandler) -> None:
    """A body without an end, which nobody reads."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")


def garbage(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"220 smtp.example ESMTP\r\n")


def test_bodies_are_not_read_and_no_http_is_no_answer(
    sqlite_database: Database, settings: Settings, hook: Receiver
) -> None:
    ended_job(sqlite_database, hook.url)
    hook.answers += [garbage, endless]
    deliverer = WebhookDeliverer(sqlite_database, settings)
    deliverer.round()
    assert one(sqlite_database).last_error.startswith("RemoteProtocolError")
    later(sqlite_database)
    began = time.monotonic()
    deliverer.round()
    assert one(sqlite_database).state == "delivered"
    assert time.monotonic() - began < 3


# The thread.


@pytest.mark.timeout(60)
def test_a_running_deliverer_delivers_and_stops_at_once(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    deliverer = WebhookDeliverer(database, settings)
    deliverer.start()
    try:
        ended_job(database, hook.url)
        wait_until(lambda: one(database).state == "delivered", what="the delivery")
        ended_job(database, hook.url)
        hook.answers.append(silence)
        wait_until(lambda: len(hook.received) == 2, what="the second attempt")
    finally:
        began = time.monotonic()
        deliverer.stop()
        assert time.monotonic() - began < 0.5, "what is under way is not waited for"
    # Ends it in good order, for the sake of the next test.
    deliverer._thread.join(10)
    assert not deliverer._thread.is_alive()


@pytest.mark.timeout(60)
def test_two_deliverers_at_once_deliver_each_once(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    worker = make_worker(database)
    jobs = [make_job(database, 1, chunk_size=1) for _ in range(20)]
    with database.write() as connection:
        for job_id in jobs:
            store.expect(connection, job_id=job_id, on_complete=hook.url, on_failure=None)
    work_off(database, worker)
    deliverers = [WebhookDeliverer(database, settings) for _ in range(2)]
    for deliverer in deliverers:
        deliverer.start()
    try:
        wait_until(lambda: len(hook.received) >= 20, what="all deliveries")
        wait_until(lambda: _states(database) == {"delivered"}, what="their record")
    finally:
        for deliverer in deliverers:
            deliverer.stop(10)
    assert sorted(received.body["data"]["job"] for received in hook.received) == sorted(jobs)


def _states(database: Database) -> set[str]:
    with database.read() as connection:
        return set(connection.execute(select(Webhook.state)).scalars())


def test_a_slow_receiver_does_not_hold_up_the_others(
    sqlite_database: Database, settings: Settings, hook: Receiver
) -> None:
    worker = make_worker(sqlite_database)
    jobs = [make_job(sqlite_database, 1) for _ in range(3)]
    over = threading.Event()
    hook.answers.append(lambda handler: over.wait(30) and None)
    with sqlite_database.write() as connection:
        for job_id in jobs:
            store.expect(connection, job_id=job_id, on_complete=hook.url, on_failure=None)
    work_off(sqlite_database, worker)
    deliverer = WebhookDeliverer(sqlite_database, settings)
    deliverer.start()
    try:
        wait_until(lambda: len(hook.received) == 3, seconds=4, what="the other two")
    finally:
        over.set()
        deliverer.stop(10)


def test_no_connection_is_held_while_a_receiver_is_waited_for(
    sqlite_database: Database, settings: Settings, hook: Receiver
) -> None:
    """A worker has three connections for all its threads; here there is one."""
    over = threading.Event()
    hook.answers += [lambda handler: over.wait(30) and None] * 4
    for _ in range(4):
        ended_job(sqlite_database, hook.url)
    narrow = Database(sqlite_database.url.render_as_string(), pool_size=1)
    deliverer = WebhookDeliverer(narrow, settings)
    deliverer.start()
    try:
        wait_until(lambda: len(hook.received) == 4, what="four attempts at once")
        began = time.monotonic()
        narrow.now()
        assert time.monotonic() - began < 1
    finally:
        over.set()
        deliverer.stop(10)
        narrow.close()


def test_while_nothing_waits_a_round_is_one_statement(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    make_job(database)
    deliverer = WebhookDeliverer(database, settings)
    with statements(database) as executed:
        deliverer.round()
    assert [word.split()[0] for word in executed if not word.startswith("BEGIN")] == ["SELECT"]
    assert Settings().webhook_poll_seconds >= 2


def test_a_database_that_is_away_is_said_once(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    away = Database("postgresql+psycopg://nobody@127.0.0.1:1/nothing", patience=0)
    deliverer = WebhookDeliverer(away, settings)
    caplog.set_level(logging.INFO)
    deliverer.start()
    try:
        wait_until(lambda: "no webhooks: the database" in caplog.text, what="the line")
        time.sleep(0.4)
    finally:
        deliverer.stop(10)
        away.close()
    assert caplog.text.count("no webhooks: ") == 1


def test_finish_delivers_what_one_job_waits_for_and_nothing_else(
    sqlite_database: Database, settings: Settings, hook: Receiver
) -> None:
    first = ended_job(sqlite_database, f"{hook.url}/first")
    ended_job(sqlite_database, f"{hook.url}/second")
    deliverer = WebhookDeliverer(sqlite_database, settings)
    deliverer.stop()
    deliverer.finish(first)
    assert [received.path for received in hook.received] == ["/first"]
    with sqlite_database.read() as connection:
        (shown,) = job_webhooks(connection, first)
    assert (shown["on"], shown["to"], shown["state"]) == (
        "complete",
        "http://127.0.0.1",
        "delivered",
    )
    json.dumps(shown)


@pytest.mark.parametrize(("url", "lines"), [(None, 0), ("https://a.example", 1)])
def test_finish_without_a_secret_says_so_only_if_something_is_due(
    sqlite_database: Database,
    make_settings: MakeSettings,
    caplog: pytest.LogCaptureFixture,
    url: str | None,
    lines: int,
) -> None:
    ended_job(sqlite_database, "https://b.example")
    job_id = ended_job(sqlite_database, url)
    caplog.set_level(logging.INFO)
    deliverer = WebhookDeliverer(sqlite_database, make_settings())
    for _ in range(2):
        deliverer.finish(job_id)
    assert [record.message for record in caplog.records] == [NO_SECRET] * lines


def test_finish_without_a_secret_leaves_others_their_attempt(
    sqlite_database: Database, make_settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process, which has the secret, has claimed the delivery."""
    job_id = ended_job(sqlite_database, "https://a.example")
    with sqlite_database.write() as connection:
        store.make_due(connection)
        assert store.claim(connection, lease_seconds=60, attempts=10) is not None
    WebhookDeliverer(sqlite_database, make_settings()).finish(job_id)
    assert not caplog.records


# The page.


def test_the_page_verifies_what_is_sent(
    sqlite_database: Database, settings: Settings, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "webhooks.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - what readers copy
    ended_job(sqlite_database, hook.url)
    for secret in (SECRET, "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"):
        monkeypatch.setenv("NIGHTHERD_WEBHOOK_SECRET", secret)
        hook.answers.append(500)
        given = settings.model_copy(update={"webhook_secret": SecretStr(secret)})
        WebhookDeliverer(sqlite_database, given).round()
        later(sqlite_database)
        received = hook.received[-1]
        names["verify"](received.headers, received.raw)
        with pytest.raises(ValueError, match="signature"):
            names["verify"](received.headers, received.raw + b" ")
        old = {**received.headers, "webhook-timestamp": "1774835112"}
        with pytest.raises(ValueError, match="signature"):
            names["verify"](old, received.raw)
    stamp = int(received.headers["webhook-timestamp"])
    monkeypatch.setattr(time, "time", lambda: stamp + 301)
    with pytest.raises(ValueError, match="too old"):
        names["verify"](received.headers, received.raw)


def test_the_page_has_the_fields_that_are_sent(
    sqlite_database: Database, settings: Settings, hook: Receiver
) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "webhooks.md").read_text("utf-8")
    (example,) = re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    head, _, body = example.partition("\n\n")
    shown = json.loads(body.replace("\n", ""))
    ended_job(sqlite_database, hook.url)
    WebhookDeliverer(sqlite_database, settings).round()
    (received,) = hook.received
    assert list(shown) == list(received.body)
    assert list(shown["data"]) == list(received.body["data"])
    for line in head.splitlines()[1:]:
        assert line.partition(":")[0] in received.headers
