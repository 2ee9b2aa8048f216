"""Fault 22: the embedded broker dies, or all do; `run`s that share it.

More of it is in tests/nightherd/test_broker.py (stale sockets, locks, servers that hang or refuse)
and tests/commands/test_data_folder.py (read-only and full data folders).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.database import Database
from nightherd.broker import EmbeddedBroker
from tests.acceptance.conftest import Fleet, kill_9, write_jsonl
from tests.commands.invoking import CommandLine, environment
from tests.conftest import wait_until
from tests.worker.harness import store_job
from tests.worker.process.test_app import PROMPTS, WorkerCluster


@pytest.fixture
def embedded(sqlite_database: Database, tmp_path: Path) -> Iterator[WorkerCluster]:
    """Workers without any setting of a broker."""
    made = WorkerCluster(sqlite_database, tmp_path, None, "")
    try:
        yield made
    finally:
        made.close()
        _end_server(_broker(made))


def _broker(cluster: WorkerCluster) -> EmbeddedBroker:
    return EmbeddedBroker(Path(cluster.variables["NIGHTHERD_HOME"]))


def _pid(broker: EmbeddedBroker) -> int:
    return int((broker._folder / "broker.pid").read_text())


def _end_server(broker: EmbeddedBroker) -> None:
    if broker.is_alive():
        os.kill(_pid(broker), signal.SIGKILL)


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.faults)])
def test_embedded_broker_kill9(embedded: WorkerCluster, times: int) -> None:
    """In the middle of a job: chunks in flight go on, for the rest wake-ups are published again."""
    worker = embedded.start(step_seconds=0.01)
    broker = _broker(embedded)
    prompts = PROMPTS[: 8 * times]
    job = store_job(embedded.database, prompts, chunk_size=1, params={"max_tokens": 100})
    for _ in range(times):
        wait_until(lambda: "running" in embedded.chunks(job), what="a claimed chunk")
        os.kill(_pid(broker), signal.SIGKILL)
        wait_until(broker.is_alive, seconds=20, what="a new server")
    embedded.wait_for_end(job)
    embedded.check_complete(job, prompts, max_tokens=100)
    assert embedded.worker_states() == ["ready"], "its lease has nothing to do with the broker"
    assert "started again" in embedded.log(worker)
    worker.terminate()
    assert worker.wait(20) == 0
    assert not broker.is_alive()


def test_all_are_killed9_and_leave_a_stale_socket_and_stale_locks(embedded: WorkerCluster) -> None:
    worker = embedded.start(step_seconds=0.02)
    broker = _broker(embedded)
    job = store_job(embedded.database, PROMPTS[:16], chunk_size=4, params={"max_tokens": 150})
    wait_until(lambda: embedded.chunks(job).count("running") == 4, what="four claimed chunks")
    server = _pid(broker)
    kill_9(worker)
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not broker.is_alive(), what="the server's end")
    left = {path.name for path in broker._folder.iterdir()}
    assert {"start.lock", "users.lock", "broker.pid"} <= left
    assert any(path.is_socket() for path in broker._folder.iterdir())
    successor = embedded.start()
    embedded.wait_for_end(job)
    embedded.check_complete(job, PROMPTS[:16], max_tokens=150)
    successor.terminate()
    assert successor.wait(20) == 0
    assert not broker.is_alive()


@pytest.mark.faults
def test_two_runs_at_once_and_one_ends_before_the_other(tmp_path: Path) -> None:
    """They share the broker; whoever ends first leaves it to the other, the last one stops it."""
    fleet = Fleet(CommandLine(environment(tmp_path), tmp_path), tmp_path)
    broker = EmbeddedBroker(Path(fleet.nightherd.environment["NIGHTHERD_HOME"]))
    texts = [{"prompt": f"Once upon a time, {number} little foxes"} for number in range(64)]
    short, long = (
        write_jsonl(tmp_path / "short.jsonl", texts[:4]),
        write_jsonl(tmp_path / "long.jsonl", texts),
    )
    outputs = [tmp_path / "short-out.jsonl", tmp_path / "long-out.jsonl"]
    try:
        first = fleet.start(
            *("run", str(long), "--max-tokens", "1500", "--ignore-eos", "-o", str(outputs[1]))
        )
        second = fleet.start("run", str(short), "--max-tokens", "4", "-o", str(outputs[0]))
        assert second.wait(100) == 0, fleet.logs()
        assert first.poll() is None, "the long one must outlast the short one"
        assert broker.is_alive()
        assert first.wait(100) == 0, fleet.logs()
        wait_until(lambda: not broker.is_alive(), what="the end of the broker")
    finally:
        fleet.stop()
        _end_server(broker)
    for path, count in zip(outputs, (4, 64), strict=True):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["index"] for row in rows] == list(range(count))
        assert all(row["error"] is None for row in rows)
