"""A request that kills the process each time: it alone fails, after a bounded number of deaths."""

from __future__ import annotations

import math
import signal

import pytest
from sqlalchemy import select

from models.job import Result
from tests.conftest import wait_until
from tests.faults.conftest import Fleet, Process

POISON = "a prompt that kills"


def _start_again(fleet: Fleet, workers: list[Process]) -> int:
    """Starts a worker for each that was killed; how many they were."""
    killed = [worker for worker in workers if worker.poll() is not None]
    for worker in killed:
        assert worker.returncode == -signal.SIGKILL, fleet.log(worker)
        workers.remove(worker)
        workers.append(fleet.start(ready=False, die_on=POISON, step_seconds=0.002))
    return len(killed)


def _poison_among(
    fleet: Fleet, others: int, *, chunk_size: int, beside: int, seconds: float
) -> None:
    fleet.variables["NIGHTHERD_POISON_DEATHS"] = "3"
    fleet.start_beat()
    workers = fleet.start_many(2, die_on=POISON, step_seconds=0.002)
    prompts = [f"prompt {number}" for number in range(others)]
    middle = others // 2
    prompts.insert(middle, POISON)
    job = fleet.submit(prompts, chunk_size=chunk_size, errors={middle: "poison"})
    for number in range(beside):
        fleet.submit([f"other {number}.{index}" for index in range(100)], chunk_size=chunk_size)
    killed = 0

    def has_ended() -> bool:
        nonlocal killed
        killed += _start_again(fleet, workers)
        return all(fleet.state(each) == "completed" for each in fleet.submitted)

    wait_until(has_ended, seconds=seconds, what="the end of all jobs")
    fleet.is_clean()
    assert fleet.column(select(Result.index).where(Result.error_code == "poison")) == [middle]
    # Two deaths isolate its chunk and halve it, each further halving costs one, and alone it must
    # die three times more.
    halvings = math.ceil(math.log2(chunk_size))
    assert killed <= 2 + max(0, halvings - 1) + 3, "the number of deaths is bounded"
    assert len(fleet.lines("death")) == killed
    assert fleet.state(job) == "completed"


def test_poison_request(sqlite_fleet: Fleet) -> None:
    _poison_among(sqlite_fleet, 100, chunk_size=1, beside=1, seconds=60)


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_poison_request_among_1000_others_and_beside_other_jobs(fleet: Fleet) -> None:
    _poison_among(fleet, 1000, chunk_size=16, beside=3, seconds=300)
