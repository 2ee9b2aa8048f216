"""The main job on real parts: processes, Valkey, SQLite and PostgreSQL, the demo checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from models.database import Database
from nightherd.settings import Settings
from producer.fleet.open_database import open_database
from producer.jobs.status import JobView, job_view, worker_views
from tests.commands.invoking import CommandLine, environment
from tests.conftest import wait_until

RAGGED = [*range(10, 305, 5), 1500]
"""Lengths of sixty outputs: they end one after the other, and the last one goes on for seconds."""
DATA = Path(__file__).parents[2].parent / "shared" / "data"


@dataclass
class Fleet:
    """Separate processes that share one database and one broker."""

    nightherd: CommandLine
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _database: Database | None = None

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"process-{len(self.processes)}.log"
        process = self.nightherd.start(*arguments, log=log)
        self.processes.append(process)
        return process

    def start_workers(self, count: int, *arguments: str) -> list[subprocess.Popen[bytes]]:
        """Starts workers of the demo checkpoint and waits until they are ready."""
        started = [
            self.start("worker", "--checkpoint", "demo", "--device", "cpu", *arguments)
            for _ in range(count)
        ]
        pids = {process.pid for process in started}
        wait_until(lambda: pids <= self.ready(), seconds=90, what=f"{count} more ready workers")
        return started

    def ready(self) -> set[int]:
        """The pids of the workers that are ready."""
        with self.database.read() as connection:
            return {view.pid for view in worker_views(connection) if view.state == "ready"}

    @property
    def database(self) -> Database:
        """The fleet's database, opened here: to watch without a process for each look."""
        if self._database is None:
            variables = self.nightherd.environment
            settings = Settings.model_validate(
                {
                    "home": variables["NIGHTHERD_HOME"],
                    "database_url": variables.get("NIGHTHERD_DATABASE_URL"),
                }
            )
            self._database = open_database(settings)
        return self._database

    def view(self, job: str) -> JobView:
        """The job as `status` would show it."""
        with self.database.read() as connection:
            return job_view(connection, job)

    def json(self, *arguments: str) -> Any:
        outcome = self.nightherd(*arguments, "--json")
        assert outcome.code == 0, outcome
        return json.loads(outcome.out)

    def submit(self, path: Path, *arguments: str) -> str:
        outcome = self.nightherd("submit", path, *arguments)
        assert outcome.code == 0, outcome
        return outcome.out.strip()

    def status(self, job: str) -> Any:
        return self.json("status", job)

    def wait(self, job: str, seconds: float = 120) -> Any:
        """Waits for the end by `status --wait`; its view."""
        outcome = self.nightherd("status", job, "--wait", "--json", seconds=seconds)
        return json.loads(outcome.out)

    def results(self, job: str) -> list[dict[str, Any]]:
        outcome = self.nightherd("results", job)
        assert outcome.code == 0, outcome
        return [json.loads(line) for line in outcome.out.splitlines()]

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("process-*.log")))

    def stop(self) -> None:
        if self._database is not None:
            self._database.close()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def fleet(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Fleet]:
    """Processes on SQLite and on PostgreSQL in turn, and a broker of their own."""
    variables = environment(tmp_path, database_url=database_url, broker_url=broker_url)
    made = Fleet(CommandLine(variables, tmp_path), tmp_path)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Fleet]:
    """Processes on the embedded default: SQLite and a broker that they start themselves."""
    made = Fleet(CommandLine(environment(tmp_path), tmp_path), tmp_path)
    try:
        yield made
    finally:
        made.stop()


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """Sixty prompts for short stories, each told apart by its custom_id."""
    rows = [
        {"prompt": f"Once upon a time, {number} little foxes", "custom_id": f"fox-{number}"}
        for number in range(60)
    ]
    return write_jsonl(tmp_path / "stories.jsonl", rows)


def kill_9(process: subprocess.Popen[bytes]) -> None:
    """Kills a worker and whatever it started, as the kernel's out-of-memory killer would."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def nightherd_alone(tmp_path: Path) -> CommandLine:
    """The command line on the embedded default, with nothing running."""
    return CommandLine(environment(tmp_path), tmp_path)


@pytest.fixture
def nightherd_without_broker(database_url: str, tmp_path: Path) -> Iterator[tuple[Fleet, Path]]:
    """Processes whose broker is not there yet; the path where its socket will be."""
    with tempfile.TemporaryDirectory(prefix="nightherd-redis-") as folder:
        socket = Path(folder) / "redis.sock"
        url = f"redis+socket://{socket}?virtual_host=0"
        variables = environment(tmp_path, database_url=database_url, broker_url=url)
        made = Fleet(CommandLine(variables, tmp_path), tmp_path)
        try:
            yield made, socket
        finally:
            made.stop()
