"""`nightherd schedule …` as a user meets it: a clear line for what is wrong, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import update

from models.base import db_now
from models.database import Database
from models.schedule import Firing, Schedule
from models.store import firings
from nightherd.cli import cli
from nightherd.errors import NightherdError
from nightherd.settings import load_settings
from producer.fleet.open_database import open_database
from producer.schedules.firing_loop import FiringLoop
from tests.seeding import make_worker, work_off

Run = Callable[..., Any]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NIGHTHERD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NIGHTHERD_BROKER_TIMEOUT", "0.2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    return tmp_path


@pytest.fixture
def database(home: Path) -> Any:
    opened = open_database(load_settings())
    yield opened
    opened.close()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["schedule", *arguments], standalone_mode=False)


def run(*arguments: str) -> str:
    """What it prints; an error is raised as it is."""
    result = invoke(*arguments)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def read(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


def refused(*arguments: str) -> str:
    result = invoke(*arguments)
    error = result.exception
    assert error is not None, "it was accepted"
    assert isinstance(error, NightherdError) or hasattr(error, "format_message"), repr(error)
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    assert "\n" not in text
    return str(text)


ADD = ("add", "nightly", "in.jsonl", "--cron", "0 2 * * *")


def test_add_and_what_is_stored(home: Path) -> None:
    added = read(
        *ADD,
        *("--timezone", "Europe/Berlin", "-o", "out.jsonl", "--starting-deadline", "6h"),
        *("--deadline", "8h", "--max-tokens", "20", "--stop", "a", "--stop", "b", "--paused"),
        *("--concurrency", "allow", "--misfire", "all", "--keep-succeeded", "7"),
    )
    assert (added["name"], added["cron"], added["timezone"]) == (
        "nightly",
        "0 2 * * *",
        "Europe/Berlin",
    )
    assert added["input"] == {"path": str(home / "in.jsonl")}
    assert added["options"]["output"] == str(home / "out.jsonl")
    assert added["options"]["deadline_seconds"] == 8 * 3600
    assert added["options"]["max_tokens"] == 20
    assert added["options"]["stop"] == ["a", "b"]
    assert (added["concurrency"], added["misfire"]) == ("allow", "all")
    assert (added["starting_deadline_seconds"], added["keep_succeeded"]) == (6 * 3600, 7)
    assert (added["paused"], added["next_at"], added["last"]) == (True, None, None)
    assert read("show", "nightly") == added
    assert read("list") == [added]


def test_list_shows_the_next_firing_in_its_zone_and_how_the_last_went(
    home: Path, database: Database
) -> None:
    run(*ADD, "--timezone", "Australia/Lord_Howe")
    (view,) = read("list")
    next_at = datetime.fromisoformat(view["next_at"])
    assert next_at.utcoffset() == timedelta(0)
    assert next_at.hour in (15, 16)
    text = run("list")
    assert "nightly" in text
    assert "02:00 +1" in text
    job = run("run-now", "nightly").strip()
    work_off(database, make_worker(database))
    _round(database)
    text = run("list")
    assert f"succeeded {job}" in text
    (view,) = read("list")
    assert view["last"]["state"] == "succeeded"
    assert view["last"]["job"] == job
    assert "nightly: 0 2 * * * in Australia/Lord_Howe" in run("show", "nightly")


def _round(database: Database) -> None:
    loop = FiringLoop(database, load_settings())
    loop._look_for_ends_at = -1e9
    try:
        loop.round()
    finally:
        loop.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--cron", "0 25 * * *"], "--cron '0 25 * * *': bad hour; write five fields"),
        (["--cron", "0 2 31 2 *"], "bad day-of-month"),
        (["--cron", "@yearly"], "is no alias"),
        (["--timezone", "Berlin"], "did you mean Europe/Berlin?"),
        (["--template", "{{ a"], "--template, line 1"),
        (["--temperature", "-1"], "temperature"),
        (["--max-tokens", "100000000"], "max_tokens"),
        (["--param", "nope=1"], "nope"),
        (["--checkpoint", "/not/there"], "no checkpoint at /not/there"),
        (["-o", "/not/there/out.jsonl"], "there is no folder /not/there"),
        (["-o", "."], "it is a folder"),
        (["-o", "/proc/out.jsonl"], "cannot be written to"),
        (["-o", "{{ nonsense }}.jsonl"], "nonsense"),
        (["--starting-deadline", "soon"], "'soon' is no span of time"),
        (["--deadline", "0h"], "'0h' is no span of time"),
        (["--input-sql", "SELECT 1", "--input-database", "X"], "two inputs"),
        (["--input-sql", "SELECT 1"], "two inputs"),
        (["--task-arg", "a=b"], "--task-arg a has no --task"),
        (["--keep-failed", "-1"], "-1"),
    ],
)
def test_what_can_be_known_is_refused_at_add(home: Path, changes: list[str], message: str) -> None:
    assert message in refused(*ADD, *changes)
    assert read("list") == []


def test_an_input_that_is_not_there_yet_is_a_notice(home: Path) -> None:
    result = invoke("add", "n", "later.jsonl", "--cron", "@daily")
    assert result.exception is None
    assert "later.jsonl is not there yet" in result.stderr
    for path in ("later-*.jsonl", "{{ scheduled_for }}.jsonl"):
        result = invoke("add", path, path, "--cron", "@daily")
        assert result.exception is None
        assert "not there" not in result.stderr


def test_add_needs_an_input_and_a_line(home: Path) -> None:
    assert "no input" in refused("add", "n", "--cron", "@daily")
    assert "give a path, not -" in refused("add", "n", "-", "--cron", "@daily")
    assert "--cron is needed" in refused("add", "n", "in.jsonl")
    assert "--input-database is not given" in refused(
        "add", "n", "--cron", "@daily", "--input-sql", "SELECT 1"
    )
    assert "is no name" in refused("add", "a\nb", "in.jsonl", "--cron", "@daily")


def test_a_name_is_taken_once_and_a_wrong_one_has_a_hint(home: Path) -> None:
    run(*ADD)
    assert "there is a schedule nightly already" in refused(*ADD)
    for command in ("show", "next", "pause", "resume", "run-now", "history", "remove", "edit"):
        rest = ("--cron", "@daily") if command == "edit" else ()
        assert "did you mean nightly?" in refused(command, "nihgtly", *rest)


def test_next(home: Path) -> None:
    run("add", "n", "in.jsonl", "--cron", "30 2 * * *", "--timezone", "Europe/Berlin")
    times = [datetime.fromisoformat(text) for text in read("next", "n", "--count", "400")]
    assert len(times) == 400
    assert times[0] == datetime.fromisoformat(read("show", "n")["next_at"])
    assert {time.utcoffset() for time in times} == {timedelta(0)}
    text = run("next", "n", "--count", "2").splitlines()
    assert len(text) == 2
    assert " 02:30 CE" in text[0]


def test_pause_and_resume_record_the_pause(home: Path, database: Database) -> None:
    run(*ADD)
    assert read("pause", "nightly")[0]["paused"] is True
    assert "paused" in run("list")
    with database.write() as connection:
        # It was paused three nights ago.
        connection.execute(update(Schedule).values(next_at=db_now(-3 * 86_400)))
    with database.write() as connection:
        row = connection.execute(Schedule.__table__.select()).one()
        time = row.next_at.replace(hour=2, minute=0, second=0, microsecond=0)
        connection.execute(update(Schedule).values(next_at=time))
    _round(database)
    assert read("history", "nightly") == []
    (view,) = read("resume", "nightly")
    assert view["paused"] is False
    assert datetime.fromisoformat(view["next_at"]) > datetime.now().astimezone()
    (firing,) = read("history", "nightly")
    assert firing["state"] == "skipped"
    assert firing["reason"].endswith("the schedule was paused")
    assert firing["since"] is not None


def test_run_now_and_history(home: Path, database: Database) -> None:
    run(*ADD)
    first = read("run-now", "nightly")
    assert (first["state"], first["kind"]) == ("submitted", "manual")
    assert "is busy: job" in refused("run-now", "nightly")
    run("edit", "nightly", "--concurrency", "allow")
    second = run("run-now", "nightly").strip()
    history = read("history", "nightly")
    assert [row["job"] for row in history] == [second, first["job"]]
    assert set(history[0]) >= {"scheduled_for", "state", "job", "reason", "firing", "kind"}
    assert history[0]["scheduled_for"].endswith("+00:00")
    assert second in run("history", "nightly")
    assert read("history", "nightly", "--state", "failed") == []
    assert read("history", "nightly", "--limit", "1") == history[:1]


def test_run_now_of_a_bad_input_says_it_and_records_it(home: Path) -> None:
    run(*ADD)
    (home / "in.jsonl").write_text("{}\n")
    assert "1 row is bad" in refused("run-now", "nightly")
    (firing,) = read("history", "nightly")
    assert firing["state"] == "failed"
    assert "1 row is bad" in firing["reason"]
    (home / "in.jsonl").unlink()
    assert "no such file" in refused("run-now", "nightly")


def test_a_killed_run_now_is_taken_over(home: Path, database: Database) -> None:
    run(*ADD)
    with database.write() as connection:
        schedule = connection.execute(Schedule.__table__.select()).one()
        now = connection.execute(db_now().select()).scalar_one()
        firings.claim(connection, schedule.id, now, "gone", kind="manual", lease_seconds=-1)
    _round(database)
    (firing,) = read("history", "nightly")
    assert (firing["state"], firing["kind"], firing["attempts"]) == ("submitted", "manual", 2)


def test_backfill(home: Path, database: Database) -> None:
    run("add", "n", "in.jsonl", "--cron", "0 2 * * *", "--concurrency", "allow")
    with database.write() as connection:
        now = connection.execute(db_now().select()).scalar_one()
        schedule = connection.execute(Schedule.__table__.select()).one()
        days = [
            (now - timedelta(days=ago)).replace(hour=2, minute=0, second=0, microsecond=0)
            for ago in range(8, 1, -1)
        ]
        connection.execute(update(Schedule).values(created_at=days[1] + timedelta(hours=1)))
        # Of seven nights the first two are from before; 3 to 5 were skipped as one.
        firings.skip(connection, schedule.id, days[4], "the beat was away", since=days[2])
        done = firings.claim(connection, schedule.id, days[5], "x", lease_seconds=60)
        connection.execute(
            update(Firing).where(Firing.id == done).values(state="succeeded", claimed_by=None)
        )
    span = ("--from", f"{days[1]:%Y-%m-%d}", "--to", f"{days[6]:%Y-%m-%d}")
    listed = read("backfill", "n", *span, "--dry-run")
    assert [row["done"] for row in listed] == ["would fire"] * 4 + ["left"] * 2
    assert [row["reason"] for row in listed] == [
        "is from before the schedule",
        "was skipped",
        "was skipped",
        "was skipped",
        "is succeeded",
        "has no record: it is still due, or its record was removed",
    ]
    assert len(read("history", "n")) == 2
    lines = run("backfill", "n", *span).splitlines()
    assert sum("fired as job" in line for line in lines) == 4
    history = read("history", "n")
    assert [(row["kind"], row["state"]) for row in history] == [
        ("due", "succeeded"),
        *[("backfill", "submitted")] * 4,
    ]
    assert all(row["since"] is None for row in history)
    again = read("backfill", "n", *span)
    assert {row["done"] for row in again} == {"left"}


def test_backfill_of_a_part_of_a_run_leaves_the_rest_skipped(
    home: Path, database: Database
) -> None:
    run("add", "n", "in.jsonl", "--cron", "0 2 * * *")
    with database.write() as connection:
        now = connection.execute(db_now().select()).scalar_one()
        schedule = connection.execute(Schedule.__table__.select()).one()
        days = [
            (now - timedelta(days=ago)).replace(hour=2, minute=0, second=0, microsecond=0)
            for ago in range(5, 1, -1)
        ]
        firings.skip(connection, schedule.id, days[3], "the beat was away", since=days[0])
        connection.execute(update(Schedule).values(created_at=days[0]))
    last = f"{days[3]:%Y-%m-%d}"
    assert len(read("backfill", "n", "--from", last, "--to", last)) == 1
    history = read("history", "n")
    assert [row["state"] for row in history] == ["submitted", "skipped"]
    assert datetime.fromisoformat(history[1]["scheduled_for"]) == days[2]
    assert datetime.fromisoformat(history[1]["since"]) == days[0]


def test_edit_changes_only_what_is_given(home: Path) -> None:
    before = read(*ADD, "--max-tokens", "20", "--stop", "a", "--deadline", "8h", "-o", "x.jsonl")
    (home / "other.jsonl").write_text('"x"\n')
    after = read("edit", "nightly", "other.jsonl", "--cron", "30 3 * * *", "--temperature", "0")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"cron", "input", "options", "next_at"}
    assert after["options"] == {**before["options"], "temperature": 0.0}
    assert datetime.fromisoformat(after["next_at"]).minute == 30
    after = read("edit", "nightly", "--unset", "deadline", "--unset", "stop", "--unset", "output")
    assert after["options"]["deadline_seconds"] is None
    assert after["options"]["stop"] == []
    assert after["options"]["output"] is None
    assert after["options"]["max_tokens"] == 20
    assert "nothing to change" in refused("edit", "nightly")
    assert "bad hour" in refused("edit", "nightly", "--cron", "0 99 * * *")
    assert "no such option" in refused("edit", "nightly", "--unset", "cron")
    assert read("show", "nightly") == after


def test_remove_leaves_the_jobs(home: Path, database: Database) -> None:
    run(*ADD)
    job = run("run-now", "nightly").strip()
    assert read("remove", "nightly")["open_jobs"] == [job]
    assert read("list") == []
    with database.read() as connection:
        from producer.jobs.status import job_view

        assert job_view(connection, job).state == "queued"
