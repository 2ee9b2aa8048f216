"""Schedules on a clock that the test sets: each scheduled time fires once, whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from models.database import Database
from nightherd.settings import Settings
from producer.schedules import firing_loop as firing_loop_module
from producer.schedules.cron import parse_rule, show_utc
from producer.schedules.firing_loop import FiringLoop
from tests.scheduling import (
    Clock,
    all_firings,
    firing_loop,
    jobs_by_state,
    make_schedule,
    schedule_row,
    told,
    utc,
    write_input,
)
from tests.seeding import job, make_worker, work_off

MakeSettings = Callable[..., Settings]


def test_a_scheduled_time_becomes_a_firing_and_a_job(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, options={"priority": 3, "seed": 5, "deadline_seconds": 3600.0})
    assert beat.round().looked_at == 0
    clock.on(minutes=1)
    (fired,) = beat.round().fired
    assert fired.job is not None
    assert told(database) == ["2026-01-05T02:00Z submitted"]
    (row,) = all_firings(database)
    assert (row.kind, row.attempts, row.claimed_by, row.lease_until) == ("due", 1, None, None)
    stored = job(database, fired.job.id)
    assert (stored.state, stored.name, stored.priority, stored.seed) == ("queued", "nightly", 3, 5)
    assert stored.firing_id == row.id
    assert stored.total_requests == 2
    assert 3590 < (stored.deadline - stored.created_at).total_seconds() < 3610
    assert schedule_row(database).next_at == utc("2026-01-06T02:00")
    assert beat.round().looked_at == 0


def test_the_input_is_read_afresh_at_each_firing(
    database: Database, beat: FiringLoop, clock: Clock, tmp_path: Path
) -> None:
    make_schedule(database, tmp_path / "{{ scheduled_for | date }}.jsonl")
    clock.on(minutes=1)
    for day, rows in (("05", 3), ("06", 5)):
        write_input(tmp_path / f"2026-01-{day}.jsonl", rows)
        (fired,) = beat.round().fired
        assert fired.job is not None
        assert fired.job.requests == rows
        clock.on(days=1)


def test_three_beats_and_a_thousand_ticks_give_one_firing_each(
    database: Database, settings: Settings, path: Path
) -> None:
    begin = utc("2026-01-05T00:00")
    clock = Clock(begin)
    crons = ("0 * * * *", "*/45 * * * *", "30 2 * * *")
    ids = [make_schedule(database, path, name=cron, cron=cron, since=begin) for cron in crons]
    beats = [FiringLoop(database, settings, clock=clock) for _ in range(3)]
    meet = threading.Barrier(4)
    errors: list[BaseException] = []

    def run(beat: FiringLoop) -> None:
        try:
            for _ in range(1_000):
                meet.wait(60)
                beat.round()
                meet.wait(60)
        except BaseException as error:
            errors.append(error)
            meet.abort()

    threads = [threading.Thread(target=run, args=(beat,)) for beat in beats]
    for thread in threads:
        thread.start()
    try:
        for _ in range(1_000):
            clock.on(minutes=2)
            meet.wait(60)
            meet.wait(60)
    except threading.BrokenBarrierError:
        pass
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    for beat in beats:
        beat.close()
    fired = sorted((row.schedule_id, row.scheduled_for_utc) for row in all_firings(database))
    assert fired == sorted(
        (schedule, time)
        for schedule, cron in zip(ids, crons, strict=True)
        for time in parse_rule(cron, "UTC").between(begin, clock.now)
    )
    assert len(fired) > 90
    assert {row.state for row in all_firings(database)} == {"submitted"}
    assert jobs_by_state(database) == {"queued": len(fired)}


# The beat is away.


def test_down_over_the_time_gives_one_catch_up_inside_the_deadline(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, starting_deadline_seconds=6 * 3600.0)
    clock.on(hours=5)  # 06:59
    assert len(beat.round().fired) == 1
    assert told(database) == ["2026-01-05T02:00Z submitted"]


def test_down_over_the_time_gives_a_recorded_skip_outside(
    database: Database,
    beat: FiringLoop,
    clock: Clock,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = []
    monkeypatch.setattr(
        "models.store.webhooks.firing_failed",
        lambda connection, firing_id, event, url, data: said.append((event, url, data["schedule"])),
    )
    make_schedule(
        database,
        path,
        starting_deadline_seconds=6 * 3600.0,
        options={"on_failure": "https://example.org/x"},
    )
    clock.on(hours=7)
    assert not beat.round().fired
    (row,) = all_firings(database)
    assert row.state == "skipped"
    assert (
        row.reason
        == "the scheduled time 2026-01-05T02:00Z was more than 6h late (--starting-deadline)"
    )
    assert row.finished_at is not None
    assert said == [("firing.missed", "https://example.org/x", "nightly")]
    assert jobs_by_state(database) == {}


@pytest.mark.parametrize(
    ("misfire", "expected"),
    [
        ("coalesce", ["2026-01-07T02:00Z skipped", "2026-01-08T02:00Z submitted"]),
        ("skip", ["2026-01-08T02:00Z skipped"]),
        ("all", [f"2026-01-0{day}T02:00Z submitted" for day in (5, 6, 7, 8)]),
    ],
)
def test_down_for_four_nights(
    database: Database,
    beat: FiringLoop,
    clock: Clock,
    path: Path,
    misfire: str,
    expected: list[str],
) -> None:
    make_schedule(database, path, misfire=misfire)
    clock.now = utc("2026-01-08T09:00")
    beat.round()
    assert told(database) == expected
    since = {row.since_utc for row in all_firings(database)} - {None}
    assert since == (set() if misfire == "all" else {utc("2026-01-05T02:00")})
    assert schedule_row(database).next_at == utc("2026-01-09T02:00")


# The clock.


def test_the_clock_goes_back_an_hour(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, cron="*/10 * * * *", since=utc("2026-01-05T01:59"))
    for minutes in (1, 10, 10, 10, 10, 10, 10, -60, 10, 10, 10, 10, 10, 10, 10):
        clock.on(minutes=minutes)
        beat.round()
    assert clock.now == utc("2026-01-05T03:10")
    times = [show_utc(row.scheduled_for_utc)[11:16] for row in all_firings(database)]
    assert times == ["02:00", "02:10", "02:20", "02:30", "02:40", "02:50", "03:00", "03:10"]
    assert jobs_by_state(database) == {"queued": 8}


def test_a_schedule_that_was_set_back_fires_no_time_again(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
) -> None:
    """The second guard: one row for each scheduled time."""
    schedule = make_schedule(database, path)
    clock.on(minutes=2)
    beat.round()
    with database.write() as connection:
        firing_loop_module.schedules.change(
            connection, schedule, {"next_at": utc("2026-01-05T02:00")}
        )
    assert not beat.round().fired
    assert told(database) == ["2026-01-05T02:00Z submitted"]
    assert schedule_row(database).next_at == utc("2026-01-06T02:00")


CHANGES = [
    ("Europe/Berlin", "30 2 * * *", "2026-03-27", "2026-03-31"),
    ("Europe/Berlin", "30 2 * * *", "2026-10-23", "2026-10-27"),
    ("America/New_York", "30 2 * * *", "2026-03-06", "2026-03-10"),
    ("America/New_York", "30 1 * * *", "2026-10-30", "2026-11-03"),
    ("Australia/Lord_Howe", "15 2 * * *", "2026-10-02", "2026-10-06"),
    ("Australia/Lord_Howe", "45 1 * * *", "2026-04-03", "2026-04-07"),
]


@pytest.mark.parametrize(("zone", "cron", "first", "last"), CHANGES)
def test_one_firing_a_day_when_the_clock_changes(
    sqlite_database: Database,
    settings: Settings,
    path: Path,
    zone: str,
    cron: str,
    first: str,
    last: str,
) -> None:
    from zoneinfo import ZoneInfo

    tz = ZoneInfo(zone)
    begin = datetime.fromisoformat(first).replace(tzinfo=tz)
    end = datetime.fromisoformat(last).replace(tzinfo=tz)
    clock = Clock(begin.astimezone(utc(first).tzinfo))
    make_schedule(sqlite_database, path, cron=cron, timezone=zone, since=clock.now)
    with firing_loop(sqlite_database, settings, clock) as beat:
        while clock.on(minutes=15) < end:
            beat.round()
    days = [row.scheduled_for_utc.astimezone(tz).date() for row in all_firings(sqlite_database)]
    assert days == [begin.date() + timedelta(days=day) for day in range(4)]


# Concurrency.


def test_forbid_skips_while_a_job_is_open_and_names_it(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, concurrency="forbid")
    clock.on(minutes=1)
    (first,) = beat.round().fired
    assert first.job is not None
    clock.on(days=1)
    assert not beat.round().fired
    assert told(database) == ["2026-01-05T02:00Z submitted", "2026-01-06T02:00Z skipped"]
    assert all_firings(database)[1].reason == (
        f"job {first.job.id} of 2026-01-05T02:00Z has not ended (--concurrency forbid)"
    )
    work_off(database, make_worker(database))
    clock.on(days=1)
    beat.round()
    assert told(database)[2] == "2026-01-07T02:00Z submitted"


def test_forbid_waits_with_misfire_all(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, concurrency="forbid", misfire="all")
    make_schedule(database, path, name="other", cron="5 2 * * *")
    clock.now = utc("2026-01-07T09:00")
    worker = make_worker(database)
    waiting = []
    for _ in range(4):
        waiting.append(len([line for line in told(database) if line.endswith("submitted")]))
        beat.round()
        beat.round()  # nothing happens twice, and the other schedule is not held up
        work_off(database, worker)
        beat._look_for_ends_at = -1e9
        beat.round()
    nightly = [line for line in told(database) if "02:00Z" in line]
    assert nightly == [f"2026-01-0{day}T02:00Z succeeded" for day in (5, 6, 7)]
    assert [line for line in told(database) if "02:05Z" in line][-1].endswith("succeeded")


def test_allow_lets_them_overlap(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, concurrency="allow")
    clock.on(minutes=1)
    beat.round()
    clock.on(days=1)
    beat.round()
    assert jobs_by_state(database) == {"queued": 2}


def test_replace_cancels_what_earlier_firings_have_in_hand(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, concurrency="replace")
    clock.on(minutes=1)
    (first,) = beat.round().fired
    clock.on(days=1)
    (second,) = beat.round().fired
    assert first.job is not None
    assert second.job is not None
    assert job(database, first.job.id).state == "cancelled"
    assert job(database, second.job.id).state == "queued"
    old, new = all_firings(database)
    assert (old.state, new.state) == ("failed", "submitted")
    assert old.reason == f"replaced by firing {second.firing_id} (--concurrency replace)"


def test_replace_leaves_what_has_ended_and_a_bad_input_replaces_nothing(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, concurrency="replace")
    clock.on(minutes=1)
    beat.round()
    text = path.read_text()
    path.write_text("{}\n")
    clock.on(days=1)
    beat.round()
    assert [line.split()[1] for line in told(database)] == ["submitted", "failed"]
    assert jobs_by_state(database) == {"queued": 1}
    path.write_text(text)
    work_off(database, make_worker(database))
    clock.on(days=1)
    beat._look_for_ends_at = 1e9
    beat.round()
    assert jobs_by_state(database) == {"completed": 1, "queued": 1}
    beat._look_for_ends_at = -1e9
    beat.round()
    assert [line.split()[1] for line in told(database)] == ["succeeded", "failed", "submitted"]
