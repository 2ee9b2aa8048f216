"""What a wake-up starts: a chunk is claimed, its requests go to the engine, its end is awaited."""

from __future__ import annotations

import logging
import threading

from sqlalchemy import Connection

from models.database import Database
from models.store import chunks
from models.store.chunks import Claim, ClaimOutcome, PendingRequest
from nightherd.errors import BrokerError, DatabaseError
from nightherd.log import OncePerState
from producer.fleet.dispatch import Dispatcher
from worker.chunks.inflight import ChunkRun, InFlight
from worker.chunks.prepare import PreparedRequest, Preparer
from worker.chunks.writer import Writer
from worker.engine.interface import Engine, EngineRequest, Output
from worker.identity import WorkerIdentity

log = logging.getLogger("nightherd.tasks")

_ATTEMPTS = 5
_FAILED_PAUSE = 5.0


class ChunkRunner:
    """What the Celery task of a wake-up does; called from the pool's threads, many at once."""

    def __init__(
        self,
        database: Database,
        identity: WorkerIdentity,
        inflight: InFlight,
        engine: Engine,
        preparer: Preparer,
        writer: Writer,
        dispatcher: Dispatcher,
        draining: threading.Event,
    ) -> None:
        self._database = database
        self._identity = identity
        self._inflight = inflight
        self._engine = engine
        self._preparer = preparer
        self._writer = writer
        self._dispatcher = dispatcher
        self._draining = draining
        self._broker_down = OncePerState(log)

    def wake(self) -> str:
        """Takes one wake-up: claims the best chunk and sees it through. Never raises.

        Returns what became of it, for the log and the tests: `nothing`, `done`, …
        """
        if self._draining.is_set():
            return "draining"
        try:
            run = self._claim()
        except DatabaseError as error:
            log.warning("no claim: %s", error)
            return "database down"
        except Exception:
            log.exception("no claim")
            return "failed"
        if run is None:
            return "nothing"
        try:
            self._submit_requests(run)
        except Exception as error:
            log_it = log.warning if isinstance(error, DatabaseError) else log.exception
            log_it("chunk %d goes back: %s", run.claim.chunk_id, error)
            # It would be claimed again at once, and most likely fail again.
            self._draining.wait(_FAILED_PAUSE)
            self._return_chunk(run)
        run.ended.wait()
        if not self._draining.is_set():  # then the worker does so when it has left
            self.top_up(run.claim.checkpoint_key)
        # Not by `lost`: between its end in SQL and here a look at SQL finds it not held any more.
        return "done" if run.stored and not run.aborted else "returned"

    def top_up(self, key: str) -> None:
        """Publishes wake-ups for the next chunks; where that fails, the tick will."""
        try:
            self._dispatcher.top_up(key)
        except (BrokerError, DatabaseError) as error:
            self._broker_down.begin("no wake-ups published: %s; the tick will", error)
        except Exception as error:
            self._broker_down.begin("no wake-ups published: %r; the tick will", error)
        else:
            self._broker_down.end("wake-ups are published again")

    def _claim(self) -> ChunkRun | None:
        with self._inflight.claim_lock:
            if self._draining.is_set() or self._inflight.isolated or self._engine.broken:
                return None
            outcome: ClaimOutcome = "nothing"
            for _ in range(_ATTEMPTS):
                outcome = self._database.retrying(self._try_claim, stop=self._draining)
                if outcome != "again":
                    break
            if not isinstance(outcome, Claim):
                if outcome in ("isolated waits", "not registered"):
                    log.debug("no claim: %s", outcome)
                return None
            run = ChunkRun(outcome, self._identity.id, self._engine)
            self._inflight.register(run)
            return run

    def _try_claim(self, connection: Connection) -> ClaimOutcome:
        return chunks.claim(
            connection,
            self._identity.id,
            keys=self._identity.serves,
            only_job=self._identity.only_job,
            idle=not self._inflight.runs(),
        )

    def _submit_requests(self, run: ChunkRun) -> None:
        """Loads the requests that lack results and hands them to the engine, or to the writer as
        failed."""
        claim = run.claim

        def load(connection: Connection) -> list[PendingRequest]:
            return chunks.load_pending(
                connection,
                job_id=claim.job_id,
                first_position=claim.first_position,
                count=claim.count,
                pass_=claim.pass_,
                only_code=claim.only_code,
            )

        pending = self._database.retrying(load, reading=True, stop=self._draining)
        prepared = self._preparer.prepare_each(claim, pending)
        remaining = sum(len(request.samples) for request in prepared)
        run.loaded = True
        self._writer.loaded(run, remaining)
        try:
            for request in prepared:
                if request.engine_request is None:
                    for sample in request.samples:
                        self._writer.answer(run, request, sample, None, None)
                elif not self._add(run, request, request.engine_request):
                    break
                remaining -= len(request.samples)
        finally:
            if remaining:
                # It is being aborted, or something failed: what the engine does not have goes back.
                run.abort()
                self._writer.aborted(run, remaining)

    def _add(self, run: ChunkRun, request: PreparedRequest, engine_request: EngineRequest) -> bool:
        def on_output(index: int, output: Output) -> None:
            seed = engine_request.seeds[index]
            self._writer.answer(run, request, request.samples[index], seed, output)

        try:
            return run.add(engine_request, on_output)
        except Exception as error:
            # A bug of the engine: this request fails alone. Returned, it would fail for ever.
            log.exception("row %d of job %s", request.index, run.claim.job_id)
            reason = f"the engine does not take it: {error!r}"
            output = Output((), "error", error_code="engine_error", error_message=reason)
            for index in range(len(request.samples)):
                on_output(index, output)
            return True

    def _return_chunk(self, run: ChunkRun) -> None:
        """After an error in `_submit_requests`: aborts what the engine has; the writer returns the
        chunk."""
        run.abort()
        if not run.loaded:
            run.loaded = True
            self._writer.loaded(run, 1)
            self._writer.aborted(run, 1)
