"""What users fear first: a worker that dies, a broker that is away, a job that must stop now."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.acceptance.conftest import RAGGED, Fleet, kill_9, write_jsonl
from tests.commands.invoking import CommandLine
from tests.conftest import start_redis, wait_until

LONG = ("--max-tokens", "1900", "--ignore-eos")


def _every_row_once(fleet: Fleet, job: str, count: int) -> None:
    rows = fleet.results(job)
    assert [row["index"] for row in rows] == list(range(count))
    assert all(row["error"] is None for row in rows)


def test_worker_killed_with_9_in_the_middle(fleet: Fleet, tmp_path: Path) -> None:
    rows = [{"prompt": "Once upon a time", "max_tokens": length} for length in RAGGED]
    path = write_jsonl(tmp_path / "ragged.jsonl", rows)
    job = fleet.submit(path, "--ignore-eos")
    victim = fleet.start("worker", "--checkpoint", "demo", "--device", "cpu")
    wait_until(lambda: fleet.view(job).done > 0, seconds=90, what="a first saved row")
    kill_9(victim)
    saved = {row["index"]: row for row in fleet.results(job)}
    assert 0 < len(saved) < 60
    fleet.start_workers(1)
    view = fleet.wait(job)
    assert (view["state"], view["done"], view["failed"]) == ("completed", 60, 0)
    _every_row_once(fleet, job, 60)
    after = fleet.results(job)
    assert [row["completion_tokens"] for row in after] == RAGGED
    assert view["completion_tokens"] == sum(RAGGED)
    assert {row["index"]: row for row in after if row["index"] in saved} == saved


def test_sigterm_hands_the_work_back_at_once(fleet: Fleet, stories: Path) -> None:
    (worker,) = fleet.start_workers(1)
    job = fleet.submit(stories, *LONG)
    wait_until(lambda: fleet.view(job).chunks_running > 0, what="a claimed chunk")
    started = time.monotonic()
    worker.terminate()
    assert worker.wait(10) == 0
    assert time.monotonic() - started < 5
    view = fleet.status(job)
    assert (view["chunks_running"], view["workers"]) == (0, 0)
    assert view["state"] == "running"


def _acts_within_two_seconds(act: Callable[[], object], acted: Callable[[], bool]) -> None:
    act()
    started = time.monotonic()
    wait_until(acted, seconds=10, what="the change to act")
    assert time.monotonic() - started < 2


def test_pause_resume_priority_and_cancel_act_at_once(fleet: Fleet, stories: Path) -> None:
    fleet.start_workers(1)
    job = fleet.submit(stories, *LONG)
    wait_until(lambda: fleet.view(job).chunks_running > 0, what="a claimed chunk")

    _acts_within_two_seconds(
        lambda: fleet.nightherd("pause", job),
        lambda: fleet.view(job).chunks_running == 0,
    )
    assert fleet.view(job).state == "paused"
    _acts_within_two_seconds(
        lambda: fleet.nightherd("resume", job),
        lambda: fleet.view(job).chunks_running == 4,
    )

    urgent = fleet.submit(stories, *LONG, "--name", "urgent")
    assert fleet.view(urgent).chunks_running == 0, "all slots are taken"
    _acts_within_two_seconds(
        lambda: fleet.nightherd("set", urgent, "--priority", "5"),
        lambda: fleet.view(urgent).chunks_running == 4,
    )
    assert fleet.view(job).chunks_running == 0, "the lower priority is preempted"

    _acts_within_two_seconds(
        lambda: fleet.nightherd("cancel", urgent),
        lambda: fleet.view(urgent).chunks_running == 0,
    )
    view = fleet.status(urgent)
    assert (view["state"], view["chunks_queued"]) == ("cancelled", 0)
    assert fleet.nightherd("status", urgent, "--wait").code == 6
    wait_until(lambda: fleet.view(job).chunks_running == 4, what="the first job's return")


def test_a_broker_that_is_down_delays_and_loses_nothing(
    nightherd_without_broker: tuple[Fleet, Path], stories: Path
) -> None:
    fleet, socket = nightherd_without_broker
    outcome = fleet.nightherd("submit", stories, "--max-tokens", "4")
    assert outcome.code == 0
    assert "not announced yet" in outcome.err
    job = outcome.out.strip()
    assert fleet.view(job).state == "queued"
    fleet.start("worker", "--checkpoint", "demo")
    wait_until(lambda: len(fleet.ready()) == 1, seconds=60, what="a ready worker")
    assert fleet.view(job).done == 0
    process = start_redis(socket)
    try:
        assert fleet.wait(job)["done"] == 60
    finally:
        fleet.stop()
        process.kill()
        process.wait()


def test_a_run_beside_a_worker_uses_it(embedded: Fleet, stories: Path, tmp_path: Path) -> None:
    embedded.start_workers(1)
    outcome = embedded.nightherd(
        "run", stories, "--max-tokens", "4", "-o", tmp_path / "out.jsonl", seconds=90
    )
    assert outcome.code == 0
    assert "takes it" in outcome.err
    assert len(embedded.json("workers", "--all")) == 1


def test_ctrl_c_keeps_the_job_of_a_run(embedded: Fleet, stories: Path, tmp_path: Path) -> None:
    import signal

    process = embedded.start("run", str(stories), *LONG, "-o", str(tmp_path / "out.jsonl"))
    wait_until(
        lambda: any(view["chunks_running"] for view in embedded.json("jobs")),
        seconds=60,
        what="a claimed chunk",
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    (view,) = embedded.json("jobs")
    assert (view["state"], view["chunks_running"]) == ("running", 0)
    assert f"--only-job {view['id']}" in embedded.logs()
    assert embedded.json("workers") == []
    assert not (tmp_path / "out.jsonl").exists()


def test_a_run_whose_worker_cannot_start_says_why(nightherd_alone: CommandLine) -> None:
    folder = nightherd_alone.folder / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 999}')
    outcome = nightherd_alone("run", "-", "--checkpoint", "./broken", stdin="a\n")
    assert outcome.code == 1
    assert len(outcome.error_lines) == 1
    assert "Traceback" not in outcome.err
    assert "no safetensors files" in outcome.err
