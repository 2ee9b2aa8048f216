"""The database's server itself dies: with all it had not written, for longer than a lease."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.faults.conftest import Fleet, RedisServer
from tests.faults.killing import own_postgresql, pause


@pytest.mark.faults
def test_postgresql_crashes_and_comes_back(redis_server: RedisServer, tmp_path: Path) -> None:
    with (
        own_postgresql() as (server, database),
        contextlib.closing(Fleet(database, tmp_path, redis_server)) as fleet,
    ):
        for _ in range(2):
            fleet.start(step_seconds=0.01)
        job = fleet.submit([f"prompt {number}" for number in range(200)], max_tokens=40)
        for _ in range(2):
            before = fleet.done(job)
            wait_until(lambda before=before: fleet.done(job) > before, what="progress")  # type: ignore[misc]
            postmaster = server.get_pid()
            # It ends its processes and writes nothing: what is not in its log is lost.
            os.kill(postmaster, signal.SIGQUIT)
            wait_until(
                lambda pid=postmaster: not Path(f"/proc/{pid}").exists(),  # type: ignore[misc]
                what="the server's end",
            )
            pause(5.0)  # the lease of these tests is 2 s
            server.ensure_postgres_running()
        fleet.is_clean(seconds=90)
        assert set(fleet.workers()) == {"ready"}
        assert fleet.deaths() == 0
