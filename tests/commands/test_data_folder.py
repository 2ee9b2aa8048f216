"""A data folder that refuses, and a schema of another version: one line, exit 4, nothing lost.

Root is refused nothing, so the commands run as another user (`tests.sandbox`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from migrations import schema
from models import SCHEMA_REVISION
from models.database import Database
from tests.commands.invoking import NIGHTHERD, CommandLine, Outcome, environment
from tests.conftest import wait_until
from tests.fakes import CHECKPOINT
from tests.sandbox import ROOT, Sandbox, sandbox

ALL_KINDS = [
    ["jobs"],
    ["submit", "-"],
    ["worker", "--checkpoint", "demo"],
    ["beat"],
    ["db", "upgrade"],
]
"""One command of each kind: reading, storing, the two processes, the schema."""
SOME_KINDS = ALL_KINDS[:2]


class OtherUser:
    """The command line as another user, on any data folder."""

    def __init__(self, box: Sandbox) -> None:
        self.box = box
        self.environment = {**environment(box.home), "PYTHONPATH": str(ROOT)}

    def __call__(self, home: Path, *arguments: str, stdin: str = "a\n") -> Outcome:
        variables = {**self.environment, "NIGHTHERD_HOME": str(home)}
        done = self.box.run(*NIGHTHERD, *arguments, environment=variables, input=stdin)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def shell(self, script: str) -> str:
        return self.box.run("sh", "-c", script, environment=self.environment).stdout


@pytest.fixture
def other_user() -> Iterator[OtherUser]:
    with sandbox() as box:
        yield OtherUser(box)


@pytest.fixture
def root(tmp_path: Path) -> CommandLine:
    """The command line as root."""
    return CommandLine(environment(tmp_path), tmp_path)


def refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 4, outcome
    assert outcome.out == ""
    assert len(outcome.error_lines) == 1, outcome.err
    assert outcome.err.startswith("nightherd: ")
    for part in parts:
        assert part in outcome.err


def doctor(other_user: OtherUser, home: Path) -> Outcome:
    found = other_user(home, "doctor", "--only", "database,broker,workers,disk")
    assert found.code == 1, found
    assert found.err == ""
    assert "PROBLEM" in found.out
    return found


def test_a_data_folder_that_cannot_be_made(other_user: OtherUser) -> None:
    home = other_user.box.make("closed", owner=0) / "data"
    for command in SOME_KINDS:
        refused(other_user(home, *command), str(home), "Permission denied", "NIGHTHERD_HOME")
    assert not home.exists()
    assert "cannot be written" in doctor(other_user, home).out


@pytest.mark.parametrize(
    ("mode", "commands"),
    [(0o755, ALL_KINDS), (0o700, SOME_KINDS)],
    ids=["read-only", "closed"],
)
def test_a_data_folder_of_another_user(
    other_user: OtherUser, root: CommandLine, mode: int, commands: list[list[str]]
) -> None:
    home = other_user.box.make("theirs", owner=0)
    as_root = CommandLine({**root.environment, "NIGHTHERD_HOME": str(home)}, root.folder)
    job = as_root("submit", "-", stdin="a\n").out.strip()
    home.chmod(mode)
    before = {path.name: path.read_bytes() for path in home.iterdir() if path.is_file()}
    for command in commands:
        refused(other_user(home, *command), str(home / "nightherd.db"))
    doctor(other_user, home)
    assert {path.name: path.read_bytes() for path in home.iterdir() if path.is_file()} == before
    assert [found["id"] for found in json.loads(as_root("jobs", "--json").out)] == [job]


def test_an_empty_data_folder_of_another_user(other_user: OtherUser) -> None:
    home = other_user.box.make("theirs", owner=0)
    for command in SOME_KINDS:
        refused(other_user(home, *command), str(home / "nightherd.db"))
    assert not list(home.iterdir())
    assert "cannot be made" in doctor(other_user, home).out


def test_a_disk_that_was_mounted_read_only(other_user: OtherUser) -> None:
    home = other_user.box.disk("disk", 4000)
    job = other_user(home, "submit", "-").out.strip()
    other_user.box.remount("disk", "ro")
    for command in SOME_KINDS:
        refused(other_user(home, *command), str(home / "nightherd.db"))
    doctor(other_user, home)
    other_user.box.remount("disk", "rw")
    assert [found["id"] for found in json.loads(other_user(home, "jobs", "--json").out)] == [job]


def test_no_room_for_the_schema(other_user: OtherUser) -> None:
    home = other_user.box.disk("disk", 64)
    for command in SOME_KINDS:
        refused(other_user(home, *command), str(home / "nightherd.db"), "full")
    assert "full" in doctor(other_user, home).out
    other_user.box.remount("disk", "size=4000k")
    assert other_user(home, "submit", "-").code == 0


def test_the_disk_fills_up_while_a_job_is_stored(other_user: OtherUser) -> None:
    home = other_user.box.disk("disk", 3000)
    other_user.environment["NIGHTHERD_STORE_BATCH"] = "1000"
    prompts = "".join(f"{number} {'x' * 250}\n" for number in range(10_000))
    refused(other_user(home, "submit", "-", stdin=prompts), "nightherd.db", "full")
    assert json.loads(other_user(home, "jobs", "--json").out) == []
    other_user.box.remount("disk", "size=30000k")
    job = other_user(home, "submit", "-", stdin=prompts).out.strip()
    (found,) = json.loads(other_user(home, "jobs", "--json").out)
    assert (found["id"], found["requests"], found["state"]) == (job, 10_000, "queued")


def test_the_disk_fills_up_while_a_worker_works(other_user: OtherUser, tmp_path: Path) -> None:
    """Results wait in memory; once there is room again all are stored, each once."""
    home = other_user.box.disk("disk", 8000)
    prompts = "".join(f"{number}\n" for number in range(200))
    given = ["--checkpoint", CHECKPOINT, "--max-tokens", "15"]
    job = other_user(home, "submit", "-", *given, stdin=prompts).out.strip()
    path = tmp_path / "worker.log"
    with path.open("wb") as log:
        fake = [sys.executable, "-P", "-m", "tests.fakes", json.dumps({"step_seconds": 0.2})]
        worker = subprocess.Popen(
            other_user.box.command(*fake),
            env={**other_user.environment, "NIGHTHERD_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(
            lambda: json.loads(other_user(home, "status", job, "--json").out)["chunks_running"] > 0,
            seconds=30,
            what="a worker at work",
        )
        other_user.shell(f"cat /dev/zero > {home}/filler")
        wait_until(lambda: "wait in memory" in path.read_text(), seconds=30, what="a full disk")
        refused(other_user(home, "submit", "-"), "full")
        time.sleep(3)  # longer than a lease of these tests
        assert worker.poll() is None
        other_user.shell(f"rm {home}/filler")
        ended = other_user(home, "status", job, "--wait")
        assert ended.code == 0, ended
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        worker.terminate()  # so that it stops its broker
        worker.wait(60)
    rows = [json.loads(line) for line in other_user(home, "results", job).out.splitlines()]
    assert [row["index"] for row in rows] == list(range(200))
    assert all(row["finish_reason"] == "length" for row in rows)


# The schema.


def command_on(url: str, folder: Path) -> CommandLine:
    return CommandLine(environment(folder, database_url=url), folder)


def stamp(url: str, revision: str) -> None:
    database = Database(url)
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": revision})
    database.close()


def test_postgresql_without_a_schema(empty_postgresql: str, tmp_path: Path) -> None:
    nightherd = command_on(empty_postgresql, tmp_path)
    for command in ALL_KINDS[:-1]:
        refused(nightherd(*command, stdin="a\n"), "no schema yet", "nightherd db upgrade")


def test_a_newer_schema_on_postgresql(empty_postgresql: str, tmp_path: Path) -> None:
    nightherd = command_on(empty_postgresql, tmp_path)
    assert nightherd("db", "upgrade").code == 0
    job = nightherd("submit", "-", stdin="a\n").out.strip()
    stamp(empty_postgresql, "9999")
    for command in ALL_KINDS[:-1]:
        refused(nightherd(*command, stdin="a\n"), "9999", "newer", "upgrade nightherd")
    found = nightherd("doctor", "--only", "database")
    assert found.code == 1
    assert "remedy: upgrade nightherd" in found.out
    stamp(empty_postgresql, SCHEMA_REVISION)
    assert [found["id"] for found in json.loads(nightherd("jobs", "--json").out)] == [job]


def test_a_newer_schema_on_sqlite(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/nightherd.db"
    database = Database(url)
    schema.upgrade(database)
    database.close()
    stamp(url, "9999")
    nightherd = command_on(url, tmp_path)
    for command in SOME_KINDS:
        refused(nightherd(*command, stdin="a\n"), "9999", "newer", "upgrade nightherd")


def test_an_older_schema_on_postgresql(empty_postgresql: str, tmp_path: Path) -> None:
    """As a program sees it whose schema is one further."""
    nightherd = command_on(empty_postgresql, tmp_path)
    assert nightherd("db", "upgrade").code == 0
    later = "import models; models.SCHEMA_REVISION = '9999'; from nightherd.cli import main; main()"
    for command in ALL_KINDS[:-1]:
        done = subprocess.run(
            [sys.executable, "-P", "-c", later, *command],
            input="a\n",
            capture_output=True,
            text=True,
            env=dict(nightherd.environment),
            cwd=tmp_path,
            timeout=60,
            check=False,
        )
        outcome = Outcome(done.returncode, done.stdout, done.stderr)
        refused(outcome, "old schema", SCHEMA_REVISION, "nightherd db upgrade")
