"""Workers in processes of their own, a broker and a database, and the oracle over all of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from models.database import Database
from models.job import ENDED_JOB_STATES, Chunk, Job, Result
from models.worker import Worker
from nightherd import broker
from nightherd.params import sample_seed
from nightherd.settings import Settings
from producer.fleet.dispatch import Dispatcher
from producer.inputs.reader import Row
from producer.jobs.create import JobOptions, submit
from tests.commands.invoking import CommandLine, environment
from tests.conftest import start_redis, wait_until
from tests.fakes import CHECKPOINT
from tests.faults.oracle import Fault, Line, Submitted, Verdict, judge, read_ledger
from tests.quick_databases import (  # noqa: F401 - fixtures
    common_postgresql,
    database,
    postgresql_database,
    sqlite_database,
    sqlite_template,
)

REPOSITORY = Path(__file__).parents[2]
PROMPTS = [f"prompt {number}" for number in range(40)]
Process = subprocess.Popen[bytes]


class RedisServer:
    """A Redis-protocol server that keeps nothing on disk, to be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "redis.sock"
        self.url = f"redis+socket://{self.socket}?virtual_host=0"
        self.process: Process | None = None

    def start(self) -> None:
        self.process = start_redis(self.socket)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def do(self, *command: str) -> Any:
        with broker.connect(self.url, 10.0) as client:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]

    def wake_ups(self) -> int:
        """Wake-ups that wait in all queues."""
        with broker.connect(self.url, 10.0) as client:
            names: Any = client.keys("nightherd:wake*")
            return sum(int(client.llen(name)) for name in names)  # type: ignore[arg-type]


class Fleet:
    """Worker processes over one database and one broker, and what was asked of them."""

    def __init__(self, opened: Database, folder: Path, redis: RedisServer) -> None:
        self.database = opened
        self.folder = folder
        self.redis = redis
        self.ledger = folder / "ledger"
        self.processes: list[Process] = []
        self.submitted: list[Submitted] = []
        self.faults: list[Fault] = []
        url = opened.url.render_as_string(hide_password=False)
        self.variables = {
            **environment(folder, database_url=url, broker_url=redis.url),
            "PYTHONPATH": str(REPOSITORY),
        }
        self.settings = Settings.model_validate(
            {"home": folder, "database_url": url, "broker_url": redis.url}
        )
        self._dispatcher = Dispatcher(opened, self.settings, redis.url)

    # Workers.

    def start(
        self, *, ready: bool = True, variables: Mapping[str, str] | None = None, **options: Any
    ) -> Process:
        """Starts a worker with `tests.faults.serve.Options`; `variables` are its settings."""
        path = self.folder / f"worker-{len(self.processes)}.log"
        given = {"ledger": str(self.ledger), **options}
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.faults.serve", json.dumps(given)],
                env={**self.variables, **(variables or {})},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        if ready:
            self.wait_until_ready(process)
        return process

    def start_many(self, count: int, **options: Any) -> list[Process]:
        """Starts workers at once and waits for all of them."""
        started = [self.start(ready=False, **options) for _ in range(count)]
        self.wait_until_ready(*started)
        return started

    def wait_until_ready(self, *processes: Process) -> None:
        for process in processes:
            wait_until(
                lambda process=process: (  # type: ignore[misc]
                    "is ready" in self.log(process) or process.poll() is not None
                ),
                seconds=60,
                what="a ready worker",
            )
            assert process.poll() is None, self.log(process)

    def start_beat(self) -> Process:
        """Starts `nightherd beat`: it reaps and publishes wake-ups, whatever workers there are."""
        path = self.folder / f"worker-{len(self.processes)}.log"
        line = CommandLine(self.variables, self.folder)
        self.processes.append(line.start("beat", log=path))
        return self.processes[-1]

    def log(self, process: Process) -> str:
        return (self.folder / f"worker-{self.processes.index(process)}.log").read_text()

    def logs(self) -> str:
        return "\n".join(map(self.log, self.processes))

    def wait_for_holders(self, workers: Sequence[Process]) -> list[Process]:
        """Waits until some of these workers are in the middle of chunks; which ones."""
        holders: list[Process] = []

        def some_hold_chunks() -> bool:
            holders[:] = [worker for worker in workers if self.unsaved_by(worker)]
            return bool(holders)

        wait_until(some_hold_chunks, seconds=60, what="a worker in the middle of a chunk")
        return holders

    def kill_9(self, process: Process) -> None:
        """Kills a worker and remembers what it had not saved, and what was saved by anybody."""
        hit = self.unsaved_by(process)
        process.kill()
        process.wait()
        at = time.monotonic()
        self.faults.append(Fault(at, hit, self.saved()))

    def ends(self, process: Process, *, within: float = 5.0) -> int:
        """Waits for a worker's end, which must come in time; its exit code."""
        started = time.monotonic()
        code = process.wait(60)
        assert time.monotonic() - started < within, self.log(process)
        return code

    def is_killed(self, process: Process, *, seconds: float = 30.0) -> None:
        """Waits until a worker has killed itself."""
        wait_until(lambda: process.poll() is not None, seconds=seconds, what="the kill")
        assert process.returncode == -signal.SIGKILL, self.log(process)

    # Jobs.

    def submit(
        self,
        prompts: Sequence[str] = PROMPTS,
        *,
        samples: int = 1,
        max_tokens: int | Sequence[int] = 8,
        chunk_size: int = 4,
        errors: Mapping[int, str] | None = None,
        states: tuple[str, ...] = ("completed",),
        publish: bool = True,
        **options: Any,
    ) -> Submitted:
        """Submits a job as `nightherd submit` does; each has another seed."""
        common = {"max_tokens": max_tokens} if isinstance(max_tokens, int) else {}
        own = [None] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        stored = submit(
            self.database,
            self.settings.model_copy(update={"chunk_size": chunk_size}),
            [
                Row(line, {"prompt": prompt}, count and {"max_tokens": count}, None)
                for line, (prompt, count) in enumerate(zip(prompts, own, strict=True), 1)
            ],
            JobOptions(
                CHECKPOINT,
                params={"n": samples, **common},
                seed=1000 + len(self.submitted),
                **options,
            ),
        )
        job = Submitted(
            stored.id, stored.seed, tuple(prompts), samples, max_tokens, errors or {}, states
        )
        self.submitted.append(job)
        if publish:
            self.publish_wakeups()
        return job

    def publish_wakeups(self) -> None:
        self._dispatcher.top_up(CHECKPOINT)

    def act(
        self, function: Callable[..., Any], job: Submitted, *arguments: Any, **given: Any
    ) -> Any:
        """Calls a function of `models.store.jobs`, as the commands do."""
        return self.database.retrying(
            lambda connection: function(connection, job.job_id, *arguments, **given)
        )

    # What the database and the ledger hold.

    def column(self, statement: Any) -> list[Any]:
        with self.database.read() as connection:
            return list(connection.execute(statement).scalars())

    def state(self, job: Submitted) -> str:
        return str(self.column(select(Job.state).where(Job.id == job.job_id))[0])

    def chunks(self, job: Submitted) -> list[str]:
        """The states of its chunks."""
        return self.column(select(Chunk.state).where(Chunk.job_id == job.job_id).order_by(Chunk.id))

    def deaths(self) -> int:
        """The most deaths that a chunk counts."""
        return max(self.column(select(Chunk.deaths)), default=0)

    def workers(self) -> list[str]:
        """The states of all workers, in the order of their start."""
        return self.column(select(Worker.state).order_by(Worker.id))

    def done(self, job: Submitted) -> int:
        return sum(self.column(select(Chunk.done).where(Chunk.job_id == job.job_id)))

    def progress(self) -> int:
        """What is done of all jobs."""
        return sum(self.column(select(Chunk.done)))

    def lines(self, kind: str) -> list[Line]:
        return [line for line in read_ledger(self.ledger) if line.kind == kind]

    def saved(self) -> set[int]:
        """The seeds of all samples that are stored, and not as failures."""
        return set(self.column(select(Result.seed).where(Result.error_code.is_(None))))

    def unsaved_by(self, process: Process) -> set[int]:
        """The seeds of the samples that a worker holds and has not saved."""
        held = select(Chunk.job_id, Chunk.first_position, Chunk.count.label("size")).where(
            Chunk.state == "running",
            Chunk.worker_id.in_(select(Worker.id).where(Worker.pid == process.pid)),
        )
        jobs = {job.job_id: job for job in self.submitted}
        unsaved: set[int] = set()
        with self.database.read() as connection:
            for chunk in connection.execute(held).all():
                within = range(chunk.first_position, chunk.first_position + chunk.size)
                saved = select(Result.seed).where(
                    Result.job_id == chunk.job_id,
                    Result.index >= within.start,
                    Result.index < within.stop,
                )
                job = jobs[chunk.job_id]
                unsaved |= {
                    sample_seed(job.seed, None, index, sample)
                    for index in within
                    for sample in range(job.samples)
                } - set(connection.execute(saved).scalars())
        return unsaved

    def half_done(self, process: Process) -> bool:
        """Whether a worker holds a chunk of which some is saved and some is not."""
        done = select(Chunk.id).where(
            Chunk.state == "running",
            Chunk.worker_id.in_(select(Worker.id).where(Worker.pid == process.pid)),
            Chunk.done > 0,
            Chunk.done < Chunk.samples,
        )
        return bool(self.column(done))

    # The end.

    def wait_for_end(self, *jobs: Submitted, seconds: float = 60.0) -> None:
        for job in jobs or tuple(self.submitted):
            wait_until(
                lambda job=job: self.state(job) in ENDED_JOB_STATES,  # type: ignore[misc]
                seconds=seconds,
                what="the job's end",
            )

    def judge(self) -> Verdict:
        return judge(self.database, self.submitted, ledger=self.ledger, faults=self.faults)

    def is_clean(self, *, seconds: float = 60.0) -> Verdict:
        """Waits for the end of all jobs; nothing is lost, nothing twice, nothing unexpected."""
        self.wait_for_end(seconds=seconds)
        verdict = self.judge()
        verdict.assert_clean()
        return verdict

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="nightherd-redis-"))
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def fleet(
    database: Database,  # noqa: F811
    redis_server: RedisServer,
    tmp_path: Path,
) -> Iterator[Fleet]:
    """On SQLite and on PostgreSQL in turn."""
    with contextlib.closing(Fleet(database, tmp_path, redis_server)) as made:
        yield made


@pytest.fixture
def sqlite_fleet(
    sqlite_database: Database,  # noqa: F811
    redis_server: RedisServer,
    tmp_path: Path,
) -> Iterator[Fleet]:
    """For faults that do not concern the database."""
    with contextlib.closing(Fleet(sqlite_database, tmp_path, redis_server)) as made:
        yield made


@pytest.fixture
def postgresql_fleet(
    postgresql_database: Database,  # noqa: F811
    redis_server: RedisServer,
    tmp_path: Path,
) -> Iterator[Fleet]:
    """For faults that SQLite does not know."""
    with contextlib.closing(Fleet(postgresql_database, tmp_path, redis_server)) as made:
        yield made
