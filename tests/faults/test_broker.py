"""Faults of the broker: SQL is the truth, and Redis may lose or double any wake-up."""

from __future__ import annotations

import signal
import time

import pytest
from sqlalchemy import select

from models.job import Chunk
from tests.commands.invoking import CommandLine
from tests.conftest import wait_until
from tests.fakes import CHECKPOINT
from tests.faults.conftest import PROMPTS, Fleet
from tests.faults.oracle import Submitted

MANY = [f"prompt {number}" for number in range(160)]


@pytest.fixture(params=["sqlite_fleet", pytest.param("postgresql_fleet", marks=pytest.mark.faults)])
def fleet(request: pytest.FixtureRequest) -> Fleet:
    """The broker's faults do not concern the database: the other kind only at length."""
    made = request.getfixturevalue(request.param)
    assert isinstance(made, Fleet)
    return made


def _in_the_middle(fleet: Fleet, job: Submitted) -> None:
    """Waits until some of a job is saved, with most of it still to do."""
    wait_until(lambda: fleet.done(job) > 0, seconds=30, what="a first saved sample")
    assert fleet.chunks(job).count("queued") > 4


def _nothing_twice(fleet: Fleet) -> None:
    """All is clean, each chunk was claimed once, and the queues are empty in the end."""
    verdict = fleet.is_clean()
    assert verdict.recomputed == 0
    assert set(fleet.column(select(Chunk.fence))) == {1}
    assert set(fleet.workers()) == {"ready"}
    wait_until(lambda: fleet.redis.wake_ups() == 0, seconds=30, what="empty queues")


def test_redis_connections_killed_20_times(fleet: Fleet) -> None:
    fleet.start_many(2, step_seconds=0.01, max_sequences=8)
    job = fleet.submit(MANY, max_tokens=60)
    _in_the_middle(fleet, job)
    for _ in range(20):
        wait_until(
            lambda: int(fleet.redis.do("CLIENT", "KILL", "TYPE", "normal")) > 0,
            what="connections that came back",
        )
    assert "queued" in fleet.chunks(job), "it went on for as long as that"
    _nothing_twice(fleet)


def test_redis_kill9_without_persistence(fleet: Fleet) -> None:
    fleet.start_many(2, step_seconds=0.01)
    job = fleet.submit(MANY, max_tokens=20)
    _in_the_middle(fleet, job)
    fleet.redis.kill()
    wait_until(
        lambda: "running" not in fleet.chunks(job), seconds=30, what="the end of the wake-ups"
    )
    assert "queued" in fleet.chunks(job)
    fleet.redis.start()
    assert fleet.redis.do("DBSIZE") == 0 or fleet.state(job) == "running"
    _nothing_twice(fleet)


def test_flushall(fleet: Fleet) -> None:
    fleet.start_many(2, step_seconds=0.01)
    job = fleet.submit(MANY, max_tokens=20)
    _in_the_middle(fleet, job)
    fleet.redis.do("FLUSHALL")
    _nothing_twice(fleet)


def test_redis_down_for_longer_than_100_retries(fleet: Fleet) -> None:
    """At Celery's default a worker ends after a hundred attempts."""
    worker = fleet.start(step_seconds=0.01, retry_seconds=0.01)
    job = fleet.submit(MANY[:64], max_tokens=20)
    _in_the_middle(fleet, job)
    fleet.redis.kill()
    wait_until(
        lambda: any(int(line.value) > 110 for line in fleet.lines("retry")),
        seconds=60,
        what="more than a hundred attempts in a row",
    )
    assert worker.poll() is None
    assert "queued" in fleet.chunks(job)
    fleet.redis.start()
    _nothing_twice(fleet)


def _stop_redis(fleet: Fleet, seconds: float) -> None:
    """Chunks in flight go on without Redis, the rest once it is back."""
    worker = fleet.start(step_seconds=0.02)
    job = fleet.submit(MANY[:64], max_tokens=30)
    _in_the_middle(fleet, job)
    fleet.redis.send(signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(
        lambda: "running" not in fleet.chunks(job),
        seconds=30,
        what="the end of the chunks in flight",
    )
    wait_until(lambda: "no answer for 1 s" in fleet.log(worker), seconds=30, what="a warning")
    wait_until(lambda: time.monotonic() - stopped > seconds, seconds=seconds + 10)
    assert fleet.workers() == ["ready"], "the lease needs no Redis"
    fleet.redis.send(signal.SIGCONT)
    _nothing_twice(fleet)


def test_redis_half_open(fleet: Fleet) -> None:
    _stop_redis(fleet, 2.0)


@pytest.mark.faults
def test_redis_half_open_for_longer_than_its_time_outs(fleet: Fleet) -> None:
    _stop_redis(fleet, 70.0)


def test_redis_full(fleet: Fleet) -> None:
    fleet.redis.do("CONFIG", "SET", "maxmemory", "1")
    nightherd = CommandLine(fleet.variables, fleet.folder)
    outcome = nightherd(
        "submit", "-", "--checkpoint", CHECKPOINT, "--seed", "1000", "--max-tokens", "8",
        stdin="".join(f"{prompt}\n" for prompt in PROMPTS),
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert "not announced yet" in outcome.err
    job = Submitted(outcome.out.strip(), 1000, tuple(PROMPTS))
    fleet.submitted.append(job)
    worker = fleet.start()
    wait_until(lambda: "maxmemory" in fleet.log(worker), seconds=30, what="the refusal in the log")
    assert worker.poll() is None
    assert fleet.done(job) == 0
    fleet.redis.do("CONFIG", "SET", "maxmemory", "0")
    _nothing_twice(fleet)


def test_visibility_timeout_shorter_than_a_chunk(fleet: Fleet) -> None:
    """Each wake-up is delivered again and again while its chunk is in flight."""
    fleet.start_many(
        2,
        step_seconds=0.02,
        restore_seconds=0.2,
        variables={"NIGHTHERD_VISIBILITY_TIMEOUT": "1"},
    )
    fleet.submit(PROMPTS[:16], max_tokens=150)
    _nothing_twice(fleet)
    wakes = [line.value for line in fleet.lines("wake")]
    assert wakes.count("nothing") >= 4


def test_wakeup_storm(fleet: Fleet) -> None:
    """Each wake-up comes ten times."""
    fleet.start_many(2, step_seconds=0.002, publish_times=10)
    for _ in range(5):
        fleet.wait_for_end(fleet.submit(MANY[:80], max_tokens=10))
    _nothing_twice(fleet)
    wakes = [line.value for line in fleet.lines("wake")]
    assert wakes.count("nothing") > 20, "more came than there were chunks"


def test_wakeups_all_lost(fleet: Fleet) -> None:
    fleet.start(lost_wakeups=20, step_seconds=0.002)
    job = fleet.submit(PROMPTS, publish=False)
    wait_until(lambda: bool(fleet.lines("lost")), seconds=30, what="the first lost wake-up")
    assert fleet.done(job) == 0
    _nothing_twice(fleet)
    assert len(fleet.lines("lost")) == 20
