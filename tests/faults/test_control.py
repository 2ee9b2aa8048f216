"""Cancel, pause, resume, retry and a change of priority, in the middle of things."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

from models.job import ENDED_JOB_STATES
from models.store import jobs
from nightherd.errors import ConflictError
from tests.conftest import wait_until
from tests.faults.conftest import PROMPTS, Fleet
from tests.faults.oracle import Submitted

AT_ONCE = 2.0


def _running(fleet: Fleet, job: Submitted) -> int:
    return fleet.chunks(job).count("running")


def _in_the_middle(fleet: Fleet, job: Submitted, slots: int = 4) -> None:
    """Waits until some of a job is saved, and all slots are on the rest of it."""
    wait_until(
        lambda: fleet.done(job) > 0 and _running(fleet, job) == slots,
        seconds=30,
        what="a job in the middle",
    )


def test_cancel_mid_chunk_aborts_what_runs(fleet: Fleet) -> None:
    worker = fleet.start(step_seconds=0.01, max_sequences=10, trace=True)
    job = fleet.submit(PROMPTS, max_tokens=100, states=("cancelled",))
    _in_the_middle(fleet, job)
    fleet.act(jobs.cancel, job)
    cancelled = time.monotonic()
    wait_until(lambda: set(fleet.chunks(job)) <= {"done", "cancelled"}, what="the chunks' end")
    assert time.monotonic() - cancelled < AT_ONCE
    saved = fleet.done(job)
    last = fleet.lines("step")[-1].at
    assert last - cancelled < AT_ONCE, "no sequence of it runs any more"
    # The engine is free for others at once, and what had finished stays.
    fleet.submit(PROMPTS[:4])
    fleet.is_clean()
    later = [int(line.value) for line in fleet.lines("step") if line.at > last]
    assert 0 < max(later) <= 4
    assert fleet.done(job) == saved > 0
    assert worker.poll() is None


def test_pause_and_resume_mid_chunk(fleet: Fleet) -> None:
    fleet.start_many(2, step_seconds=0.01, max_sequences=10)
    job = fleet.submit([f"prompt {number}" for number in range(80)], max_tokens=80)
    _in_the_middle(fleet, job, slots=8)
    fleet.act(jobs.pause, job)
    paused = time.monotonic()
    wait_until(lambda: _running(fleet, job) == 0, what="the chunks' return")
    assert time.monotonic() - paused < AT_ONCE
    done = fleet.done(job)
    assert (fleet.state(job), done) == ("paused", fleet.judge().ok)
    fleet.act(jobs.resume, job)
    fleet.publish_wakeups()
    verdict = fleet.is_clean()
    assert fleet.deaths() == 0
    assert verdict.recomputed == 0, "what had finished was saved, the rest had not"


def test_retry_mid_job(fleet: Fleet, tmp_path: Path) -> None:
    """Rows fail, and are retried while the job still runs and a worker dies."""
    failing = tmp_path / "failing"
    failing.touch()
    workers = fleet.start_many(
        2, step_seconds=0.01, fail_on="prompt 3", fail_while=str(failing), max_sequences=16
    )
    job = fleet.submit([f"prompt {number}" for number in range(80)], max_tokens=100)
    # Prompts 3 and 30 to 39 fail.
    wait_until(lambda: _failed(fleet) >= 5, seconds=30, what="failed rows")
    failing.unlink()
    assert fleet.state(job) == "running"
    retried = fleet.database.retrying(
        lambda connection: jobs.retry(connection, job.job_id, only_code=None, chunk_size=4)
    )
    assert retried > 0
    fleet.publish_wakeups()
    fleet.kill_9(fleet.wait_for_holders(workers)[0])
    fleet.wait_for_end()
    # What failed in a chunk that was still open is for another retry.
    left = fleet.database.retrying(
        lambda connection: jobs.retry(connection, job.job_id, only_code=None, chunk_size=4)
    )
    fleet.publish_wakeups()
    assert retried + left <= 11
    fleet.is_clean()


def _failed(fleet: Fleet) -> int:
    return len([text for text in fleet.judge().unexpected if "engine_error" in text])


def test_priority_change_mid_job(fleet: Fleet) -> None:
    fleet.start(step_seconds=0.01)
    low = fleet.submit(PROMPTS[:16], max_tokens=300)
    wait_until(lambda: _running(fleet, low) == 4, seconds=30)
    urgent = fleet.submit(PROMPTS[:16], max_tokens=60)
    time.sleep(0.5)
    assert _running(fleet, urgent) == 0, "all slots are taken"
    fleet.act(jobs.change, urgent, {"priority": 5})
    changed = time.monotonic()
    wait_until(lambda: _running(fleet, urgent) == 4, what="the urgent chunks' claims")
    assert time.monotonic() - changed < AT_ONCE
    fleet.wait_for_end(urgent)
    assert fleet.state(low) == "running"
    fleet.is_clean()
    assert fleet.deaths() == 0


def test_cancel_racing_completion(fleet: Fleet) -> None:
    """Whoever comes first, there is one end, and it stays."""
    moments = random.Random(1)
    fleet.start_many(2, step_seconds=0.001)
    seen: dict[str, str] = {}
    for _ in range(20):
        job = fleet.submit(PROMPTS[:6], chunk_size=2, states=ENDED_JOB_STATES)
        time.sleep(moments.uniform(0.0, 0.12))
        try:
            fleet.act(jobs.cancel, job)
        except ConflictError:
            assert fleet.state(job) == "completed"
        seen[job.job_id] = fleet.state(job)
        assert seen[job.job_id] in ("completed", "cancelled")
    wait_until(
        lambda: all("running" not in fleet.chunks(job) for job in fleet.submitted),
        seconds=30,
        what="the end of all chunks",
    )
    assert {job.job_id: fleet.state(job) for job in fleet.submitted} == seen
    fleet.submitted = [
        dataclasses.replace(job, states=(seen[job.job_id],)) for job in fleet.submitted
    ]
    fleet.is_clean()
