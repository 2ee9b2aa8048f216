"""`nightherd beat`: the housekeeping tick in a process of its own."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading

import click

log = logging.getLogger("nightherd.beat")

_GOODBYE_SECONDS = 1.0
"""How long the attempt at a webhook that is under way is waited for."""


@click.command()
def beat() -> None:
    """Run the housekeeping tick until told to stop (SIGTERM, Ctrl-C).

    Returns the chunks of dead workers, rings again for queued work, completes and expires jobs.
    Workers tick too; a beat keeps going when none is up. Any number may run; none leads.

    \b
    Example:
      nightherd beat
    """
    from nightherd.broker import EmbeddedBroker, broker_url
    from nightherd.errors import BrokerError, DatabaseError
    from nightherd.log import OncePerState, configure_logging
    from nightherd.settings import load_settings
    from producer.database import open_database
    from producer.dispatch import Dispatcher
    from producer.housekeeping import Housekeeper
    from producer.webhooks import Courier

    settings = load_settings()
    configure_logging(settings.log_level)
    database = open_database(settings)
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
        courier = Courier(database, settings)
        courier.start()
        stack.callback(courier.stop, _GOODBYE_SECONDS)
        log.info("beat started, one tick every %g s", settings.tick_seconds)
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
    database.close()
    log.info("beat stopped")
