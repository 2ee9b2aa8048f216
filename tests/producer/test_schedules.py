"""Schedules on a clock that the test sets: each slot once, whatever the clock and the beats do."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select, update
from sqlalchemy.exc import OperationalError

from models.base import db_now
from models.database import Database
from models.job import Chunk, Job, Request, Result
from models.schedule import Firing
from models.store import firings, jobs, submit
from nightherd.settings import Settings
from producer.cron import parse_rule, show_utc
from producer.schedules import firing as firing_module
from producer.schedules import scheduler as scheduler_module
from producer.schedules.lease import LostError
from producer.schedules.scheduler import MAX_ATTEMPTS, Scheduler
from tests.scheduling import (
    Clock,
    all_firings,
    jobs_by_state,
    lapse_claims,
    make_schedule,
    schedule_row,
    scheduler,
    told,
    utc,
    write_input,
)
from tests.seeding import job, job_results, make_worker, try_claim, work_off

MakeSettings = Callable[..., Settings]


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in.jsonl")


@pytest.fixture
def clock() -> Clock:
    return Clock(utc("2026-01-05T01:59"))


@pytest.fixture
def beat(database: Database, settings: Settings, clock: Clock) -> Iterator[Scheduler]:
    with scheduler(database, settings, clock) as made:
        yield made


def test_a_slot_becomes_a_firing_and_a_job(
    database: Database, beat: Scheduler, clock: Clock, path: Path
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
    database: Database, beat: Scheduler, clock: Clock, tmp_path: Path
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
    beats = [Scheduler(database, settings, clock=clock) for _ in range(3)]
    meet = threading.Barrier(4)
    errors: list[BaseException] = []

    def run(beat: Scheduler) -> None:
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
        (schedule, slot)
        for schedule, cron in zip(ids, crons, strict=True)
        for slot in parse_rule(cron, "UTC").between(begin, clock.now)
    )
    assert len(fired) > 90
    assert {row.state for row in all_firings(database)} == {"submitted"}
    assert jobs_by_state(database) == {"queued": len(fired)}


# The beat is away.


def test_down_over_the_slot_gives_one_catch_up_inside_the_deadline(
    database: Database, beat: Scheduler, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, starting_deadline_seconds=6 * 3600.0)
    clock.on(hours=5)  # 06:59
    assert len(beat.round().fired) == 1
    assert told(database) == ["2026-01-05T02:00Z submitted"]


def test_down_over_the_slot_gives_a_recorded_skip_outside(
    database: Database,
    beat: Scheduler,
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
    assert row.reason == "the slot of 2026-01-05T02:00Z was more than 6h late (--starting-deadline)"
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
    beat: Scheduler,
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
    database: Database, beat: Scheduler, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, cron="*/10 * * * *", since=utc("2026-01-05T01:59"))
    for minutes in (1, 10, 10, 10, 10, 10, 10, -60, 10, 10, 10, 10, 10, 10, 10):
        clock.on(minutes=minutes)
        beat.round()
    assert clock.now == utc("2026-01-05T03:10")
    slots = [show_utc(row.scheduled_for_utc)[11:16] for row in all_firings(database)]
    assert slots == ["02:00", "02:10", "02:20", "02:30", "02:40", "02:50", "03:00", "03:10"]
    assert jobs_by_state(database) == {"queued": 8}


def test_a_schedule_that_was_set_back_fires_no_slot_again(
    database: Database, beat: Scheduler, clock: Clock, path: Path
) -> None:
    """The second guard: the row of the slot."""
    schedule = make_schedule(database, path)
    clock.on(minutes=2)
    beat.round()
    with database.write() as connection:
        scheduler_module.schedules.change(
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
    with scheduler(sqlite_database, settings, clock) as beat:
        while clock.on(minutes=15) < end:
            beat.round()
    days = [row.scheduled_for_utc.astimezone(tz).date() for row in all_firings(sqlite_database)]
    assert days == [begin.date() + timedelta(days=day) for day in range(4)]


# Concurrency.


def test_forbid_skips_while_a_job_is_open_and_names_it(
    database: Database, beat: Scheduler, clock: Clock, path: Path
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
    database: Database, beat: Scheduler, clock: Clock, path: Path
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
    database: Database, beat: Scheduler, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, concurrency="allow")
    clock.on(minutes=1)
    beat.round()
    clock.on(days=1)
    beat.round()
    assert jobs_by_state(database) == {"queued": 2}


def test_replace_cancels_what_earlier_firings_have_in_hand(
    database: Database, beat: Scheduler, clock: Clock, path: Path
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
    database: Database, beat: Scheduler, clock: Clock, path: Path
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


# What goes wrong.


def test_a_bad_input_is_a_failed_firing_and_the_next_night_tries_again(
    database: Database, beat: Scheduler, clock: Clock, path: Path
) -> None:
    good = path.read_text()
    make_schedule(database, path)
    path.write_text('{"prompt": "fine"}\n{"promt": "x"}\n{"prompt": 7}\n')
    clock.on(minutes=1)
    (fired,) = beat.round().fired
    assert fired.job is None
    (row,) = all_firings(database)
    assert row.state == "failed"
    assert "2 rows are bad, nothing was stored" in row.reason
    assert "line 2: " in row.reason
    assert "\n" not in row.reason
    assert jobs_by_state(database) == {}
    path.write_text(good)
    clock.on(days=1)
    beat.round()
    assert told(database)[1] == "2026-01-06T02:00Z submitted"


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({}, "not-there.jsonl", "not-there.jsonl: no such file"),
        ({"checkpoint": "/not/there"}, "in.jsonl", "no checkpoint at /not/there"),
        ({"max_tokens": 10**6}, "in.jsonl", "max_tokens"),
    ],
)
def test_each_has_its_reason(
    sqlite_database: Database,
    settings: Settings,
    clock: Clock,
    path: Path,
    options: dict[str, object],
    name: str,
    reason: str,
) -> None:
    make_schedule(sqlite_database, path.parent / name, options=options)
    clock.on(minutes=1)
    with scheduler(sqlite_database, settings, clock) as beat:
        beat.round()
    (row,) = all_firings(sqlite_database)
    assert row.state == "failed"
    assert reason in row.reason


def test_an_unexpected_error_is_a_failed_firing_too(
    database: Database,
    beat: Scheduler,
    clock: Clock,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("one two")

    monkeypatch.setattr("producer.schedules.firing.prepare", broken)
    make_schedule(database, path)
    clock.on(minutes=1)
    beat.round()
    (row,) = all_firings(database)
    assert (row.state, row.reason) == ("failed", "an unexpected ZeroDivisionError: one two")


def _claimed(database: Database, clock: Clock, beat: Scheduler) -> int:
    """A beat dies when it has claimed."""
    clock.on(minutes=1)
    claimed = beat._claim(clock.now, None)
    assert claimed is not None
    assert claimed.firing is not None
    return int(claimed.firing.id)


def test_a_claim_that_lapsed_is_taken_over(
    database: Database, beat: Scheduler, clock: Clock, path: Path, settings: Settings
) -> None:
    make_schedule(database, path)
    firing_id = _claimed(database, clock, beat)
    with scheduler(database, settings, clock) as other:
        assert not other.round().fired
        lapse_claims(database)
        (fired,) = other.round().fired
    assert fired.firing_id == firing_id
    (row,) = all_firings(database)
    assert (row.state, row.attempts) == ("submitted", 2)
    assert jobs_by_state(database) == {"queued": 1}


def test_after_five_beats_a_firing_fails(
    database: Database,
    beat: Scheduler,
    clock: Clock,
    path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = []
    monkeypatch.setattr(
        "models.store.webhooks.firing_failed",
        lambda connection, firing_id, event, url, data: said.append(event),
    )
    make_schedule(database, path)
    _claimed(database, clock, beat)
    for _ in range(MAX_ATTEMPTS - 1):
        lapse_claims(database)
        with database.write() as connection:
            assert beat._take_one_over(connection) is not None
    lapse_claims(database)
    assert not beat.round().fired
    (row,) = all_firings(database)
    assert row.state == "failed"
    assert row.reason == (
        "a beat died, or lost the database, 5 times while it made the job; see the beats' logs"
    )
    assert said == ["firing.failed"]


def test_who_lost_a_firing_discards_its_job(
    database: Database,
    beat: Scheduler,
    clock: Clock,
    path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stood still for longer than its lease, and another beat has fired meanwhile."""
    make_schedule(database, path)
    real = firing_module.submit
    other = Scheduler(database, settings, clock=clock)

    def stand_still(*arguments: Any, **given: Any) -> Any:
        monkeypatch.setattr(firing_module, "submit", real)
        lapse_claims(database)
        assert len(other.round().fired) == 1
        return real(*arguments, **given)

    monkeypatch.setattr(firing_module, "submit", stand_still)
    clock.on(minutes=1)
    (fired,) = beat.round().fired
    other.close()
    assert (fired.lost, fired.job) == (True, None)
    assert [row.state for row in all_firings(database)] == ["submitted"]
    assert jobs_by_state(database) == {"queued": 1}


def test_the_lease_is_renewed_beside_the_work(
    database: Database, beat: Scheduler, clock: Clock, path: Path
) -> None:
    make_schedule(database, path)
    firing_id = _claimed(database, clock, beat)
    lapse_claims(database)
    with beat.holder.hold(firing_id) as hold:
        beat.holder.renew(hold)
        (row,) = all_firings(database)
        with database.read() as connection:
            assert row.lease_until > connection.execute(select(db_now())).scalar_one()
            assert not firings.is_any_lapsed(connection)
        with database.write() as connection:
            connection.execute(update(Firing).values(claimed_by="another"))
        beat.holder.renew(hold)
        with pytest.raises(LostError):
            hold.move()


def test_the_answer_to_a_claim_is_lost(
    database: Database, beat: Scheduler, clock: Clock, path: Path
) -> None:
    """The second try finds what the first one claimed."""
    make_schedule(database, path)
    make_schedule(database, path, name="another")
    clock.on(minutes=1)
    lose = iter([True])

    def lose_answer(connection: object) -> None:
        if next(lose, False):
            driver = connection.connection.driver_connection  # type: ignore[attr-defined]
            driver.commit() if database.dialect == "postgresql" else driver.execute("COMMIT")
            raise OperationalError("COMMIT", None, sqlite3.OperationalError("database is locked"))

    event.listen(database.engine, "commit", lose_answer)
    try:
        claimed = beat._claim(clock.now, None)
    finally:
        event.remove(database.engine, "commit", lose_answer)
    assert claimed is not None
    assert claimed.firing is not None
    assert [row.id for row in all_firings(database)] == [claimed.firing.id]


# The end.


def _ended(database: Database, beat: Scheduler, *, failing: dict[int, str] | None = None) -> None:
    work_off(database, make_worker(database), failing=failing)
    beat._look_for_ends_at = -1e9
    beat.round()


def test_succeeded_and_its_output(
    database: Database, beat: Scheduler, clock: Clock, path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "{{ firing }}.jsonl"
    make_schedule(database, path, options={"output": str(out)})
    clock.on(minutes=1)
    (fired,) = beat.round().fired
    target = tmp_path / "out" / f"{fired.firing_id}.jsonl"
    assert not target.exists()
    _ended(database, beat)
    (row,) = all_firings(database)
    assert (row.state, row.reason, row.output) == ("succeeded", None, str(target))
    assert row.finished_at is not None
    assert [json.loads(line)["text"] for line in target.read_text().splitlines()] == [
        "text 0.0",
        "text 1.0",
    ]
    assert [entry.name for entry in target.parent.iterdir()] == [target.name]


def test_some_rows_failed_all_rows_failed(
    database: Database, beat: Scheduler, clock: Clock, path: Path
) -> None:
    make_schedule(database, path)
    clock.on(minutes=1)
    (first,) = beat.round().fired
    _ended(database, beat, failing={1: "engine_error"})
    clock.on(days=1)
    (second,) = beat.round().fired
    _ended(database, beat, failing={0: "engine_error", 1: "engine_error"})
    assert first.job is not None
    assert second.job is not None
    assert [(row.state, row.reason) for row in all_firings(database)] == [
        ("succeeded", f"1 of 2 samples failed (nightherd errors {first.job.id})"),
        ("failed", f"all 2 samples failed (nightherd errors {second.job.id})"),
    ]


@pytest.mark.parametrize("how", ["cancelled", "expired", "gone"])
def test_a_job_that_did_not_make_it(
    database: Database, beat: Scheduler, clock: Clock, path: Path, tmp_path: Path, how: str
) -> None:
    out = tmp_path / "out.jsonl"
    make_schedule(database, path, options={"output": str(out)})
    clock.on(minutes=1)
    (fired,) = beat.round().fired
    assert fired.job is not None
    with database.write() as connection:
        if how == "cancelled":
            jobs.cancel(connection, fired.job.id)
        elif how == "expired":
            connection.execute(update(Job).values(deadline=db_now(-1)))
            jobs.expire_overdue(connection)
        else:
            connection.execute(Job.__table__.delete())  # type: ignore[attr-defined]
    _ended(database, beat)
    (row,) = all_firings(database)
    assert row.state == "failed"
    assert {"cancelled": "was cancelled", "expired": "has expired", "gone": "is gone"}[
        how
    ] in row.reason
    assert not out.exists()


def test_an_output_that_cannot_be_written(
    database: Database, beat: Scheduler, clock: Clock, path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "folder"
    out.mkdir()
    make_schedule(database, path, options={"output": str(out)})
    clock.on(minutes=1)
    (fired,) = beat.round().fired
    assert fired.job is not None
    _ended(database, beat)
    (row,) = all_firings(database)
    assert row.state == "failed"
    assert row.reason == (
        f"cannot write {out}: it is a folder; the results are kept in the database: "
        f"nightherd results {fired.job.id} -o FILE writes them"
    )


def test_one_beat_writes_an_output(
    database: Database,
    beat: Scheduler,
    clock: Clock,
    path: Path,
    tmp_path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from producer.schedules import ending

    make_schedule(database, path, options={"output": str(tmp_path / "out.jsonl")})
    clock.on(minutes=1)
    beat.round()
    work_off(database, make_worker(database))
    written = []
    real = ending._write_output

    with scheduler(database, settings, clock) as other:

        def write(*arguments: object) -> None:
            written.append(1)
            # Another looks while this one writes.
            other._look_for_ends_at = -1e9
            assert not other.round().ended
            real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(ending, "_write_output", write)
        beat._look_for_ends_at = -1e9
        assert len(beat.round().ended) == 1
    assert written == [1]
    assert told(database) == ["2026-01-05T02:00Z succeeded"]


def test_history_limits_remove_firings_with_their_jobs(
    database: Database, beat: Scheduler, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, keep_succeeded=2, keep_failed=0)
    made = []
    for _ in range(4):
        clock.now = (schedule_row(database)).next_at
        (fired,) = beat.round().fired
        assert fired.job is not None
        made.append(fired.job.id)
        _ended(database, beat)
    assert told(database) == ["2026-01-07T02:00Z succeeded", "2026-01-08T02:00Z succeeded"]
    assert jobs_by_state(database) == {"storing": 2, "completed": 2}
    assert job(database, made[0]).firing_id is None
    gone = 0
    with database.write() as connection:
        while count := submit.remove_orphans(connection, idle_seconds=600, limit=1):
            gone += count
            assert count <= 2, "in pages"
    assert gone == 2 * (2 + 2 + 1)
    with database.read() as connection:
        left = {
            table: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in (Job, Request, Result, Chunk)
        }
    assert list(left.values()) == [2, 4, 4, 2]
    assert set(job_results(database, made[3]).values()) == {"ok"}


def test_a_job_that_is_retried_or_held_is_not_removed(
    database: Database, beat: Scheduler, clock: Clock, path: Path
) -> None:
    make_schedule(database, path, keep_succeeded=0, keep_failed=0)
    clock.on(minutes=1)
    (fired,) = beat.round().fired
    assert fired.job is not None
    job_id = fired.job.id
    worker = make_worker(database)
    held = try_claim(database, worker)
    with database.write() as connection:
        jobs.cancel(connection, job_id)
    beat._look_for_ends_at = -1e9
    beat.round()
    assert told(database) == ["2026-01-05T02:00Z failed"]
    assert job(database, job_id).state == "cancelled"
    assert not isinstance(held, str)


def test_skipped_rows_do_not_grow_without_end(
    database: Database,
    beat: Scheduler,
    clock: Clock,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("producer.schedules.ending.KEEP_SKIPPED", 3)
    make_schedule(
        database, path, cron="0 * * * *", concurrency="forbid", since=utc("2026-01-05T01:00")
    )
    for _ in range(8):
        clock.on(hours=1)
        beat.round()
    assert Counter(line.split()[1] for line in told(database)) == {"submitted": 1, "skipped": 7}
    _ended(database, beat)
    assert Counter(line.split()[1] for line in told(database)) == {"succeeded": 1, "skipped": 3}
