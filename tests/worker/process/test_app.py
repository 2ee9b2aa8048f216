"""The real `serve` in processes of their own, with Celery and a broker; only the engine is fake."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from models.base import db_now
from models.database import Database
from models.job import Chunk, Job, Result
from models.store import jobs
from models.worker import Worker
from nightherd import broker
from nightherd.settings import Settings
from producer.fleet.dispatch import Dispatcher
from tests.commands.invoking import environment
from tests.conftest import start_redis, wait_until
from tests.fakes import CHECKPOINT, expected_text
from tests.worker.harness import SEED, store_job

REPOSITORY = Path(__file__).parents[3]
PROMPTS = [f"prompt {number}" for number in range(40)]


class WorkerCluster:
    """A SQLite database, a broker, and any number of worker processes."""

    def __init__(
        self, database: Database, folder: Path, redis: subprocess.Popen[bytes] | None, broker: str
    ) -> None:
        self.database = database
        self.redis = redis
        self.broker = broker
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        url = database.url.render_as_string(hide_password=False)
        self.variables = {
            **environment(folder, database_url=url, broker_url=broker),
            "PYTHONPATH": str(REPOSITORY),
        }
        settings = Settings.model_validate(
            {"home": folder, "database_url": url, "broker_url": broker or None}
        )
        self._dispatcher = Dispatcher(database, settings, broker)

    def stop_beside_the_lock(self, process: subprocess.Popen[bytes]) -> None:
        """Lets a process stand still where it does not hold SQLite's lock, which nobody could take
        from it: all others would stand still with it."""
        for _ in range(50):
            process.send_signal(signal.SIGSTOP)
            connection = sqlite3.connect(str(self.database.url.database), timeout=0.5)
            try:
                connection.execute("BEGIN IMMEDIATE").close()
                return
            except sqlite3.OperationalError:
                process.send_signal(signal.SIGCONT)
                time.sleep(0.05)
            finally:
                connection.close()
        pytest.fail("it holds the lock whenever one looks")

    def start(self, *, ready: bool = True, **options: Any) -> subprocess.Popen[bytes]:
        path = self.folder / f"worker-{len(self.processes)}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.fakes", json.dumps(options)],
                env=self.variables,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        if ready:
            wait_until(
                lambda: "is ready" in self.log(process) or process.poll() is not None,
                seconds=30,
                what="a ready worker",
            )
            assert process.poll() is None, self.log(process)
        return process

    def log(self, process: subprocess.Popen[bytes]) -> str:
        return (self.folder / f"worker-{self.processes.index(process)}.log").read_text()

    def submit(self, prompts: list[str] = PROMPTS, **changes: Any) -> str:
        job = store_job(self.database, prompts, **changes)
        self.publish_wakeups()
        return job

    def publish_wakeups(self) -> None:
        self._dispatcher.top_up(CHECKPOINT)

    def column(self, statement: Any) -> list[Any]:
        with self.database.read() as connection:
            return list(connection.execute(statement).scalars())

    def chunks(self, job: str) -> list[str]:
        return self.column(select(Chunk.state).where(Chunk.job_id == job).order_by(Chunk.id))

    def job_state(self, job: str) -> str:
        return str(self.column(select(Job.state).where(Job.id == job))[0])

    def worker_states(self) -> list[str]:
        return self.column(select(Worker.state).order_by(Worker.id))

    def queues(self) -> list[bytes]:
        """The queues in Redis that hold wake-ups."""
        with broker.connect(self.broker, 5.0) as client:
            return list(client.keys("nightherd:wake*"))

    def wait_for_end(self, job: str) -> None:
        wait_until(lambda: self.job_state(job) == "completed", seconds=30, what="the job's end")

    def check_complete(self, job: str, prompts: list[str], max_tokens: int = 8) -> None:
        assert self.column(
            select(Result.text).where(Result.job_id == job).order_by(Result.index)
        ) == [
            expected_text(prompt, job_seed=SEED, index=index, sample=0, max_tokens=max_tokens)
            for index, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


@pytest.fixture
def cluster(sqlite_database: Database, tmp_path: Path) -> Iterator[WorkerCluster]:
    with tempfile.TemporaryDirectory(prefix="nightherd-redis-") as folder:
        socket = Path(folder) / "redis.sock"
        redis = start_redis(socket)
        made = WorkerCluster(
            sqlite_database, tmp_path, redis, f"redis+socket://{socket}?virtual_host=0"
        )
        try:
            yield made
        finally:
            made.close()
            redis.kill()
            redis.wait()


def _exit_code(process: subprocess.Popen[bytes], within: float = 5) -> int:
    started = time.monotonic()
    code = process.wait(60)
    assert time.monotonic() - started < within
    return code


SLOW = {"params": {"max_tokens": 2000}}


def test_it_serves_job_after_job_until_sigterm(cluster: WorkerCluster) -> None:
    worker = cluster.start()
    for _ in range(2):
        time.sleep(0.5)
        job = cluster.submit()
        wait_until(
            lambda job=job: set(cluster.chunks(job)) != {"queued"},  # type: ignore[misc]
            seconds=1,
            what="a claim by an idle worker",
        )
        cluster.wait_for_end(job)
        cluster.check_complete(job, PROMPTS)
    worker.terminate()
    assert _exit_code(worker) == 0
    assert cluster.worker_states() == ["stopped"]


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGTERM],
        [signal.SIGINT],
        [signal.SIGQUIT],
        [signal.SIGHUP, *[signal.SIGTERM] * 5, *[signal.SIGINT, signal.SIGQUIT] * 20],
    ],
    ids=["SIGTERM", "SIGINT", "SIGQUIT", "again and again"],
)
def test_a_signal_in_the_middle_hands_the_work_back(
    cluster: WorkerCluster, signals: list[signal.Signals]
) -> None:
    worker = cluster.start(step_seconds=0.01)
    job = cluster.submit(**SLOW)
    wait_until(lambda: cluster.chunks(job).count("running") == 4)
    for number in signals:
        os.kill(worker.pid, number)
    assert _exit_code(worker) == 0
    assert set(cluster.chunks(job)) == {"queued"}
    assert set(cluster.column(select(Chunk.deaths))) == {0}
    assert cluster.worker_states() == ["stopped"]


def test_a_job_goes_on_at_once_where_another_worker_drained(cluster: WorkerCluster) -> None:
    first = cluster.start(step_seconds=0.01)
    second = cluster.start(step_seconds=0.01)
    job = cluster.submit(PROMPTS[:16], params={"max_tokens": 100})
    wait_until(lambda: cluster.chunks(job).count("running") == 4)
    first.terminate()
    assert _exit_code(first) == 0
    cluster.wait_for_end(job)
    cluster.check_complete(job, PROMPTS[:16], max_tokens=100)
    second.terminate()
    assert _exit_code(second) == 0


def test_told_to_stop_while_loading_it_stops(cluster: WorkerCluster) -> None:
    worker = cluster.start(ready=False, load_seconds=60)
    wait_until(lambda: cluster.worker_states() == ["starting"], seconds=30)
    worker.terminate()
    assert _exit_code(worker) == 0
    assert cluster.worker_states() == ["stopped"]
    assert "Traceback" not in cluster.log(worker)


def test_a_load_that_no_signal_interrupts_does_not_hold_it_up(cluster: WorkerCluster) -> None:
    worker = cluster.start(ready=False, blocked_load_seconds=60)
    wait_until(lambda: "loading" in cluster.log(worker), seconds=30)
    worker.terminate()
    assert _exit_code(worker) == 0
    assert cluster.worker_states() == ["stopped"]


def test_a_checkpoint_that_cannot_be_loaded_is_one_line(cluster: WorkerCluster) -> None:
    worker = cluster.start(ready=False, load_error="no weights in /nowhere")
    assert worker.wait(30) == 1
    lines = cluster.log(worker).splitlines()
    assert [line for line in lines if "no weights" in line] == ["nightherd: no weights in /nowhere"]
    assert "Traceback" not in cluster.log(worker)
    assert cluster.worker_states() == ["stopped"]


def test_a_worker_for_one_job_ends_with_it(cluster: WorkerCluster) -> None:
    other = store_job(cluster.database, PROMPTS, priority=9)
    job = store_job(cluster.database, PROMPTS)
    worker = cluster.start(ready=False, only_job=job)
    assert worker.wait(30) == 0
    cluster.check_complete(job, PROMPTS)
    assert set(cluster.chunks(other)) == {"queued"}
    assert cluster.worker_states() == ["stopped"]


def test_a_worker_for_one_job_ends_when_that_is_cancelled(cluster: WorkerCluster) -> None:
    job = store_job(cluster.database, PROMPTS, **SLOW)
    worker = cluster.start(only_job=job, step_seconds=0.01)
    wait_until(lambda: "running" in cluster.chunks(job))
    with cluster.database.write() as connection:
        jobs.cancel(connection, job)
    assert _exit_code(worker) == 0
    assert set(cluster.chunks(job)) == {"cancelled"}


def test_the_wake_ups_of_a_job_of_its_own_go_with_the_worker(cluster: WorkerCluster) -> None:
    job = store_job(cluster.database, PROMPTS, **SLOW)

    def own() -> list[bytes]:
        return [name for name in cluster.queues() if job.encode() in name]

    worker = cluster.start(only_job=job, step_seconds=0.01)
    wait_until(lambda: cluster.chunks(job).count("running") == 4)
    assert len(own()) == 1, "four are in work, four wait"
    worker.terminate()
    assert _exit_code(worker) == 0
    assert own() == [], "nobody would ever read them"


def test_an_engine_that_does_not_stop_does_not_hold_the_exit_up(cluster: WorkerCluster) -> None:
    worker = cluster.start(hang_on_stop=True)
    worker.terminate()
    assert _exit_code(worker) == 0
    assert cluster.worker_states() == ["stopped"]


def test_a_broken_engine_ends_the_worker_and_counts_as_a_death(cluster: WorkerCluster) -> None:
    worker = cluster.start(step_seconds=0.01, break_on="prompt 3")
    job = cluster.submit(PROMPTS[:16], **SLOW)
    assert worker.wait(30) == 1
    assert "nightherd: the worker cannot go on: the device is lost" in cluster.log(worker)
    assert set(cluster.chunks(job)) == {"running"}, "they are not handed back"
    lapsed = select(Worker.lease_until <= db_now())
    assert cluster.column(lapsed) == [True], "whoever ticks next counts it among the dead"


def test_wake_ups_come_again_after_the_broker_was_killed(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """The embedded one: the worker's tick starts it again, and Celery finds it."""
    cluster = WorkerCluster(sqlite_database, tmp_path, None, "")
    try:
        worker = cluster.start()
        home = Path(cluster.variables["NIGHTHERD_HOME"])
        (pidfile,) = home.rglob("broker.pid")
        os.kill(int(pidfile.read_text()), signal.SIGKILL)
        job = store_job(sqlite_database, PROMPTS)
        cluster.wait_for_end(job)
        assert "started again" in cluster.log(worker)
        worker.terminate()
        assert _exit_code(worker) == 0
    finally:
        cluster.close()


def test_a_redis_that_does_not_answer_does_not_hold_the_exit_up(cluster: WorkerCluster) -> None:
    worker = cluster.start(step_seconds=0.01)
    job = cluster.submit(**SLOW)
    wait_until(lambda: cluster.chunks(job).count("running") == 4)
    assert cluster.redis is not None
    cluster.redis.send_signal(signal.SIGSTOP)
    worker.terminate()
    assert _exit_code(worker) == 0
    assert set(cluster.chunks(job)) == {"queued"}
    assert cluster.worker_states() == ["stopped"]


def test_a_worker_that_stood_still_for_too_long_comes_back_under_a_new_name(
    cluster: WorkerCluster,
) -> None:
    zombie = cluster.start(step_seconds=0.02)
    healer = cluster.start(step_seconds=0.02)
    job = cluster.submit(PROMPTS[:32], params={"max_tokens": 100})
    wait_until(lambda: cluster.chunks(job).count("running") == 8)
    cluster.stop_beside_the_lock(zombie)
    wait_until(
        lambda: "dead" in cluster.worker_states(), seconds=20, what="its being declared dead"
    )
    zombie.send_signal(signal.SIGCONT)
    cluster.wait_for_end(job)
    cluster.check_complete(job, PROMPTS[:32], max_tokens=100)
    wait_until(lambda: cluster.worker_states().count("ready") == 2)
    assert "registering anew" in cluster.log(zombie)
    assert healer.poll() is None
