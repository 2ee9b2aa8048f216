"""The strongest oracle: kills change no byte of what the real engine samples."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.database import Database
from tests.acceptance.conftest import Fleet, kill_9, write_jsonl
from tests.commands.invoking import CommandLine, environment
from tests.conftest import start_redis, wait_until

SAMPLED = ("--temperature", "0.8", "--seed", "7", "--ignore-eos", "--max-tokens")


@pytest.fixture
def sqlite_processes(sqlite_database: Database, tmp_path: Path) -> Iterator[Fleet]:
    yield from _open(sqlite_database, tmp_path)


@pytest.fixture
def processes(database: Database, tmp_path: Path) -> Iterator[Fleet]:
    yield from _open(database, tmp_path)


def _open(database: Database, tmp_path: Path) -> Iterator[Fleet]:
    """Real workers of the demo checkpoint."""
    url = database.url.render_as_string(hide_password=False)
    with tempfile.TemporaryDirectory(prefix="nightherd-redis-") as folder:
        socket = Path(folder) / "redis.sock"
        redis = start_redis(socket)
        broker = f"redis+socket://{socket}?virtual_host=0"
        # Small steps, so that a worker is in the middle of something for longer.
        variables = environment(
            tmp_path, database_url=url, broker_url=broker, max_batch=16, chunk_size=8
        )
        made = Fleet(CommandLine(variables, tmp_path), tmp_path)
        try:
            yield made
        finally:
            made.stop()
            redis.kill()
            redis.wait()


def _prompts(folder: Path, count: int) -> Path:
    rows = [
        {"prompt": f"Once upon a time, {number} little foxes", "n": 1 + number % 2}
        for number in range(count)
    ]
    return write_jsonl(folder / "prompts.jsonl", rows)


def _file(processes: Fleet, job: str) -> bytes:
    path = processes.folder / f"{job}.jsonl"
    outcome = processes.nightherd("results", job, "-o", path)
    assert outcome.code == 0, outcome
    return path.read_bytes()


def _the_same_bytes_with(processes: Fleet, kills: int, *, rows: int, tokens: int) -> None:
    moments = random.Random(kills)
    path = _prompts(processes.folder, rows)
    # Both are there before a worker is: the second begins as soon as the first has ended.
    undisturbed = processes.submit(path, *SAMPLED, str(tokens), "--priority", "1")
    job = processes.submit(path, *SAMPLED, str(tokens))
    workers = processes.start_workers(2)
    wait_until(lambda: not processes.view(undisturbed).open, seconds=120, what="the first's end")

    def in_the_middle() -> bool:
        view = processes.view(job)
        return view.done > 0 and view.chunks_running > 0

    for _ in range(kills):
        wait_until(in_the_middle, seconds=60, what="a job in the middle")
        time.sleep(moments.uniform(0.0, 0.2))
        victim = workers.pop(0)
        kill_9(victim)
        assert processes.view(job).open, "the kills come too late to show anything"
        workers.append(processes.start("worker", "--checkpoint", "demo", "--device", "cpu"))
    for each in (undisturbed, job):
        assert processes.wait(each)["state"] == "completed"
    expected = _file(processes, undisturbed)
    assert expected.count(b"\n") == rows * 3 // 2
    assert _file(processes, job) == expected


def test_kills_change_no_byte_of_sampled_results(sqlite_processes: Fleet) -> None:
    _the_same_bytes_with(sqlite_processes, kills=2, rows=64, tokens=200)


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_five_kills_change_no_byte_of_sampled_results(processes: Fleet) -> None:
    _the_same_bytes_with(processes, kills=5, rows=80, tokens=400)
