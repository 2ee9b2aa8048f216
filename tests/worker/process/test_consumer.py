from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.worker import WorkController, state

from nightherd.queue import WAKE_TASK, make_app, publishing_connection, queue_name, wake_queue
from nightherd.settings import Settings
from tests.conftest import wait_until
from tests.fakes import CHECKPOINT
from worker.process import consumer as module
from worker.process.consumer import Consumer

QUEUE = queue_name(CHECKPOINT)


class Listener:
    """A consumer in a thread, and how often it was woken."""

    def __init__(self, broker_url: str, settings: Settings) -> None:
        self.broker_url = broker_url
        self.settings = settings
        self.woken = 0
        self.draining = threading.Event()
        self.consumer = Consumer(
            broker_url,
            settings,
            [QUEUE],
            name="test",
            on_wake=self._on_wake,
            draining=self.draining,
        )
        self.thread = threading.Thread(target=self.consumer.run, daemon=True)
        self.thread.start()

    def _on_wake(self) -> None:
        self.woken += 1

    def publish(self) -> None:
        app = make_app(self.broker_url, self.settings)
        with publishing_connection(app, self.settings) as connection:
            app.send_task(
                WAKE_TASK,
                kwargs={"checkpoint": CHECKPOINT},
                queue=wake_queue(QUEUE),
                connection=connection,
            )

    def stop(self) -> None:
        self.draining.set()
        self.consumer.stop()
        self.thread.join(10)


@pytest.fixture
def listener(
    broker_url: str, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Listener]]:
    monkeypatch.setattr(module, "_RESTART_SECONDS", 0.1)
    made: list[Listener] = []

    def make() -> Listener:
        made.append(Listener(broker_url, make_settings()))
        return made[-1]

    yield make
    for each in made:
        each.stop()
    state.should_stop = None


def test_a_wake_up_wakes_and_the_stop_does_not_wait(listener: Callable[[], Listener]) -> None:
    consumer = listener()
    for count in (1, 2):
        consumer.publish()
        wait_until(lambda count=count: consumer.woken == count)  # type: ignore[misc]
    time.sleep(1.1)
    started = time.monotonic()
    consumer.stop()
    assert not consumer.thread.is_alive()
    assert time.monotonic() - started < 2


def test_told_to_stop_before_it_began_it_does_not_begin(
    broker_url: str, make_settings: Callable[..., Settings]
) -> None:
    draining = threading.Event()
    draining.set()
    consumer = Consumer(
        broker_url, make_settings(), [QUEUE], name="test", on_wake=lambda: None, draining=draining
    )
    consumer.run()
    state.should_stop = None


def test_a_consumer_that_ends_by_itself_is_started_again(
    listener: Callable[[], Listener],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = WorkController.start
    attempts = 0

    def fragile(self: Any) -> None:
        nonlocal attempts
        attempts += 1
        if attempts > 2:
            start(self)

    monkeypatch.setattr(WorkController, "start", fragile)
    consumer = listener()
    consumer.publish()
    wait_until(lambda: consumer.woken == 1)
    assert attempts == 3
    assert "started again" in caplog.text


def test_what_nobody_will_read_can_be_removed(
    broker_url: str, make_settings: Callable[..., Settings], listener: Callable[[], Listener]
) -> None:
    consumer = listener()
    consumer.publish()
    wait_until(lambda: consumer.woken == 1)
    consumer.stop()
    consumer.publish()
    consumer.consumer.purge()
    app = make_app(broker_url, make_settings())
    with publishing_connection(app, make_settings()) as connection:
        assert connection.default_channel.queue_declare(QUEUE).message_count == 0
