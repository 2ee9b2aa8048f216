"""What fires, what is skipped and why, of times that come late or find their schedule busy."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from producer.schedules.cron import Missed, parse_rule
from producer.schedules.misfire import MisfireDecision, Policy, decide, show_span

NIGHTLY = parse_rule("0 2 * * *", "UTC")
MINUTELY = parse_rule("* * * * *", "UTC")
HOUR = timedelta(hours=1)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def policy(misfire: str = "coalesce", deadline: timedelta | None = None) -> Policy:
    return Policy(misfire, deadline)


def reasons(decision: MisfireDecision) -> list[str]:
    return [skip.reason for skip in decision.skips]


@pytest.mark.parametrize("misfire", ["coalesce", "skip", "all"])
def test_on_time(misfire: str) -> None:
    decision = decide(NIGHTLY, policy(misfire), at("2026-01-05T02:00"), at("2026-01-05T02:00:01"))
    assert decision == MisfireDecision((), at("2026-01-05T02:00"), at("2026-01-06T02:00"))


def test_coalesce_fires_the_latest_for_all() -> None:
    decision = decide(NIGHTLY, policy(), at("2026-01-05T02:00"), at("2026-01-08T09:00"))
    assert decision.fire == at("2026-01-08T02:00")
    assert decision.next_at == at("2026-01-09T02:00")
    (skip,) = decision.skips
    assert skip.times == Missed(3, at("2026-01-05T02:00"), at("2026-01-07T02:00"))
    assert not skip.missed
    assert skip.reason == (
        "3 scheduled times from 2026-01-05T02:00Z to 2026-01-07T02:00Z were missed; "
        "2026-01-08T02:00Z stands for all (--misfire coalesce)"
    )


def test_skip_fires_only_what_is_hardly_late() -> None:
    now = at("2026-01-05T02:01:00")
    decision = decide(NIGHTLY, policy("skip"), at("2026-01-05T02:00"), now)
    assert decision.fire == at("2026-01-05T02:00")
    decision = decide(NIGHTLY, policy("skip"), at("2026-01-05T02:00"), now + timedelta(seconds=1))
    assert (decision.fire, decision.next_at) == (None, at("2026-01-06T02:00"))
    assert reasons(decision) == [
        "the scheduled time 2026-01-05T02:00Z was more than 1m late (--misfire skip)"
    ]
    decision = decide(MINUTELY, policy("skip"), at("2026-01-05T02:00"), at("2026-01-05T02:10:30"))
    assert decision.fire == at("2026-01-05T02:10")
    assert decision.skips[0].times.count == 10


def test_all_fires_one_after_the_other_the_oldest_first() -> None:
    next_at: datetime | None = at("2026-01-05T02:00")
    fired = []
    while next_at is not None and next_at <= at("2026-01-08T09:00"):
        decision = decide(NIGHTLY, policy("all"), next_at, at("2026-01-08T09:00"))
        assert not decision.skips
        fired.append(decision.fire)
        next_at = decision.next_at
    assert fired == [at(f"2026-01-0{day}T02:00") for day in (5, 6, 7, 8)]
    assert next_at == at("2026-01-09T02:00")


def test_a_catch_up_inside_the_deadline_and_a_skip_outside() -> None:
    inside = decide(
        NIGHTLY, policy(deadline=6 * HOUR), at("2026-01-05T02:00"), at("2026-01-05T08:00")
    )
    assert (inside.fire, inside.skips) == (at("2026-01-05T02:00"), ())
    outside = decide(
        NIGHTLY, policy(deadline=6 * HOUR), at("2026-01-05T02:00"), at("2026-01-05T08:00:01")
    )
    assert (outside.fire, outside.next_at) == (None, at("2026-01-06T02:00"))
    assert outside.skips[0].missed
    assert reasons(outside) == [
        "the scheduled time 2026-01-05T02:00Z was more than 6h late (--starting-deadline)"
    ]


def test_coalesced_times_are_not_missed_where_one_stands_for_them() -> None:
    decision = decide(
        NIGHTLY, policy(deadline=6 * HOUR), at("2026-01-05T02:00"), at("2026-01-08T03:00")
    )
    assert decision.fire == at("2026-01-08T02:00")
    assert [skip.missed for skip in decision.skips] == [False]
    decision = decide(
        NIGHTLY, policy(deadline=6 * HOUR), at("2026-01-05T02:00"), at("2026-01-08T09:00")
    )
    assert decision.fire is None
    assert [(skip.missed, skip.times.count) for skip in decision.skips] == [(True, 4)]


def test_all_leaves_out_what_is_too_old() -> None:
    decision = decide(
        MINUTELY,
        policy("all", timedelta(minutes=5)),
        at("2026-01-05T02:00"),
        at("2026-01-05T03:00:30"),
    )
    assert decision.fire == at("2026-01-05T02:56")
    assert [(skip.times.count, skip.missed) for skip in decision.skips] == [(56, True)]
    assert decision.next_at == at("2026-01-05T02:57")


def test_busy_is_skipped_but_waits_with_all() -> None:
    due, now = at("2026-01-05T02:00"), at("2026-01-05T02:00:01")
    decision = decide(NIGHTLY, policy(), due, now, busy="job 1q of 2026-01-04T02:00Z")
    assert (decision.fire, decision.next_at) == (None, at("2026-01-06T02:00"))
    assert reasons(decision) == ["job 1q of 2026-01-04T02:00Z has not ended (--concurrency forbid)"]
    waits = decide(NIGHTLY, policy("all"), due, now, busy="job 1q")
    assert waits == MisfireDecision((), None, due)


def test_a_year_of_minutes_is_one_row() -> None:
    decision = decide(MINUTELY, policy(), at("2025-01-05T02:00"), at("2026-01-05T02:00:30"))
    assert decision.fire == at("2026-01-05T02:00")
    (skip,) = decision.skips
    assert skip.times.last == at("2026-01-05T01:59")
    assert skip.reason.startswith("more than 1,000 scheduled times from 2025-01-05T02:00Z to")


@pytest.mark.parametrize(
    ("span", "shown"),
    [(6 * HOUR, "6h"), (timedelta(minutes=90), "90m"), (timedelta(days=2), "2d"),
     (timedelta(seconds=45), "45s"), (timedelta(seconds=0.5), "0.5s")],
)  # fmt: skip
def test_spans(span: timedelta, shown: str) -> None:
    assert show_span(span) == shown
