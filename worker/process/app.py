"""The worker process: register, load, consume wake-ups, drain, leave.

The checkpoint is loaded before Celery is built: Celery swallows what its start-up signals raise,
and a worker that consumes without an engine is worse than none.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from models.database import Database
from nightherd.broker import EmbeddedBroker, broker_url
from nightherd.errors import CheckpointError, DatabaseError, NightherdError
from nightherd.log import OncePerState
from nightherd.params import canonical_json
from nightherd.queue import queue_name
from nightherd.settings import Settings
from nightherd.text import TextProcessor
from producer.fleet.dispatch import Dispatcher
from producer.fleet.housekeeping import Housekeeper
from producer.fleet.open_database import open_database
from producer.webhooks.delivery import WebhookDeliverer
from worker.chunks.inflight import ChunkRun, InFlight
from worker.chunks.prepare import Preparer
from worker.chunks.task import ChunkRunner
from worker.chunks.writer import Writer
from worker.engine.interface import Engine
from worker.identity import WorkerIdentity
from worker.kernel_folder import kernel_folder, kernels_of
from worker.process.consumer import Consumer
from worker.process.lease import Lease
from worker.process.stop import Interrupted, Stop

log = logging.getLogger("nightherd.worker")

EXIT_HUNG = 70
"""The exit code of a worker whose engine hung."""

_GRACE_SECONDS = 2.0
"""How long a library's call may still take in a drain, once no chunk is in flight: a load, a Redis
that does not answer, the engine's last step."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The options of `nightherd worker`."""

    checkpoint_key: str
    serve_as: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    chat_template: Path | None = None
    only_job: str | None = None
    kv_memory: int | None = None
    """Bytes; None: the setting."""
    context: int | None = None
    """Prompt and output together, at most; None: the checkpoint's."""
    threads: int | None = None
    """None: the setting."""


@dataclass(slots=True)
class Loaded:
    """A checkpoint, ready to generate."""

    text: TextProcessor
    engine: Engine
    provenance: dict[str, Any]


Loader = Callable[[WorkerOptions, Settings], Loaded]


def load_checkpoint(options: WorkerOptions, settings: Settings) -> Loaded:
    """Loads text side and model; raises `CheckpointError` in one line."""
    from worker.checkpoint.device import only_for_kernels
    from worker.checkpoint.load import open_checkpoint
    from worker.checkpoint.memory import available
    from worker.checkpoint.provenance import provenance
    from worker.engine.build import EngineOptions, build_engine

    template = None
    if options.chat_template is not None:
        try:
            template = options.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"chat template {options.chat_template}: {error}") from None
    started = time.monotonic()
    kernels = kernels_of(settings)
    opened = open_checkpoint(
        options.checkpoint_key,
        device=options.device,
        dtype=options.dtype,
        chat_template=template,
        home=settings.home,
        kernels=kernels,
    )
    text, model = opened.text, opened.model
    log.info("loaded %s in %.1f s: %s", model.folder, time.monotonic() - started, model.dtype)
    if options.context is not None:
        text.context_length = min(text.context_length, options.context)
    engine = build_engine(
        model.model,
        vocab_size=text.vocab_size,
        context_length=text.context_length,
        device=model.device,
        available=available(model.device),
        pad_token_id=min(text.eos_token_ids, default=0),
        library_folder=kernel_folder(settings),
        options=EngineOptions(
            kind=settings.engine,
            max_batch=settings.max_batch,
            budget=settings.token_budget,
            kv_memory=options.kv_memory or settings.kv_memory,
            context=options.context,
            threads=options.threads or settings.threads,
            cpu_level=settings.cpu_level,
            widen=only_for_kernels(options.dtype, model.device, kernels),
        ),
    )
    level = kernels.level if kernels and engine.name == "cpu" else None
    facts = provenance(options.checkpoint_key, text, model, engine.name, level)
    return Loaded(text, engine, {"id": provenance_id(facts), **facts})


def provenance_id(facts: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:32]


def serve(options: WorkerOptions, settings: Settings, *, load: Loader = load_checkpoint) -> None:
    """Runs a worker until it is told to stop; returns when its work is saved or handed back.

    Call it in the main thread of a process that ends afterwards: the signals stay caught, so that
    none can turn a good end into a bad one. Raises `NightherdError` for what a user can put right:
    checkpoint, database, broker.
    """
    stop = Stop()
    stop.listen()
    with contextlib.ExitStack() as stack:
        try:
            with stop.interrupting():
                database = open_database(settings, pool_size=3)
                stack.callback(database.close)
                broker = None
                if settings.broker_url is None:
                    broker = stack.enter_context(EmbeddedBroker(settings.home).use())
        except Interrupted:
            return
        _Worker(options, settings, database, broker, stop, close=stack.close).run(load)


class _Worker:
    """The parts of one worker process, and the order in which they start and stop."""

    def __init__(
        self,
        options: WorkerOptions,
        settings: Settings,
        database: Database,
        broker: EmbeddedBroker | None,
        stop: Stop,
        close: Callable[[], None],
    ) -> None:
        self._options = options
        self._settings = settings
        self._database = database
        self._broker = broker
        self._stop = stop
        self._close = close
        self._inflight = InFlight()
        self._dispatcher = Dispatcher(database, settings, broker_url(settings))
        keys = tuple(dict.fromkeys((options.checkpoint_key, *options.serve_as)))
        self._lease = Lease(
            database,
            settings,
            WorkerIdentity(
                checkpoint_key=options.checkpoint_key,
                serves=keys,
                device=options.device,
                slots=settings.slots,
                only_job=options.only_job,
            ),
            self._inflight,
            draining=stop.draining,
            on_hang=self._exit_hung,
            on_broken=self._on_broken,
            on_job_ended=stop.request,
        )
        self._deliverer = WebhookDeliverer(database, settings)
        self._writer: Writer | None = None
        self._consumer: Consumer | None = None
        self._broken: str | None = None
        self._leave_lock = threading.Lock()
        self._left = threading.Event()
        self._engine_stopped = threading.Event()

    @property
    def _identity(self) -> WorkerIdentity:
        return self._lease.identity

    def run(self, load: Loader) -> None:
        self._lease.register()
        log.info("worker %s starts, checkpoint %s", self._identity.id, self._identity.serves)
        self._lease.start()
        for target, name in ((self._watch_drain, "drain"), (self._housekeep, "housekeeping")):
            threading.Thread(target=target, name=name, daemon=True).start()
        self._deliverer.start()
        try:
            with self._stop.interrupting():
                loaded = load(self._options, self._settings)
            self._serve(loaded)
        except Interrupted:
            log.info("told to stop while loading")
        finally:
            self._leave()
        if self._options.only_job is not None:
            # There may be no other process that delivers its webhooks.
            self._deliverer.finish(self._options.only_job)
        if self._broken is not None:
            raise NightherdError(f"the worker cannot go on: {self._broken}; start it again")

    def _serve(self, loaded: Loaded) -> None:
        engine = loaded.engine
        self._identity.device = loaded.provenance["device"]
        writer = self._writer = Writer(
            self._database,
            self._settings,
            loaded.text,
            loaded.provenance,
            on_ended=self._on_ended,
            on_broken=self._on_broken,
            database_time=self._lease.clock.now,
        )
        runner = ChunkRunner(
            self._database,
            self._identity,
            self._inflight,
            engine,
            Preparer(loaded.text, engine),
            writer,
            self._dispatcher,
            self._stop.draining,
        )
        self._consumer = Consumer(
            broker_url(self._settings),
            self._settings,
            [queue_name(key, self._options.only_job) for key in self._identity.serves],
            name=self._identity.id,
            on_wake=runner.wake,
            draining=self._stop.draining,
        )
        engine.start()
        writer.start()
        try:
            if self._lease.ready(engine):
                log.info("worker %s is ready: %s", self._identity.id, self._identity.device)
                for key in self._identity.serves:
                    runner.top_up(key)
                self._consumer.run()
        finally:
            self._stop.request()
            self._inflight.close()
            if not writer.stop(self._settings.drain_seconds):
                log.error("not everything could be saved in time; the rest is computed again")
            # Its step may be a long one, and nobody waits for it any more.
            threading.Thread(target=self._end_engine, args=(engine,), daemon=True).start()

    def _on_ended(self, run: ChunkRun, completed: Sequence[str]) -> None:
        self._inflight.forget(run)
        for job_id in completed:
            log.info("job %s is completed", job_id)
        if completed:
            self._deliverer.wake()
        if self._options.only_job in completed:
            self._stop.request()

    # Stopping.

    def _watch_drain(self) -> None:
        """Once told to stop: aborts what runs, and ends the process if that takes too long."""
        self._stop.wait()
        started = time.monotonic()
        log.info("worker %s drains", self._identity.id)
        self._deliverer.stop()
        self._inflight.close()
        if self._consumer is not None:
            self._consumer.stop()
        abandoned = False
        while not self._left.wait(_POLL_SECONDS):
            passed = time.monotonic() - started
            if passed > _GRACE_SECONDS and not self._inflight.runs() and self._leave():
                self._exit("a library's call takes too long to end")
            if passed > self._settings.drain_seconds and not abandoned:
                abandoned = True
                log.error("the database does not take what is unsaved; it will be computed again")
                if self._writer is not None:
                    self._writer.abandon()
            if passed > 2 * self._settings.drain_seconds:
                log.error("the drain takes too long; leaving at once, the lease will lapse")
                os._exit(1)
        if self._writer is not None and not self._engine_stopped.wait(_GRACE_SECONDS):
            self._exit("the engine's last step takes too long")

    def _exit(self, reason: str) -> None:
        log.info("%s; nothing is held any more, so the process ends without it", reason)
        self._close()
        os._exit(0 if self._broken is None else 1)

    def _end_engine(self, engine: Engine) -> None:
        engine.stop()
        self._engine_stopped.set()

    def _leave(self) -> bool:
        """Hands the work back, once; False if that was done already."""
        with self._leave_lock:
            if self._left.is_set():
                return False
            self._hand_work_back()
            self._left.set()
            log.info("worker %s has stopped", self._identity.id)
            return True

    def _hand_work_back(self) -> None:
        """Gives up the lease and publishes wake-ups for the other workers."""
        self._lease.stop()
        try:
            if self._broken is None:
                self._lease.leave()
            else:
                self._lease.lapse()
        except Exception as error:
            log.warning("the lease could not be given up and will lapse: %s", error)
        try:
            for key in self._identity.serves:
                self._dispatcher.top_up(key)
            if self._options.only_job is not None and self._consumer is not None:
                self._consumer.purge()
        except Exception as error:
            log.warning("no wake-ups published: %s; the next tick will", error)

    def _on_broken(self, reason: str) -> None:
        """The engine (or the writer) can do nothing more: save what is there and exit."""
        if self._broken is None:
            self._broken = reason
            log.critical("broken (%s); this worker stops", reason)
        self._stop.request()

    def _exit_hung(self) -> None:
        log.critical("the engine hangs and the lease is over: exiting, to be started again")
        os._exit(EXIT_HUNG)

    # Housekeeping.

    def _housekeep(self) -> None:
        housekeeper = Housekeeper(self._database, self._dispatcher, self._settings)
        database_down, broker_down = OncePerState(log), OncePerState(log)
        while not self._stop.draining.wait(self._settings.tick_seconds):
            try:
                if self._broker is not None and self._broker.ensure():
                    log.warning("the embedded broker had died; started again")
            except Exception as error:
                broker_down.begin("%s; each tick tries again", error)
            else:
                broker_down.end("the broker answers again")
            try:
                housekeeper.tick()
            except (DatabaseError, SQLAlchemyError) as error:
                database_down.begin("no housekeeping: %s; each tick tries again", error)
            except Exception:
                # The tick must go on: other workers' chunks may depend on it.
                log.exception("a tick failed")
            else:
                database_down.end("the database answers again")
