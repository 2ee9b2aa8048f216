"""Statements of schedules and firings: each change is guarded, and bears being done twice."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from models.database import Database
from models.store import firings, jobs, schedules
from nightherd.errors import ConflictError
from tests.models.store.test_plans import plans
from tests.scheduling import BEGIN, all_firings, make_schedule, schedule_row, utc
from tests.seeding import job, make_job

DUE = utc("2026-01-05T02:00")


def do(database: Database, work: Callable[[Connection], Any]) -> Any:
    with database.write() as connection:
        return work(connection)


@pytest.fixture
def schedule(database: Database) -> int:
    return make_schedule(database, "/in.jsonl")


def claim(database: Database, schedule: int, holder: str = "me", days: float = 0) -> Any:
    due = DUE + timedelta(days=days)
    return do(database, lambda c: firings.claim(c, schedule, due, holder, lease_seconds=60))


def state(database: Database, firing: int) -> str:
    return str(next(row.state for row in all_firings(database) if row.id == firing))


def live(database: Database, firing: int, holder: str = "me", *, replace: bool = False) -> str:
    """A job of a claimed firing."""
    made = make_job(database, 2, firing_id=firing)
    assert do(
        database,
        lambda c: firings.submit(c, firing, holder, made, output=None, replace=replace),
    )
    return made


def test_a_scheduled_time_has_one_firing(database: Database, schedule: int) -> None:
    firing = claim(database, schedule)
    assert claim(database, schedule, "another") is None
    assert claim(database, schedule) == firing, "the answer was lost"
    assert do(database, lambda c: firings.skip(c, schedule, DUE, "late")) is None
    assert len(all_firings(database)) == 1


def test_only_the_holder_makes_it_live_or_fails_it(database: Database, schedule: int) -> None:
    firing = claim(database, schedule)
    made = make_job(database, 2, firing_id=firing)
    for holder in ("another", "me"):
        done = do(
            database,
            lambda c, holder=holder: firings.submit(
                c, firing, holder, made, output="/out", replace=False
            ),
        )
        assert done == (holder == "me")
    assert not do(database, lambda c: firings.fail_claimed(c, firing, "me", "too late"))
    assert not do(database, lambda c: firings.renew(c, firing, "me", lease_seconds=9))
    assert state(database, firing) == "submitted"


def test_one_writes_the_output(database: Database, schedule: int) -> None:
    firing = claim(database, schedule)
    live(database, firing)

    def claim_end(holder: str) -> Any:
        return do(database, lambda c: firings.claim_end(c, firing, holder, lease_seconds=60))

    assert claim_end("me")
    assert claim_end("me"), "the answer was lost"
    assert not claim_end("another")
    assert not do(database, lambda c: firings.end(c, firing, "failed", None, holder=None))
    assert not do(database, lambda c: firings.end(c, firing, "failed", None, holder="another"))
    assert do(database, lambda c: firings.end(c, firing, "succeeded", None, holder="me"))
    assert not do(database, lambda c: firings.end(c, firing, "failed", None, holder="me"))


def test_replace_ends_only_earlier_firings(database: Database, schedule: int) -> None:
    early, late = claim(database, schedule, "a"), claim(database, schedule, "c", days=2)
    early_job, late_job = live(database, early, "a"), live(database, late, "c")
    stored = claim(database, schedule, "b", days=0.5)
    middle = claim(database, schedule, "m", days=1)
    mine = live(database, middle, "m", replace=True)
    states = {firing: state(database, firing) for firing in (early, stored, middle, late)}
    assert list(states.values()) == ["failed", "failed", "submitted", "submitted"]
    assert [job(database, one).state for one in (early_job, mine, late_job)] == [
        "cancelled",
        "queued",
        "queued",
    ]


def test_a_backfill_takes_only_what_was_skipped_or_has_failed(
    database: Database, schedule: int
) -> None:
    firing = claim(database, schedule)

    def again() -> Any:
        return do(database, lambda c: firings.claim_again(c, firing, "b", lease_seconds=9))

    assert not again()
    do(database, lambda c: firings.fail_claimed(c, firing, "me", "bad input"))
    assert again()
    assert again(), "the answer was lost"
    (row,) = all_firings(database)
    assert (row.kind, row.state, row.reason, row.attempts) == ("backfill", "claimed", None, 1)
    assert do(database, lambda c: firings.open_firing(c, schedule)) is None, "in nobody's way"


def test_a_job_that_has_ended_is_in_nobodys_way(database: Database, schedule: int) -> None:
    firing = claim(database, schedule)
    row = do(database, lambda c: firings.open_firing(c, schedule))
    assert (row.id, row.job) == (firing, None)
    made = live(database, firing)
    assert do(database, lambda c: firings.open_firing(c, schedule)).job == made
    do(database, lambda c: jobs.cancel(c, made))
    assert do(database, lambda c: firings.open_firing(c, schedule)) is None
    (ended,) = do(database, lambda c: firings.ended(c, limit=9))
    assert (ended.id, ended.job, ended.job_state) == (firing, made, "cancelled")


def test_next_at_only_moves_from_what_was_seen(database: Database, schedule: int) -> None:
    seen = schedule_row(database).next_at

    def advance(**changes: Any) -> Any:
        given = {"seen": seen, "to": seen + timedelta(days=1), **changes}
        return do(database, lambda c: schedules.advance(c, schedule, **given))

    assert not advance(seen=BEGIN)
    assert advance()
    assert not advance()


def test_due_schedules_come_in_order_each_once(database: Database) -> None:
    for name in ("a", "b", "c"):
        make_schedule(database, "/in", name=name, cron="0 2 * * *")
    make_schedule(database, "/in", name="early", cron="0 1 * * *")
    make_schedule(database, "/in", name="paused", paused=True)
    make_schedule(database, "/in", name="later", cron="0 3 * * *")

    def names() -> list[str]:
        found: list[str] = []
        cursor = None
        with database.write() as connection:
            while row := schedules.lock_due(connection, DUE, cursor):
                found.append(row.name)
                cursor = (row.next_at, row.id)
        return found

    assert names() == ["early", "a", "b", "c"]
    do(database, lambda c: schedules.pause(c, schedule_row(database, "a").id))
    assert names() == ["early", "b", "c"]


def test_adding_twice_is_a_conflict_but_for_a_lost_answer(database: Database) -> None:
    make_schedule(database, "/in")
    row = schedule_row(database)
    columns = {name: getattr(row, name) for name in schedules.NewSchedule.__slots__}
    new = schedules.NewSchedule(**columns)
    with pytest.raises(ConflictError, match="already"):
        do(database, lambda c: schedules.add(c, new))
    do(database, lambda c: schedules.add(c, new, repeated=True))


def test_removing_leaves_jobs(database: Database, schedule: int) -> None:
    made = live(database, claim(database, schedule))
    assert do(database, lambda c: schedules.remove(c, schedule)) == [made]
    assert all_firings(database) == []
    left = job(database, made)
    assert (left.state, left.firing_id) == ("queued", None)


WORK: dict[str, Any] = {
    "due": lambda c, *_: schedules.lock_due(c, DUE, (BEGIN, 1)),
    "any due": lambda c, *_: schedules.is_any_due(c, DUE),
    "lapsed": lambda c, *_: firings.is_any_lapsed(c),
    "busy": lambda c, *_: firings.open_firing(c, 1),
    "ended": lambda c, *_: firings.ended(c, limit=9),
    "prune": lambda c, *_: firings.prune(c, 1, "succeeded", 0),
}


@pytest.mark.parametrize("name", WORK)
def test_no_statement_of_a_round_reads_a_whole_table(
    database: Database, schedule: int, name: str
) -> None:
    live(database, claim(database, schedule))
    found = plans(database, "", "", WORK[name])
    assert found
    # A scan of a partial index is meant: it holds what is open alone.
    whole = re.compile(
        r"SCAN (schedules|firings|jobs|chunks|webhooks)(?! USING (COVERING )?INDEX)"
        if database.dialect == "sqlite"
        else r"Seq Scan on (schedules|firings|jobs|chunks|webhooks)"
    )
    for statement, plan in found.items():
        assert not whole.search(plan), f"{statement}\n{plan}"
        if name == "due":
            assert not re.search("Sort|TEMP B-TREE", plan), plan
