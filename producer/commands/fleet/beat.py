"""`nightherd beat`: schedules fire, and the housekeeping tick, in a process of its own."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from models.database import Database
    from nightherd.settings import Settings
    from producer.fleet.dispatch import Dispatcher

log = logging.getLogger("nightherd.beat")

_FIRING_LOOPS = 2
"""Threads that fire: while one stores a large input, the other goes on."""
_FIRING_STOP_SECONDS = 5.0
_WEBHOOK_STOP_SECONDS = 1.0
"""How long the attempt at a webhook that is under way is waited for."""


@click.command()
def beat() -> None:
    """Fire schedules and run the housekeeping tick until told to stop (SIGTERM, Ctrl-C).

    Fires what is due, writes the outputs of what has ended, sends webhooks. Returns the chunks of
    dead workers, publishes wake-ups for queued work, completes and expires jobs. Workers tick too;
    only a beat fires. Any number may run; none leads.

    \b
    Example:
      nightherd beat
    """
    from nightherd.broker import EmbeddedBroker, broker_url
    from nightherd.errors import BrokerError, DatabaseError
    from nightherd.log import OncePerState, configure_logging
    from nightherd.settings import load_settings
    from producer.fleet.dispatch import Dispatcher
    from producer.fleet.housekeeping import Housekeeper
    from producer.fleet.open_database import open_database
    from producer.webhooks.delivery import WebhookDeliverer

    settings = load_settings()
    configure_logging(settings.log_level)
    # One for the tick, one for the deliverer, and for each firing loop one and one for its lease.
    database = open_database(settings, pool_size=2 + 2 * _FIRING_LOOPS)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    database_down, broker_down = OncePerState(log), OncePerState(log)
    with contextlib.ExitStack() as stack:
        broker = None
        if settings.broker_url is None:
            broker = stack.enter_context(EmbeddedBroker(settings.home).use())
        dispatcher = Dispatcher(database, settings, broker_url(settings))
        housekeeper = Housekeeper(database, dispatcher, settings)
        deliverer = WebhookDeliverer(database, settings)
        deliverer.start()
        stack.callback(deliverer.stop, _WEBHOOK_STOP_SECONDS)
        log.info("beat started, one tick every %g s", settings.tick_seconds)
        threads = _start_firing_loops(database, settings, dispatcher, stop)
        while not stop.is_set():
            try:
                if broker is not None and broker.ensure():
                    log.warning("the embedded broker had died; started again")
                broker_down.end("the broker answers again")
            except BrokerError as error:
                broker_down.begin("%s; each tick tries again", error)
            try:
                housekeeper.tick()
            except DatabaseError as error:
                database_down.begin("%s; each tick tries again", error)
            else:
                database_down.end("the database answers again")
            stop.wait(settings.tick_seconds)
        for thread in threads:
            # One in the middle of a large input is left: its claim lapses.
            thread.join(_FIRING_STOP_SECONDS)
    database.close()
    log.info("beat stopped")


def _start_firing_loops(
    database: Database, settings: Settings, dispatcher: Dispatcher, stop: threading.Event
) -> list[threading.Thread]:
    from producer.schedules.firing_loop import FiringLoop, run

    publish_wakeups = _wakeup_publisher(dispatcher)
    threads = []
    for number in range(_FIRING_LOOPS):
        loop = FiringLoop(database, settings, publish_wakeups=publish_wakeups)
        thread = threading.Thread(
            target=run,
            args=(loop, settings.schedule_seconds, stop),
            name=f"firing-loop-{number}",
            daemon=True,
        )
        thread.start()
        threads.append(thread)
    return threads


def _wakeup_publisher(dispatcher: Dispatcher) -> Callable[[str], None]:
    """Publishes wake-ups for a checkpoint; what fails now is left to the tick."""
    from nightherd.errors import NightherdError

    def publish_wakeups(checkpoint_key: str) -> None:
        try:
            dispatcher.top_up(checkpoint_key)
        except NightherdError as error:
            log.debug("no wake-up for %s, the tick publishes it: %s", checkpoint_key, error)

    return publish_wakeups
