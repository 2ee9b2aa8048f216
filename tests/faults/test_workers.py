"""Faults of workers: killed, told to stop, standing still, hanging, with a wrong clock."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from sqlalchemy import func, select

from models.base import db_now
from models.job import Chunk, Job, Result
from models.worker import Worker
from tests.conftest import wait_until
from tests.faults.conftest import PROMPTS, Fleet

MANY = [f"prompt {number}" for number in range(160)]
RAGGED = [4 + 7 * number % 25 for number in range(160)]
STEPPED = [10 + 40 * (number % 4) for number in range(160)]
"""In each chunk of four, one request ends long before the others."""
COMMIT = "worker.chunks.writer:Writer._commit"
LEASE_AND_TICKS = 2.0 + 2 * 0.5 + 1.0
"""The lease, a tick for the reaper, one for the wake-up, and a second for a slow machine."""


def _kill_at_random(fleet: Fleet, kills: int, seed: int) -> None:
    """Kills workers in the middle of chunks, and starts others instead, so many times."""
    moments = random.Random(seed)
    fleet.start_beat()
    workers = fleet.start_many(2, step_seconds=0.004)
    job = None
    for _ in range(kills):
        if job is None or fleet.done(job) > len(MANY) // 2:
            job = fleet.submit(MANY, max_tokens=RAGGED, chunk_size=8)
        victims = fleet.wait_for_holders(workers)
        time.sleep(moments.uniform(0.0, 0.2))
        victim = moments.choice(victims)
        fleet.kill_9(victim)
        workers.remove(victim)
        workers.append(fleet.start(ready=False, step_seconds=0.004))
    verdict = fleet.is_clean(seconds=120)
    assert verdict.recomputed <= kills * 4 * 8, "no more than the chunks in flight"
    assert verdict.recovery is None or verdict.recovery < 30


def test_worker_kill9_mid_chunk(fleet: Fleet) -> None:
    first, _ = fleet.start_many(2, step_seconds=0.01)
    fleet.submit(MANY[:32], max_tokens=STEPPED[:32])
    wait_until(lambda: fleet.half_done(first), seconds=30, what="a chunk that is saved in part")
    fleet.kill_9(first)
    verdict = fleet.is_clean()
    assert fleet.deaths() == 1
    assert verdict.recomputed <= 4 * 4
    assert verdict.recovery is not None
    assert 0 < verdict.recovery < LEASE_AND_TICKS + 5


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(5))
def test_worker_kill9_mid_chunk_at_random_moments(fleet: Fleet, seed: int) -> None:
    """A hundred kills on each database."""
    _kill_at_random(fleet, kills=20, seed=seed)


def test_kill9_between_pop_and_unacked(sqlite_fleet: Fleet) -> None:
    """The broker's own loss window: the wake-up is neither queued nor unacknowledged, but gone."""
    fleet = sqlite_fleet
    victim = fleet.start(at="kombu.transport.redis:QoS.append")
    fleet.submit(PROMPTS[:4])
    fleet.is_killed(victim)
    assert fleet.redis.wake_ups() == 0
    assert fleet.redis.do("HLEN", "nightherd:unacked") == 0, "it was popped and is lost"
    fleet.start()
    verdict = fleet.is_clean()
    assert (fleet.deaths(), verdict.recomputed) == (0, 0)


def test_kill9_after_commit_before_ack(fleet: Fleet) -> None:
    victim = fleet.start(
        at="kombu.transport.redis:QoS.ack", armed_by="worker.chunks.inflight:InFlight.forget"
    )
    fleet.submit(PROMPTS[:4])
    fleet.is_killed(victim)
    fleet.is_clean(seconds=1)
    assert fleet.redis.do("HLEN", "nightherd:unacked") == 1, "done, and not acknowledged"
    other = fleet.start(variables={"NIGHTHERD_VISIBILITY_TIMEOUT": "1"}, restore_seconds=0.2)

    def wakes() -> set[str]:
        return {line.value for line in fleet.lines("wake") if line.pid == other.pid}

    # Between the unacknowledged and its second delivery a wake-up is in the queue.
    wait_until(lambda: bool(wakes()), seconds=30, what="the wake-up's second delivery")
    wait_until(
        lambda: fleet.redis.do("HLEN", "nightherd:unacked") == 0,
        seconds=30,
        what="its acknowledgement",
    )
    assert wakes() == {"nothing"}
    assert fleet.is_clean().recomputed == 0


def test_sigterm_mid_chunk(fleet: Fleet) -> None:
    # Nothing is saved before its chunk ends, but in a drain.
    workers = fleet.start_many(
        2,
        step_seconds=0.01,
        variables={"NIGHTHERD_SLOTS": "8", "NIGHTHERD_SAVE_SECONDS": "60"},
    )
    job = fleet.submit(MANY[:32], max_tokens=STEPPED[:32])
    wait_until(lambda: bool(fleet.lines("sample")), seconds=30, what="a chunk in the middle")
    busy = fleet.lines("sample")[0].pid
    first, second = sorted(workers, key=lambda worker: worker.pid != busy)
    assert not fleet.saved()
    told = time.monotonic()
    first.terminate()
    assert fleet.ends(first) == 0
    assert fleet.saved(), "what had finished is saved in the drain"
    assert not fleet.unsaved_by(first)
    wait_until(lambda: "queued" not in fleet.chunks(job), what="the other's claims")
    assert time.monotonic() - told < 5 + 2
    assert fleet.unsaved_by(second)
    verdict = fleet.is_clean()
    assert fleet.deaths() == 0
    assert verdict.recomputed == 0


@pytest.mark.parametrize(
    ("function", "deaths"),
    [(COMMIT, 1), ("worker.process.lease:Lease.leave", 0)],
    ids=["before its chunks are returned", "before it leaves"],
)
def test_sigterm_then_kill9_during_drain(fleet: Fleet, function: str, deaths: int) -> None:
    victim, _ = (
        fleet.start(
            ready=False,
            step_seconds=0.01,
            at=function,
            armed_by="worker.chunks.inflight:InFlight.close",
        ),
        fleet.start(ready=False, step_seconds=0.01),
    )
    fleet.wait_until_ready(*fleet.processes)
    job = fleet.submit(MANY[:32], max_tokens=300)
    wait_until(
        lambda: fleet.chunks(job).count("running") == 8, seconds=30, what="both in the middle"
    )
    victim.terminate()
    fleet.is_killed(victim)
    fleet.is_clean()
    assert fleet.deaths() == deaths


def test_sigterm_five_times_sigint_and_sigquit(fleet: Fleet) -> None:
    workers = fleet.start_many(3, step_seconds=0.01)
    job = fleet.submit(MANY[:48], max_tokens=2000)
    wait_until(lambda: fleet.chunks(job).count("running") == 12, seconds=30)
    told = ([signal.SIGTERM] * 5, [signal.SIGINT], [signal.SIGQUIT])
    for worker, signals in zip(workers, told, strict=True):
        for number in signals:
            worker.send_signal(number)
    assert [fleet.ends(worker) for worker in workers] == [0, 0, 0]
    assert set(fleet.chunks(job)) == {"queued"}
    assert fleet.workers() == ["stopped"] * 3
    assert fleet.deaths() == 0


def test_zombie_worker(fleet: Fleet) -> None:
    """It stands still in front of a commit, past its lease, and goes on with that commit."""
    zombie = fleet.start(
        step_seconds=0.005,
        at=COMMIT,
        signal="SIGSTOP",
        variables={"NIGHTHERD_TICK_SECONDS": "60", "NIGHTHERD_RENEW_SECONDS": "1"},
    )
    job = fleet.submit(PROMPTS[:32], max_tokens=30)
    wait_until(lambda: bool(fleet.lines("signal")), seconds=30, what="the standstill")
    assert fleet.done(job) == 0
    fleet.start(step_seconds=0.005)
    wait_until(lambda: "dead" in fleet.workers(), seconds=30, what="its being declared dead")
    fleet.wait_for_end(job)
    zombie.send_signal(signal.SIGCONT)
    wait_until(lambda: "registering anew" in fleet.log(zombie), seconds=30)
    wait_until(lambda: "is not ours any more" in fleet.log(zombie), seconds=30)
    wait_until(lambda: fleet.workers().count("ready") == 2, what="its return")
    verdict = fleet.is_clean()
    assert verdict.recomputed > 0
    assert fleet.deaths() == 1


def test_engine_hang(sqlite_fleet: Fleet) -> None:
    fleet = sqlite_fleet
    victim = fleet.start(step_seconds=0.01, hang_on="prompt 7", step_limit=1.0)
    fleet.submit(PROMPTS[:24], max_tokens=20)
    wait_until(lambda: bool(fleet.lines("hang")), seconds=30, what="the hang")
    fleet.start(step_seconds=0.01)
    assert victim.wait(30) == 70
    assert "the engine hangs" in fleet.log(victim)
    fleet.is_clean()
    assert fleet.deaths() == 1


def test_a_long_load_and_a_long_compilation_are_no_hang(sqlite_fleet: Fleet) -> None:
    """Both take longer than the lease."""
    fleet = sqlite_fleet
    worker = fleet.start(load_seconds=3.0, first_step_seconds=3.0)
    fleet.submit(PROMPTS[:8])
    assert fleet.is_clean().recomputed == 0
    assert fleet.workers() == ["ready"]
    assert fleet.deaths() == 0
    assert "does not finish its step" not in fleet.log(worker)


SKEWED = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long offset(void) { return atol(getenv("CLOCK_OFFSET")); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *out) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}
"""


@pytest.fixture
def skewed_clock(tmp_path: Path) -> Path:
    """A library that puts a process's time of day off by CLOCK_OFFSET seconds."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "skew.c", tmp_path / "skew.so"
    source.write_text(SKEWED)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def test_clock_skew(postgresql_fleet: Fleet, skewed_clock: Path) -> None:
    """Workers whose clocks are five minutes before and behind the database's."""
    fleet = postgresql_fleet
    for offset in (300, -300):
        variables = {"LD_PRELOAD": str(skewed_clock), "CLOCK_OFFSET": str(offset)}
        fleet.start(ready=False, step_seconds=0.01, variables=variables)
    early, late = fleet.processes
    fleet.wait_until_ready(early, late)
    hours = {fleet.log(worker).split("Z ", 1)[0][:16] for worker in (early, late)}
    assert len(hours) == 2, "their logs tell different times"
    first = fleet.submit(MANY[:64], max_tokens=200)
    wait_until(lambda: bool(fleet.unsaved_by(early)), seconds=30)
    wait_until(lambda: bool(fleet.unsaved_by(late)), seconds=30)
    assert fleet.is_clean().recomputed == 0
    assert fleet.workers() == ["ready", "ready"]
    outside = select(func.count()).where(
        (Result.finished_at > db_now(5)) | (Result.started_at < select(Job.created_at).where(
            Job.id == first.job_id).scalar_subquery())
    )  # fmt: skip
    assert fleet.column(outside) == [0], "times of results are the database's"
    # A death is noticed after a lease of the database's seconds, not minutes early or late.
    fleet.submit(MANY[:64], max_tokens=200)
    wait_until(lambda: bool(fleet.unsaved_by(early)), seconds=30)
    fleet.kill_9(early)
    verdict = fleet.is_clean(seconds=30)
    assert verdict.recovery is not None
    assert fleet.column(select(Worker.state).where(Worker.pid == late.pid)) == ["ready"]
    assert set(fleet.column(select(Chunk.deaths))) <= {0, 1}
