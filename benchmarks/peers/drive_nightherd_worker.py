"""The whole of nightherd: submit, Redis, a worker that claims, the engine, SQL.

Timed is what the database says: from the moment when the job was queued until it was completed. The
worker is started and has answered the warm-up before.
"""

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
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from driving import Task, task

PROGRAM = (sys.executable, "-P", "-c", "from nightherd.cli import main; main()")
_POLL = 0.2
"""Seconds; each look is one statement on one row."""


class Deployment:
    """A data folder of its own: SQLite and the embedded broker."""

    def __init__(self, given: Task, home: Path) -> None:
        self._given = given
        self._home = home
        self._environment = {
            **os.environ,
            "NIGHTHERD_HOME": str(home),
            "NIGHTHERD_CACHE": str(given.cache),
        }
        for name, variable in (("max_batch", "MAX_BATCH"), ("budget", "TOKEN_BUDGET")):
            value = given.option(name, None)
            if value is not None:
                self._environment[f"NIGHTHERD_{variable}"] = str(value)
        self.seconds = 0.0

    @contextmanager
    def worker(self) -> Iterator[None]:
        given = self._given
        process = subprocess.Popen(
            [
                *(*PROGRAM, "worker", "--checkpoint", given.checkpoint, "--device", given.device),
                *("--dtype", given.dtype, "--threads", str(given.threads)),
                *(("--kv-memory", str(given.kv_bytes)) if given.kv_bytes else ()),
            ],
            env=self._environment,
            stdout=sys.stderr,
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

    def generate(self, requests: list[dict[str, Any]]) -> list[int]:
        rows = [
            {
                "prompt": request["text"],
                "max_tokens": request["out"],
                "ignore_eos": True,
                "temperature": self._given.temperature,
                "top_p": self._given.top_p,
            }
            for request in requests
        ]
        file = self._home / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = subprocess.run(
            [*PROGRAM, "submit", file, "--checkpoint", self._given.checkpoint, "--seed", "1"],
            env=self._environment,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout.strip()
        created, finished = self._wait(job)
        self.seconds = (finished - created).total_seconds()
        query = 'SELECT completion_tokens FROM results WHERE job_id = ? ORDER BY "index"'
        with self._database() as database:
            return [count for (count,) in database.execute(query, (job,))]

    def _wait(self, job: str) -> tuple[datetime, datetime]:
        while True:
            with self._database() as database:
                state, *times = database.execute(
                    "SELECT state, created_at, finished_at FROM jobs WHERE id = ?", (job,)
                ).fetchone()
            if state == "completed":
                created, finished = (datetime.fromisoformat(time) for time in times)
                return created, finished
            time.sleep(_POLL)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(f"file:{self._home}/nightherd.db?mode=ro", uri=True, timeout=30)
        try:
            yield database
        finally:
            database.close()


def main(given: Task) -> None:
    with tempfile.TemporaryDirectory() as home:
        deployment = Deployment(given, Path(home))
        with deployment.worker():
            given.measure(deployment.generate, {}, seconds=lambda: deployment.seconds)


if __name__ == "__main__":
    main(task())
