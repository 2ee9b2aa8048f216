"""The end of a firing: its state, its output, the history's limits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from models.base import db_now
from models.database import Database
from models.job import Chunk, Job, Request, Result
from models.store import jobs, storing
from nightherd.settings import Settings
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
)
from tests.seeding import job, job_results, make_worker, try_claim, work_off

MakeSettings = Callable[..., Settings]


def _ended(database: Database, beat: FiringLoop, *, failing: dict[int, str] | None = None) -> None:
    work_off(database, make_worker(database), failing=failing)
    beat._look_for_ends_at = -1e9
    beat.round()


def test_succeeded_and_its_output(
    database: Database, beat: FiringLoop, clock: Clock, path: Path, tmp_path: Path
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
    database: Database, beat: FiringLoop, clock: Clock, path: Path
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
    database: Database, beat: FiringLoop, clock: Clock, path: Path, tmp_path: Path, how: str
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
    database: Database, beat: FiringLoop, clock: Clock, path: Path, tmp_path: Path
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
    beat: FiringLoop,
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

    with firing_loop(database, settings, clock) as other:

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
    database: Database, beat: FiringLoop, clock: Clock, path: Path
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
        while count := storing.remove_orphans(connection, idle_seconds=600, limit=1):
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
    database: Database, beat: FiringLoop, clock: Clock, path: Path
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
    beat: FiringLoop,
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
