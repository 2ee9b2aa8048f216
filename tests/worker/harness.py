"""The parts of a worker in this process, without Celery: wake-ups come from the test."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, cast

from sqlalchemy import Connection, select
from sqlalchemy.exc import OperationalError

from models.base import new_id
from models.database import Database
from models.job import Chunk, Job, Result
from models.store import storing
from models.store.chunks import Claim, PendingRequest
from models.worker import Worker
from nightherd.settings import Settings
from producer.fleet.dispatch import Dispatcher
from tests.fakes import CHECKPOINT, PROVENANCE, FakeEngine, byte_text, expected_text
from worker.chunks.inflight import ChunkRun, InFlight
from worker.chunks.prepare import Preparer
from worker.chunks.task import ChunkRunner
from worker.chunks.writer import Writer
from worker.identity import WorkerIdentity
from worker.process.lease import Lease

SEED = 7


class TroubledDatabase(Database):
    """A database that can be away, or lose the answers to commits."""

    away = False
    lost_answers = 0
    """How many of the next commits take place, but their answers are lost."""
    writes = 0
    on_read: Callable[[], None] | None = None

    @contextmanager
    def _begin(self, *, reading: bool) -> Iterator[Connection]:
        if self.away:
            raise _trouble("database is locked")
        if reading and self.on_read is not None:
            self.on_read()
        with super()._begin(reading=reading) as connection:
            yield connection
        if reading:
            return
        self.writes += 1
        if self.lost_answers:
            self.lost_answers -= 1
            raise _trouble("database is locked")


def _trouble(text: str) -> OperationalError:
    return OperationalError(None, None, sqlite3.OperationalError(text))


def troubled(database: Database) -> TroubledDatabase:
    """The same database, whose faults the test switches on."""
    return TroubledDatabase(database.url.render_as_string(hide_password=False), pool_size=10)


def store_job(
    database: Database,
    prompts: Sequence[str],
    *,
    chunk_size: int = 4,
    samples: int = 1,
    own_params: Mapping[int, dict[str, Any]] | None = None,
    **changes: Any,
) -> str:
    """Stores a job of plain prompts, `max_tokens` 8 unless it says otherwise; its id."""
    params = {"max_tokens": 8, **changes.pop("params", {})}
    if samples > 1:
        params["n"] = samples
    job = storing.NewJob(
        id=new_id(), checkpoint_key=CHECKPOINT, seed=SEED, **{"params": params, **changes}
    )
    rows = [
        storing.NewRequest(
            number, {"prompt": prompt}, (own_params or {}).get(number), None, samples
        )
        for number, prompt in enumerate(prompts)
    ]
    ranges = [
        storing.ChunkRange(first, count, count * samples)
        for first in range(0, len(prompts), chunk_size)
        for count in [min(chunk_size, len(prompts) - first)]
    ]
    with database.write() as connection:
        storing.begin_storing(connection, job)
        if rows:
            storing.store_requests(connection, job.id, rows)
        storing.finish_storing(connection, job.id, ranges)
    return job.id


class FakeDispatcher:
    """Stands in for the dispatcher: remembers for which checkpoints wake-ups were published."""

    def __init__(self) -> None:
        self.published: list[str] = []

    def top_up(self, key: str) -> int:
        self.published.append(key)
        return 0


class WorkerHarness:
    """A worker without Celery: `wake` stands in for a wake-up."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        engine: FakeEngine | None = None,
        *,
        only_job: str | None = None,
        context_length: int = 256,
    ) -> None:
        self.database = database
        self.settings = settings
        self.engine = engine or FakeEngine()
        self.text = byte_text(context_length)
        self.draining = threading.Event()
        self.inflight = InFlight()
        self.hung = threading.Event()
        self.broken: list[str] = []
        self.job_ended = threading.Event()
        self.completed: list[str] = []
        self.ended: list[ChunkRun] = []
        self.dispatcher = FakeDispatcher()
        self.identity = WorkerIdentity(CHECKPOINT, (CHECKPOINT,), "fake", settings.slots, only_job)
        self.lease = Lease(
            database,
            settings,
            self.identity,
            self.inflight,
            draining=self.draining,
            on_hang=self.hung.set,
            on_broken=self.broken.append,
            on_job_ended=self.job_ended.set,
        )
        self.writer = Writer(
            database,
            settings,
            self.text,
            PROVENANCE,
            on_ended=self._on_ended,
            on_broken=self.broken.append,
            database_time=self.lease.clock.now,
        )
        self.preparer = Preparer(self.text, self.engine)
        self.runner = ChunkRunner(
            database,
            self.identity,
            self.inflight,
            self.engine,
            self.preparer,
            self.writer,
            cast(Dispatcher, self.dispatcher),
            self.draining,
        )
        self._threads: list[threading.Thread] = []

    def _on_ended(self, run: ChunkRun, completed: Sequence[str]) -> None:
        self.inflight.forget(run)
        self.ended.append(run)
        self.completed += completed

    def open(self, *, watching: bool = False) -> None:
        """Registers and is ready; `watching` starts the lease's thread too."""
        self.lease.register()
        self.engine.start()
        self.writer.start()
        assert self.lease.ready(self.engine)
        if watching:
            self.lease.start()

    def wake(self) -> Future[str]:
        """A wake-up in a thread of its own, as Celery's pool would have it."""
        future: Future[str] = Future()

        def work() -> None:
            try:
                future.set_result(self.runner.wake())
            except BaseException as error:
                future.set_exception(error)

        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()
        return future

    def work_off(self) -> list[str]:
        """Wakes it until there is nothing to claim; the outcomes before that."""
        outcomes = []
        while (outcome := self.wake().result(20)) != "nothing":
            outcomes.append(outcome)
        return outcomes

    def drain(self) -> None:
        self.draining.set()
        self.inflight.close()

    def close(self) -> None:
        self.drain()
        self.engine.go_on()
        with contextlib.suppress(RuntimeError):  # not every test starts it
            self.lease.stop()
        for thread in self._threads:
            thread.join(5)
        stopped = self.writer.stop(5)
        self.engine.stop()
        assert stopped, "the writer hangs"
        assert not any(thread.is_alive() for thread in self._threads), "a chunk never ended"

    def claim(self) -> ChunkRun:
        """Claims a chunk as a wake-up does, and does nothing with it."""
        run = self.runner._claim()
        assert run is not None
        return run

    # What the database holds.

    def chunks(self, job_id: str) -> list[Any]:
        with self.database.read() as connection:
            return list(
                connection.execute(
                    select(
                        Chunk.id,
                        Chunk.state,
                        Chunk.fence,
                        Chunk.deaths,
                        Chunk.worker_id,
                        Chunk.samples,
                        Chunk.done,
                        Chunk.failed,
                        Chunk.prompt_tokens,
                        Chunk.completion_tokens,
                    )
                    .where(Chunk.job_id == job_id)
                    .order_by(Chunk.id)
                )
            )

    def states(self, job_id: str) -> list[str]:
        return [chunk.state for chunk in self.chunks(job_id)]

    def job_state(self, job_id: str) -> str:
        with self.database.read() as connection:
            return connection.execute(select(Job.state).where(Job.id == job_id)).scalar_one()

    def results(self, job_id: str) -> list[Any]:
        with self.database.read() as connection:
            return list(
                connection.execute(
                    select(
                        Result.index.label("number"),
                        Result.sample,
                        Result.text,
                        Result.finish_reason,
                        Result.error_code,
                        Result.error_message,
                        Result.worker_id,
                        Result.completion_tokens,
                        Result.started_at,
                        Result.finished_at,
                    )
                    .where(Result.job_id == job_id)
                    .order_by(Result.index, Result.sample)
                )
            )

    def worker(self) -> Any:
        with self.database.read() as connection:
            return connection.execute(
                select(Worker.id, Worker.state, Worker.lease_until, Worker.renewed_at).where(
                    Worker.id == self.identity.id
                )
            ).one()

    def worker_state(self) -> str | None:
        with self.database.read() as connection:
            return connection.execute(
                select(Worker.state).where(Worker.id == self.identity.id)
            ).scalar_one_or_none()

    def check_complete(
        self, job_id: str, prompts: Sequence[str], *, samples: int = 1, max_tokens: int = 8
    ) -> None:
        """The job is completed, every sample is there once with the text it must have, and the
        chunks' counters say the same."""
        assert self.job_state(job_id) == "completed"
        expected = [
            (
                index,
                sample,
                expected_text(
                    prompt, job_seed=SEED, index=index, sample=sample, max_tokens=max_tokens
                ),
            )
            for index, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        assert [(row.number, row.sample, row.text) for row in self.results(job_id)] == expected
        chunks = self.chunks(job_id)
        assert {chunk.state for chunk in chunks} == {"done"}
        assert sum(chunk.done for chunk in chunks) == len(expected)
        assert sum(chunk.failed for chunk in chunks) == 0
        assert sum(chunk.completion_tokens for chunk in chunks) == len(expected) * max_tokens
        assert sum(chunk.prompt_tokens for chunk in chunks) == sum(
            len(prompt.encode()) for prompt in prompts
        )


@contextmanager
def open_harness(
    database: Database, settings: Settings, engine: FakeEngine | None = None, **given: Any
) -> Iterator[WorkerHarness]:
    watching = given.pop("watching", False)
    harness = WorkerHarness(database, settings, engine, **given)
    harness.open(watching=watching)
    try:
        yield harness
    finally:
        harness.close()


def make_claim(**changes: Any) -> Claim:
    """A claim of a chunk that is in no database."""
    values: dict[str, Any] = {
        "chunk_id": 1,
        "job_id": "job",
        "fence": 1,
        "first_position": 0,
        "count": 4,
        "pass_": 1,
        "only_code": None,
        "isolated": False,
        "samples": 4,
        "done": 0,
        "failed": 0,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "checkpoint_key": CHECKPOINT,
        "params": {},
        "seed": SEED,
        "priority": 0,
        **changes,
    }
    return Claim(**values)


def make_request(index: int = 0, prompt: object = "a prompt", **changes: Any) -> PendingRequest:
    values: dict[str, Any] = {
        "index": index,
        "position": index,
        "body": {"prompt": prompt},
        "params": None,
        "samples": (0,),
        **changes,
    }
    return PendingRequest(**values)
