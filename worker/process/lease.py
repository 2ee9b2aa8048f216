"""Renews the worker's lease, and checks which chunks it still holds and should run."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

import nightherd
from models.base import db_now, new_id
from models.database import Database
from models.store import chunks, leases
from models.store.chunks import Held
from nightherd.errors import DatabaseError
from nightherd.log import OncePerState
from nightherd.settings import Settings
from worker.chunks.inflight import InFlight
from worker.engine.interface import Engine, EngineStats
from worker.identity import WorkerIdentity
from worker.process.hang_detector import HangDetector

log = logging.getLogger("nightherd.lease")

_SPEED_WINDOW = 10.0
_ID_ATTEMPTS = 3


class DatabaseClock:
    """The database's time, from its distance to this machine's monotonic clock."""

    def __init__(self) -> None:
        self._offset: float | None = None

    def set(self, database_now: datetime) -> None:
        self._offset = database_now.timestamp() - time.monotonic()

    def now(self) -> datetime:
        if self._offset is None:
            return datetime.now(UTC)
        return datetime.fromtimestamp(0, UTC) + timedelta(seconds=self._offset + time.monotonic())


class SpeedMeter:
    """How many tokens an engine puts out, from the counts that it is shown now and then."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def speed(self, stats: EngineStats) -> float:
        """Output tokens a second over the last `_SPEED_WINDOW` seconds or so."""
        now = time.monotonic()
        self._seen.append((now, stats.completion_tokens))
        while len(self._seen) > 2 and now - self._seen[1][0] > _SPEED_WINDOW:
            self._seen.pop(0)
        since, tokens = self._seen[0]
        return (stats.completion_tokens - tokens) / (now - since) if now > since else 0.0


class Lease:
    """Keeps a worker's row alive from its registration to its leaving, in a thread of its own.

    The thread renews every `renew_seconds` and compares chunks every `watch_seconds`. It does not
    renew while the engine hangs: then others take the work over, and `on_hang` is called once the
    lease is over.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        identity: WorkerIdentity,
        inflight: InFlight,
        *,
        draining: threading.Event,
        on_hang: Callable[[], None],
        on_broken: Callable[[str], None],
        on_job_ended: Callable[[], None],
    ) -> None:
        self.identity = identity
        self.clock = DatabaseClock()
        self._database = database
        self._settings = settings
        self._inflight = inflight
        self._draining = draining
        self._on_hang = on_hang
        self._on_broken = on_broken
        self._on_job_ended = on_job_ended
        self._engine: Engine | None = None
        self._hang_detector = HangDetector()
        self._speed_meter = SpeedMeter()
        self._stop = threading.Event()
        self._renewing = threading.Lock()
        self._renewed = time.monotonic()
        self._database_down, self._hangs = OncePerState(log), OncePerState(log)
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def register(self) -> None:
        """Registers the worker; raises `DatabaseError`."""
        for attempt in range(1, _ID_ATTEMPTS + 1):
            try:
                self._database.retrying(self._insert)
                break
            except IntegrityError:
                # Another worker, started in the same millisecond, has this id.
                if attempt == _ID_ATTEMPTS:
                    raise
                self.identity.id = new_id()
        self._renewed = time.monotonic()

    def _insert(self, connection: Connection) -> None:
        identity = self.identity
        leases.register(
            connection,
            leases.NewWorker(
                id=identity.id,
                host=socket.gethostname(),
                pid=os.getpid(),
                device=identity.device,
                checkpoint_key=identity.checkpoint_key,
                serves=identity.serves,
                slots=identity.slots,
                only_job=identity.only_job,
                version=nightherd.__version__,
                state=identity.state,
                phase=identity.phase,
            ),
            lease_seconds=self._settings.lease_seconds,
        )

    def start(self) -> None:
        self._thread.start()

    def ready(self, engine: Engine) -> bool:
        """The engine runs: chunks may be claimed from now on. Waits for the database.

        False if the worker was told to stop before it answered.
        """
        self._engine = engine
        self.identity.state, self.identity.phase = "ready", None
        try:
            self._renew(patience=float("inf"), stop=self._draining)
        except DatabaseError:
            if self._draining.is_set():
                return False
            raise
        return True

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def leave(self) -> None:
        """Gives up the lease in good order; chunks still held go back. Raises `DatabaseError`."""
        self._database.retrying(lambda connection: leases.leave(connection, self.identity.id))

    def lapse(self) -> None:
        """Ends the lease as if the worker had died: the ticks return its chunks, and count a death.

        A request that breaks every engine must be found out. Raises `DatabaseError`.
        """
        self._database.retrying(
            lambda connection: leases.renew(
                connection, self.identity.id, lease_seconds=0.0, state="draining", phase="broken"
            )
        )

    def _run(self) -> None:
        while not self._stop.wait(self._settings.watch_seconds):
            try:
                if self._engine_is_alive() and self._renewal_due():
                    self._renew(patience=self._settings.watch_seconds)
                if self._engine is not None:
                    if self._engine.broken is None:
                        self._watch_chunks(self._engine)
                    else:
                        self._on_broken(self._engine.broken)
            except DatabaseError as error:
                self._database_down.begin("%s; the lease may lapse, work goes on", error)
            except Exception:
                # This thread must not die: without it the worker would lose its lease silently.
                log.exception("an error in the lease's thread, which continues")
            else:
                self._database_down.end("the database answers again")

    def _renewal_due(self) -> bool:
        return time.monotonic() - self._renewed >= self._settings.renew_seconds

    def _engine_is_alive(self) -> bool:
        """False while it hangs; calls `on_hang` once the lease is over."""
        if self._engine is None or self._hang_detector.alive(self._engine.stats()):
            self._hangs.end("the engine steps again")
            return True
        self._hangs.begin("the engine does not finish its step; the lease is not renewed")
        if time.monotonic() - self._renewed > self._settings.lease_seconds:
            self._on_hang()
        return False

    def _renew(self, patience: float, stop: threading.Event | None = None) -> None:
        # One at a time: an older state must not be written after a newer one.
        with self._renewing:
            self._renew_now(patience, stop)

    def _renew_now(self, patience: float, stop: threading.Event | None) -> None:
        identity = self.identity
        state = "draining" if self._draining.is_set() else identity.state
        speed = 0.0 if self._engine is None else self._speed_meter.speed(self._engine.stats())

        def work(connection: Connection) -> bool:
            self.clock.set(connection.execute(select(db_now())).scalar_one())
            return leases.renew(
                connection,
                identity.id,
                lease_seconds=self._settings.lease_seconds,
                state=state,
                phase=identity.phase,
                speed=speed,
                device=identity.device,
            )

        if self._database.retrying(work, patience=patience, stop=stop):
            self._renewed = time.monotonic()
        elif not self._stop.is_set():
            self._register_anew()

    def _register_anew(self) -> None:
        """It was declared dead (it stood still for longer than its lease): a new id, no chunks."""
        with self._inflight.claim_lock:
            old, self.identity.id = self.identity.id, new_id()
            log.warning("declared dead as %s; registering anew as %s", old, self.identity.id)
            self._inflight.abort_all(lost=True)
            self.register()

    def _watch_chunks(self, engine: Engine) -> None:
        """Aborts chunks that were cancelled, paused or lost; returns those that SQL says this
        worker holds, and that it does not know."""
        if not self._inflight.claim_lock.acquire(timeout=self._settings.watch_seconds):
            return  # a claim waits for a slow database; the lease must not wait with it
        try:
            worker_id = self.identity.id
            held = self._database.retrying(
                lambda connection: chunks.held_by(connection, worker_id),
                reading=True,
                patience=self._settings.watch_seconds,
            )
            unknown = self._inflight.reconcile(worker_id, held)
        finally:
            self._inflight.claim_lock.release()
        if engine.broken is not None:
            return  # it may have broken meanwhile, and then its chunks are not returned
        for chunk_id, row in unknown.items():
            log.warning("chunk %d was claimed here, but its claim got lost; returned", chunk_id)
            self._database.retrying(
                lambda connection, c=chunk_id, r=row: leases.return_chunk(  # type: ignore[misc]
                    connection, worker_id, c, r.job_id
                )
            )
        self._preempt_for_priority(held)
        if self.identity.only_job is not None:
            self._watch_only_job(self.identity.only_job)

    def _preempt_for_priority(self, held: dict[int, Held]) -> None:
        """Returns chunks to the queue for others of a higher priority, when no slot is free.

        So a change of priority acts at once, not when the long chunks in flight have ended. What
        had not finished of them is computed again.
        """
        runs = [run for run in self._inflight.runs() if not run.aborting]
        if len(runs) < self.identity.slots or self.identity.only_job is not None:
            return
        priorities = {
            run: held[run.claim.chunk_id].priority
            for run in runs
            if run.claim.chunk_id in held and held[run.claim.chunk_id].wanted
        }
        if len(priorities) < len(runs):
            return  # some are being aborted: a slot is about to be free
        lowest_first = sorted(runs, key=lambda run: (priorities[run], -run.claim.chunk_id))
        waiting = self._database.retrying(
            lambda connection: chunks.queued_above(
                connection,
                self.identity.serves,
                priorities[lowest_first[0]],
                limit=self.identity.slots,
            ),
            reading=True,
            patience=self._settings.watch_seconds,
        )
        for run, priority in zip(lowest_first, waiting, strict=False):
            if priority > priorities[run]:
                log.info("chunk %d is preempted for priority %d", run.claim.chunk_id, priority)
                run.abort()

    def _watch_only_job(self, job_id: str) -> None:
        ended = self._database.retrying(
            lambda connection: chunks.job_has_ended(connection, job_id),
            reading=True,
            patience=self._settings.watch_seconds,
        )
        if ended:
            self._on_job_ended()
