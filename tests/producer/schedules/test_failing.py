"""Firings that go wrong: bad inputs, beats that die or lose their claim, lost answers."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select, update
from sqlalchemy.exc import OperationalError

from models.base import db_now
from models.database import Database
from models.schedule import Firing
from models.store import firings
from nightherd.settings import Settings
from producer.schedules import firing as firing_module
from producer.schedules.firing_loop import MAX_ATTEMPTS, FiringLoop
from producer.schedules.hold import LeaseLostError
from tests.scheduling import (
    Clock,
    all_firings,
    firing_loop,
    jobs_by_state,
    lapse_claims,
    make_schedule,
    told,
)

MakeSettings = Callable[..., Settings]


def test_a_bad_input_is_a_failed_firing_and_the_next_night_tries_again(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
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
    with firing_loop(sqlite_database, settings, clock) as beat:
        beat.round()
    (row,) = all_firings(sqlite_database)
    assert row.state == "failed"
    assert reason in row.reason


def test_an_unexpected_error_is_a_failed_firing_too(
    database: Database,
    beat: FiringLoop,
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


def _claimed(database: Database, clock: Clock, beat: FiringLoop) -> int:
    """A beat dies when it has claimed."""
    clock.on(minutes=1)
    claimed = beat._claim(clock.now, None)
    assert claimed is not None
    assert claimed.firing is not None
    return int(claimed.firing.id)


def test_a_claim_that_lapsed_is_taken_over(
    database: Database, beat: FiringLoop, clock: Clock, path: Path, settings: Settings
) -> None:
    make_schedule(database, path)
    firing_id = _claimed(database, clock, beat)
    with firing_loop(database, settings, clock) as other:
        assert not other.round().fired
        lapse_claims(database)
        (fired,) = other.round().fired
    assert fired.firing_id == firing_id
    (row,) = all_firings(database)
    assert (row.state, row.attempts) == ("submitted", 2)
    assert jobs_by_state(database) == {"queued": 1}


def test_after_five_beats_a_firing_fails(
    database: Database,
    beat: FiringLoop,
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
            assert beat._claim_lapsed(connection) is not None
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
    beat: FiringLoop,
    clock: Clock,
    path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stood still for longer than its lease, and another beat has fired meanwhile."""
    make_schedule(database, path)
    real = firing_module.submit
    other = FiringLoop(database, settings, clock=clock)

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
    database: Database, beat: FiringLoop, clock: Clock, path: Path
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
        with pytest.raises(LeaseLostError):
            hold.heartbeat()


def test_the_answer_to_a_claim_is_lost(
    database: Database, beat: FiringLoop, clock: Clock, path: Path
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
