"""Celery's part of a worker: takes wake-ups off Redis until it is told to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from nightherd.queue import WAKE_TASK, make_app, publishing_connection, wake_queue
from nightherd.settings import Settings

log = logging.getLogger("nightherd.consumer")

_RESTART_SECONDS = 5.0


class Consumer:
    """Calls `on_wake` for each wake-up in one of `slots` threads.

    A broker that is away is waited for, for ever: Celery tries again every few seconds.
    """

    def __init__(
        self,
        broker_url: str,
        settings: Settings,
        queues: Sequence[str],
        *,
        name: str,
        on_wake: Callable[[], object],
        draining: threading.Event,
    ) -> None:
        self._broker_url = broker_url
        self._settings = settings
        self._queues = tuple(queues)
        self._name = name
        self._on_wake = on_wake
        self._draining = draining
        self._controller: Any = None

    def run(self) -> None:
        """Blocks until `draining` is set and `stop` called; no wake-up is in work any more then."""
        while not self._draining.is_set():
            self._controller = self._make_controller()
            self._controller.start()
            if not self._draining.is_set():
                # It has logged an error that it does not know how to survive. We do: nothing
                # hangs on this connection.
                log.error("the consumer ended by itself; it is started again")
                self._draining.wait(_RESTART_SECONDS)

    def stop(self) -> None:
        """Ends `run` at once; from any thread, after `draining` is set."""
        from celery.worker import state

        state.should_stop = 0
        hub = getattr(self._controller, "hub", None)
        if hub is not None:
            # Celery looks at `should_stop` when its poll returns, once a second; this wakes it.
            hub.call_soon(lambda: None)

    def purge(self) -> None:
        """Removes the wake-ups in queues that nobody will read again. Raises what kombu raises."""
        app = make_app(self._broker_url, self._settings)
        with publishing_connection(app, self._settings) as connection:
            for name in self._queues:
                connection.default_channel.queue_purge(name)

    def _make_controller(self) -> Any:
        app = make_app(self._broker_url, self._settings)
        # Redis that is full, loading, or cannot write its disk refuses with a channel error: that
        # too passes.
        app.conf.broker_channel_error_retry = True

        # The pool's threads look the task up in the default application. A shared task, as they
        # are by default, would also be another consumer's: the one that was started first.
        app.set_default()

        @app.task(name=WAKE_TASK, ignore_result=True, shared=False)  # type: ignore[untyped-decorator]
        def wake(checkpoint: str) -> None:
            self._on_wake()

        app.conf.task_queues = [wake_queue(name) for name in self._queues]
        app.finalize()
        return app.WorkController(
            concurrency=self._settings.slots,
            pool_cls="threads",
            queues=list(self._queues),
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            loglevel=logging.WARNING,
            hostname=f"{self._name}@nightherd",
        )
