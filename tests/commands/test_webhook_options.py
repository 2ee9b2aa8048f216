"""Webhooks from the command line: refused in one line, shown, and sent by real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.invoking import CommandLine, environment
from tests.conftest import wait_until
from tests.receiver import SECRET, Receiver, receiver

HOOKED = {"webhook_secret": SECRET, "webhook_allow_private": "true", "webhook_poll_seconds": 0.2}


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as started:
        yield started


@pytest.fixture
def hooked(tmp_path: Path) -> CommandLine:
    (tmp_path / "in.txt").write_text("Once upon a time\n")
    return CommandLine(environment(tmp_path, **HOOKED), tmp_path)


def test_a_bad_webhook_is_one_line_and_nothing_is_stored(
    nightherd: CommandLine, hooked: CommandLine, tmp_path: Path
) -> None:
    for command, url, said in (
        (nightherd, "https://hooks.example/a", "--on-failure needs NIGHTHERD_WEBHOOK_SECRET"),
        (hooked, "ftp://hooks.example/a", "--on-failure must be an http:// or https:// URL"),
        (hooked, "https://a:b@hooks.example/", "--on-failure must hold no user or password"),
    ):
        outcome = command("submit", "in.txt", "--on-failure", url)
        assert outcome.code == 2, outcome
        (line,) = outcome.error_lines
        assert line.startswith(f"nightherd: {said}")
        assert not (tmp_path / "data" / "nightherd.db").exists()
    rule = ("--cron", "@nightly", "in.txt")
    added = nightherd("schedule", "add", "a", *rule, "--on-failure", "https://hooks.example/a")
    assert added.code == 2
    assert added.error_lines[0].startswith("nightherd: --on-failure needs NIGHTHERD_WEBHOOK_SECRET")
    assert json.loads(nightherd("schedule", "list", "--json").out) == []


def test_a_beat_tells_that_a_job_was_cancelled(
    hooked: CommandLine, hook: Receiver, tmp_path: Path
) -> None:
    url = f"{hook.url}/hush"
    job = hooked("submit", "in.txt", "--on-failure", url, "--on-complete", url).out.strip()
    assert hooked("cancel", job).code == 0
    said = hooked("status", job).out
    assert "webhook on failure to http://127.0.0.1: waiting" in said
    assert "hush" not in said
    hook.answers.append(500)
    log = tmp_path / "beat.log"
    beat = hooked.start("beat", log=log)
    try:
        wait_until(lambda: len(hook.received) == 1, seconds=20, what="the first attempt")
        wait_until(lambda: "again in 5 s" in log.read_text(), what="its record")
        wait_until(lambda: len(hook.received) == 2, seconds=20, what="the second one")
    finally:
        beat.terminate()
        assert beat.wait(20) == 0
    assert [received.body["type"] for received in hook.received] == ["job.cancelled"] * 2
    assert all(received.is_signed() for received in hook.received)
    shown = json.loads(hooked("status", job, "--json").out)["webhooks"]
    states = {webhook["on"]: webhook["state"] for webhook in shown}
    assert states == {"complete": "dropped", "failure": "delivered"}
    assert "hush" not in log.read_text()
    assert SECRET not in log.read_text()


def test_run_tells_by_its_own_worker(hooked: CommandLine, hook: Receiver, tmp_path: Path) -> None:
    done = hooked(
        *("run", "in.txt", "--max-tokens", "3", "--on-complete", hook.url, "-o", "out.jsonl"),
        seconds=120,
    )
    assert done.code == 0, done
    (received,) = hook.received
    assert received.body["data"]["job"] == done.out.strip()
    shown = json.loads(hooked("status", done.out.strip(), "--json").out)["webhooks"]
    assert [webhook["state"] for webhook in shown] == ["delivered"]
