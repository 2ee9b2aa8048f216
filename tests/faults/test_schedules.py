"""A beat is killed with -9 at each statement of a firing, and of its end: one firing, one job."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update

from models.base import db_now
from models.database import Database
from models.job import Chunk, Job, Request
from models.schedule import Firing, Schedule
from nightherd.settings import Settings
from producer.schedules.manual import run_now
from tests.acceptance.conftest import Fleet as Processes
from tests.commands.invoking import CommandLine, environment
from tests.conftest import wait_until
from tests.faults.killing import at_once, kills, url_of, wait_for_rollback
from tests.faults.test_submit import COPIED
from tests.receiver import SECRET, Receiver, receiver
from tests.scheduling import (
    Clock,
    all_firings,
    firing_loop,
    jobs_by_state,
    lapse_claims,
    make_schedule,
    told,
    utc,
    write_input,
)
from tests.seeding import make_worker, work_off

MakeSettings = Callable[..., Settings]
DUE = utc("2026-01-05T02:00:30")
ROWS = 5


def _settings(home: str) -> Settings:
    return Settings.model_validate({"home": home, "store_batch": 3, "chunk_size": 2})


def round_in_child(url: str, home: str) -> None:
    """One round of a beat at the scheduled time."""
    with firing_loop(Database(url), _settings(home), Clock(DUE)) as beat:
        beat.round()


def run_now_in_child(url: str, home: str) -> None:
    run_now(Database(url), _settings(home), "nightly")


def _count(database: Database) -> tuple[int, int]:
    with database.read() as connection:
        return tuple(
            connection.execute(
                select(func.count())
                .select_from(table)
                .join(Job, Job.id == table.job_id)
                .where(Job.state != "storing")
            ).scalar_one()
            for table in (Request, Chunk)
        )  # type: ignore[return-value]


def _check_whole(database: Database, point: str) -> None:
    """One firing, which is live, with one whole job."""
    (row,) = all_firings(database)
    assert row.state == "submitted", point
    live = {state: n for state, n in jobs_by_state(database).items() if state != "storing"}
    assert live == {"queued": 1}, point
    assert row.job is not None, point
    assert _count(database) == (ROWS, 3), point


def _start_again(database: Database) -> None:
    with database.write() as connection:
        connection.execute(delete(Job))
        connection.execute(delete(Firing))
        connection.execute(update(Schedule).values(next_at=utc("2026-01-05T02:00")))


def test_beat_kill9_at_every_statement_of_a_firing(database: Database, tmp_path: Path) -> None:
    """With `replace`, whose last transaction has the most statements."""
    make_schedule(database, write_input(tmp_path / "in.jsonl", ROWS), concurrency="replace")
    home = str(tmp_path / "home")
    taken_over = points = 0
    for point in kills(round_in_child, url_of(database), home, also=[COPIED]):
        points += 1
        wait_for_rollback(database)
        states = {row.state for row in all_firings(database)}
        assert states <= {"claimed", "submitted"}, point
        lapse_claims(database)
        with firing_loop(database, _settings(home), Clock(DUE)) as other:
            fired = other.round().fired
        if states == {"claimed"}:
            taken_over += 1
            assert all_firings(database)[0].attempts == 2, point
        assert len(fired) == (states != {"submitted"}), point
        _check_whole(database, point)
        _start_again(database)
    wait_for_rollback(database)
    _check_whole(database, "survived")
    assert points > 25
    assert taken_over > 15


def test_run_now_kill9_at_every_statement(sqlite_database: Database, tmp_path: Path) -> None:
    database = sqlite_database
    make_schedule(database, write_input(tmp_path / "in.jsonl", ROWS), since=DUE)
    home = str(tmp_path / "home")
    ends = set()
    for point in kills(run_now_in_child, url_of(database), home):
        lapse_claims(database)
        with firing_loop(database, _settings(home), Clock(DUE)) as beat:
            beat.round()
        found = all_firings(database)
        ends.add(len(found))
        if found:
            _check_whole(database, point)
        else:
            assert set(jobs_by_state(database)) <= {"storing"}, point
        _start_again(database)
        with database.write() as connection:
            connection.execute(update(Schedule).values(next_at=DUE + timedelta(days=1)))
    assert ends == {0, 1}


def test_beat_kill9_at_every_statement_of_the_end(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """The output is whole or not there, and the firing succeeds once."""
    database = sqlite_database
    out = tmp_path / "out"
    out.mkdir()
    make_schedule(
        database,
        write_input(tmp_path / "in.jsonl", ROWS),
        options={"output": str(out / "rows.jsonl")},
        keep_succeeded=0,
    )
    home = str(tmp_path / "home")
    with firing_loop(database, _settings(home), Clock(DUE)) as beat:
        beat._look_for_ends_at = 1e12
        beat.round()
    work_off(database, make_worker(database))
    assert database.url.database is not None
    before = Path(f"{tmp_path}/before.db")
    with database.engine.connect() as connection:
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql(f"VACUUM INTO '{before}'")
    seen = set()
    copy = tmp_path / "copy.db"
    shutil.copy(before, copy)
    for point in kills(round_in_child, f"sqlite:///{copy}", home, also=["os:replace", "os:fsync"]):
        seen.add((out / "rows.jsonl").exists())
        opened = Database(f"sqlite:///{copy}")
        lapse_claims(opened)
        with firing_loop(opened, _settings(home), Clock(DUE)) as other:
            other.round()
        lines = (out / "rows.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines] == list(range(ROWS)), point
        # It succeeded, and went with its job, as nothing is to be kept; or goes with the next one.
        left = told(opened)
        assert left in ([], ["2026-01-05T02:00Z succeeded"]), point
        assert jobs_by_state(opened) == {"completed" if left else "storing": 1}, point
        opened.close()
        (out / "rows.jsonl").unlink()
        shutil.copy(before, copy)
        for suffix in ("-wal", "-shm"):
            Path(f"{copy}{suffix}").unlink(missing_ok=True)
    assert seen == {False, True}


def beat_at_once(go: Callable[[], None], url: str, home: str) -> list[int]:
    database = Database(url)
    with firing_loop(database, _settings(home), Clock(DUE)) as beat:
        go()
        return [fired.firing_id for fired in beat.round().fired]


def test_many_beats_at_one_instant(database: Database, tmp_path: Path) -> None:
    path = write_input(tmp_path / "in.jsonl", ROWS)
    for number in range(12):
        make_schedule(database, path, name=f"s{number}")
    arguments = (url_of(database), str(tmp_path / "home"))
    fired = at_once([(beat_at_once, arguments)] * 4)
    assert sorted(firing for one in fired for firing in one) == sorted(
        row.id for row in all_firings(database)
    )
    assert told(database) == ["2026-01-05T02:00Z submitted"] * 12
    assert jobs_by_state(database) == {"queued": 12}


def test_the_database_is_away_for_a_while(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim stays and lapses: no failed firing, and the same beat takes it over."""
    from nightherd.errors import DatabaseError
    from producer.schedules import firing as module

    real = module.submit

    def away(*_: object, **__: object) -> None:
        raise DatabaseError("the database refuses: it is away")

    make_schedule(sqlite_database, write_input(tmp_path / "in.jsonl", ROWS))
    monkeypatch.setattr(module, "submit", away)
    with firing_loop(sqlite_database, _settings(str(tmp_path)), Clock(DUE)) as beat:
        with pytest.raises(DatabaseError):
            beat.round()
        monkeypatch.setattr(module, "submit", real)
        assert not beat.round().fired
        lapse_claims(sqlite_database)
        assert len(beat.round().fired) == 1
    _check_whole(sqlite_database, "after")


# Real processes.


def _beats(processes: Processes, count: int) -> None:
    """Starts them, and waits until they can be told to stop in order."""
    there = processes.logs().count("beat started")
    for _ in range(count):
        processes.start("beat")
    wait_until(
        lambda: processes.logs().count("beat started") == there + count,
        seconds=40,
        what="the beats' start",
    )


def test_two_beats_fire_and_end_a_schedule(tmp_path: Path) -> None:
    """The command line, two beats, no broker: each time fires once; the output of what ended."""
    variables = environment(
        tmp_path,
        broker_url=f"redis+socket://{tmp_path}/none.sock",
        schedule_seconds=0.2,
        broker_timeout=0.2,
    )
    processes = Processes(CommandLine(variables, tmp_path), tmp_path)
    try:
        write_input(tmp_path / "in.jsonl", ROWS)
        line = ("add", "nightly", "in.jsonl", "--cron", "0 2 * * *", "-o", "out.jsonl")
        assert processes.nightherd("schedule", *line, "--concurrency", "allow").code == 0
        database = processes.database
        with database.write() as connection:
            connection.execute(update(Schedule).values(next_at=db_now(-5)))
        _beats(processes, 2)
        wait_until(
            lambda: [line.split()[1] for line in told(database)] == ["submitted"],
            seconds=20,
            what="a live firing",
        )
        work_off(database, make_worker(database))
        wait_until(
            lambda: told(database)[0].endswith("succeeded"), seconds=20, what="the firing's end"
        )
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == ROWS
        assert jobs_by_state(database) == {"completed": 1}
    finally:
        processes.stop()
    assert all(process.returncode == 0 for process in processes.processes), processes.logs()


MINUTES = 5


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_schedule_each_minute_for_five_minutes(tmp_path: Path, redis_socket: Path) -> None:
    """The real clock: two beats, one of which is killed, a broker, a worker, a webhook receiver."""
    with receiver() as told_of:
        found = _each_minute(tmp_path, redis_socket, told_of)
    times = [row.scheduled_for_utc for row in found]
    assert len(times) >= MINUTES
    assert {later - earlier for earlier, later in pairwise(times)} == {timedelta(minutes=1)}
    late = [(row.created_at - row.scheduled_for_utc).total_seconds() for row in found]
    print(f"{len(times)} firings, claimed {min(late):.2f} to {max(late):.2f} s after their times")
    assert max(late) < 10
    jobs = [row.job for row in found]
    assert len(set(jobs)) == len(found)
    for row in found:
        assert len(Path(row.output).read_text().splitlines()) == 3
    assert all(received.is_signed() for received in told_of.received)
    once = {received.id: received.body["data"]["job"] for received in told_of.received}
    assert sorted(once.values()) == sorted(jobs)


def _each_minute(tmp_path: Path, redis_socket: Path, told_of: Receiver) -> Sequence[Any]:
    broker = f"redis+socket://{redis_socket}?virtual_host=0"
    variables = environment(
        tmp_path,
        broker_url=broker,
        webhook_secret=SECRET,
        webhook_allow_private="true",
        webhook_poll_seconds=0.5,
    )
    processes = Processes(CommandLine(variables, tmp_path), tmp_path)
    try:
        write_input(tmp_path / "in.jsonl", 3)
        line = ("add", "minutely", "in.jsonl", "--cron", "* * * * *", "--max-tokens", "8")
        more = ("-o", "out-{{ firing }}.jsonl", "--on-complete", told_of.url)
        assert processes.nightherd("schedule", *line, *more).code == 0
        processes.start_workers(1)
        _beats(processes, 2)
        database = processes.database
        until = time.monotonic() + MINUTES * 60 + 5
        killed = False
        while time.monotonic() < until:
            time.sleep(1)
            if not killed and len(told(database)) >= 2:
                processes.processes[-1].kill()
                killed = True
                _beats(processes, 1)
        wait_until(
            lambda: all(line.endswith("succeeded") for line in told(database)),
            seconds=30,
            what="the end of all firings",
        )
        found = all_firings(database)
        wait_until(
            lambda: len({received.id for received in told_of.received}) >= len(found),
            seconds=30,
            what="the last webhook",
        )
        return found
    finally:
        processes.stop()
