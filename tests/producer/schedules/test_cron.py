"""Scheduled times of cron lines: one a day whatever the clock does, in order, each once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightherd.errors import UsageError
from producer.schedules.cron import ALIASES, Missed, Rule, parse_rule, show_utc

ZONES = ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"]
# In each zone: the first day of a week in which the clock goes forward, of one in which it goes
# back, and a time of day that the former leaves out and the latter has twice.
CHANGES = {
    "Europe/Berlin": ("2026-03-26", "2026-10-22", "30 2"),
    "America/New_York": ("2026-03-05", "2026-10-29", "30 2"),
    "Australia/Lord_Howe": ("2026-10-01", "2026-04-02", "15 2"),
}
TWICE = {"Europe/Berlin": "30 2", "America/New_York": "30 1", "Australia/Lord_Howe": "45 1"}


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def of_week(rule: Rule, first_day: str) -> list[datetime]:
    start = datetime.fromisoformat(first_day).replace(tzinfo=rule.zone)
    return [time.astimezone(rule.zone) for time in rule.between(start, start + timedelta(days=7))]


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("spring", [True, False])
def test_one_time_a_day_when_the_clock_changes(zone: str, spring: bool) -> None:
    forward, back, gap = CHANGES[zone]
    line = f"{gap if spring else TWICE[zone]} * * *"
    first = forward if spring else back
    offsets = {
        (datetime.fromisoformat(first) + timedelta(days=day))
        .replace(tzinfo=ZoneInfo(zone))
        .utcoffset()
        for day in range(7)
    }
    assert len(offsets) == 2, "the clock changes in this week"
    times = of_week(parse_rule(line, zone), first)
    days = [time.date() for time in times]
    start = datetime.fromisoformat(first).date()
    assert days == [start + timedelta(days=day) for day in range(7)]


def test_a_time_that_the_spring_leaves_out_moves_behind_the_gap() -> None:
    times = of_week(parse_rule("30 2 * * *", "Europe/Berlin"), "2026-03-29")
    assert show_utc(times[0]) == "2026-03-29T01:00Z"
    assert (times[0].hour, times[0].minute) == (3, 0)
    assert [(time.hour, time.minute) for time in times[1:]] == [(2, 30)] * 6


def test_of_a_time_that_comes_twice_the_first_counts() -> None:
    rule = parse_rule("30 2 * * *", "Europe/Berlin")
    times = of_week(rule, "2026-10-25")
    assert show_utc(times[0]) == "2026-10-25T00:30Z"
    # Asked between the two, after either: the next one is tomorrow's.
    for asked in ("2026-10-25T00:30", "2026-10-25T00:45", "2026-10-25T01:15", "2026-10-25T01:45"):
        assert rule.next(utc(asked)) == utc("2026-10-26T01:30"), asked


def test_two_times_in_the_gap_are_one() -> None:
    times = of_week(parse_rule("10,40 2 * * *", "Europe/Berlin"), "2026-03-29")
    assert [show_utc(time) for time in times[:3]] == [
        "2026-03-29T01:00Z",
        "2026-03-30T00:10Z",
        "2026-03-30T00:40Z",
    ]


@pytest.mark.parametrize(("day", "count"), [("2026-03-29", 23), ("2026-10-25", 25)])
def test_hourly_goes_by_the_time_that_passes(day: str, count: int) -> None:
    rule = parse_rule("@hourly", "Europe/Berlin")
    begin = datetime.fromisoformat(day).replace(tzinfo=rule.zone)
    end = begin + timedelta(days=1)
    times = list(rule.between(begin - timedelta(seconds=1), end - timedelta(seconds=1)))
    assert len(times) == count
    assert {b - a for a, b in pairwise(times)} == {timedelta(hours=1)}


@pytest.mark.parametrize(
    ("alias", "expected"),
    [
        ("@hourly", "2026-11-23T18:00Z"),
        ("@daily", "2026-11-24T00:00Z"),
        ("@nightly", "2026-11-24T02:00Z"),
        ("@weekly", "2026-11-29T00:00Z"),
        ("@WEEKLY", "2026-11-29T00:00Z"),
    ],
)
def test_aliases(alias: str, expected: str) -> None:
    found = parse_rule(alias, "UTC").next(utc("2026-11-23T17:00"))
    assert found is not None
    assert show_utc(found) == expected
    assert alias.lower() in ALIASES


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("61 2 * * *", "--cron '61 2 * * *': bad minute; write five fields"),
        ("0 25 * * *", "bad hour"),
        ("0 2 31 2 *", "bad day-of-month"),
        ("0 2 * *", "has 4 fields"),
        ("0 0 2 * * *", "has 6 fields"),
        ("", "has 0 fields"),
        ("@yearly", "is no alias; there are @hourly, @daily, @nightly, @weekly"),
        ("a b c d e", "bad minute"),
        ("0 2 L-3 * *", "cannot be read|bad day-of-month"),
        ("*/0 * * * *", "bad minute"),
    ],
)
def test_bad_lines_are_one_clear_line(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("*", r"\*")) as caught:
        parse_rule(line, "UTC")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("zone", "hint"),
    [
        ("Berlin", "did you mean Europe/Berlin?"),
        ("europe/berlin", "did you mean Europe/Berlin?"),
        ("New York", "did you mean America/New_York?"),
        ("Europe/Berln", "did you mean Europe/Berlin?"),
        ("", "Europe/Berlin, or UTC"),
        ("../etc/passwd", "is not known"),
        ("nirgendwo", "write one as"),
    ],
)
def test_bad_zones_have_a_hint(zone: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rule("0 2 * * *", zone)
    assert hint in str(caught.value)


def test_missed_times_are_counted_up_to_a_limit() -> None:
    rule = parse_rule("* * * * *", "UTC")
    found = rule.missed(utc("2026-01-01T00:00"), utc("2026-01-01T00:03"))
    assert found == Missed(3, utc("2026-01-01T00:01"), utc("2026-01-01T00:03"))
    assert str(found) == "3 scheduled times from 2026-01-01T00:01Z to 2026-01-01T00:03Z"
    many = rule.missed(utc("2026-01-01T00:00"), utc("2027-01-01T00:00"))
    assert many is not None
    assert (
        str(many) == "more than 1,000 scheduled times from 2026-01-01T00:01Z to 2027-01-01T00:00Z"
    )
    assert rule.missed(utc("2026-01-01T00:00"), utc("2026-01-01T00:00:59")) is None


def test_previous_and_latest() -> None:
    rule = parse_rule("0 2 1 1 *", "UTC")
    assert rule.previous(utc("2026-01-01T02:00")) == utc("2025-01-01T02:00")
    assert rule.latest(utc("2026-01-01T02:00")) == utc("2026-01-01T02:00")
    assert rule.latest(utc("2026-01-02"), after=utc("2026-01-01T02:00")) is None


_FIELDS = st.tuples(
    st.sampled_from(["0", "30", "*/20", "15,45", "*"]),
    st.sampled_from(["*", "1", "2", "1-3", "*/6"]),
    st.sampled_from(["*", "29", "1,15"]),
    st.just("*"),
    st.sampled_from(["*", "0", "1-5"]),
)


@settings(max_examples=60, deadline=None)
@given(
    _FIELDS,
    st.sampled_from(ZONES),
    st.datetimes(datetime(2025, 1, 1), datetime(2027, 1, 1)),
)
def test_times_are_in_order_and_do_not_depend_on_where_one_begins(
    fields: tuple[str, ...], zone: str, begin: datetime
) -> None:
    rule = parse_rule(" ".join(fields), zone)
    start = begin.replace(tzinfo=UTC)
    times = list(islice(rule.after(start), 12))
    assert times == sorted(set(times))
    assert all(time > start for time in times)
    for earlier, later in pairwise(times):
        assert rule.next(earlier) == later
        assert rule.previous(later) == earlier
