"""What is done about scheduled times that are due: fire, skip, wait. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from producer.schedules.cron import Missed, Rule, show_utc

SKIP_MARGIN = 60.0
"""Seconds: so late may a scheduled time be that `--misfire skip` still fires, by default."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a schedule treats scheduled times that come late or find it busy."""

    misfire: str
    starting_deadline: timedelta | None
    margin: timedelta = timedelta(seconds=SKIP_MARGIN)


@dataclass(frozen=True, slots=True)
class Skip:
    """A run of scheduled times that do not fire, recorded as one."""

    times: Missed
    reason: str
    missed: bool = False
    """Too old for the starting deadline: a failure that somebody may want to be told of."""


@dataclass(frozen=True, slots=True)
class MisfireDecision:
    """What to record as skipped, at most one scheduled time to fire, and where to go on."""

    skips: tuple[Skip, ...]
    fire: datetime | None
    next_at: datetime | None
    """Unchanged where the scheduled time waits."""


def decide(
    rule: Rule, policy: Policy, next_at: datetime, now: datetime, busy: str | None = None
) -> MisfireDecision:
    """Decides about the scheduled times in [next_at, now], of which next_at is the first.

    `busy`: what firing of the schedule has not ended, where that stands in the way.
    """
    skips: list[Skip] = []
    first = next_at
    limit, reason, missed = _too_late(policy, now)
    if policy.misfire == "coalesce":
        latest = rule.latest(now, _before(next_at)) or next_at
        earlier = rule.missed(_before(next_at), _before(latest))
        if earlier is not None and latest >= limit:
            told = (
                f"{_were(earlier)} missed; {show_utc(latest)} stands for all (--misfire coalesce)"
            )
            skips.append(Skip(earlier, told))
            first = latest
    if first < limit:
        late = rule.missed(_before(first), min(_before(limit), now))
        if late is not None:
            skips.append(Skip(late, f"{_were(late)} {reason}", missed))
            following = rule.next(late.last)
            if following is None or following > now:
                return MisfireDecision(tuple(skips), None, following)
            first = following
    if busy is None:
        return MisfireDecision(tuple(skips), first, rule.next(first))
    if policy.misfire == "all":
        return MisfireDecision(tuple(skips), None, first)  # one after the other: it waits
    told = f"{busy} has not ended (--concurrency forbid)"
    skips.append(Skip(Missed(1, first, first), told))
    return MisfireDecision(tuple(skips), None, rule.next(first))


def _before(time: datetime) -> datetime:
    return time - timedelta(microseconds=1)


def _too_late(policy: Policy, now: datetime) -> tuple[datetime, str, bool]:
    """The oldest time that still fires, why older ones do not, and whether that is a failure."""
    deadline = policy.starting_deadline
    if policy.misfire == "skip" and (deadline is None or policy.margin < deadline):
        span = show_span(policy.margin)
        return now - policy.margin, f"more than {span} late (--misfire skip)", False
    if deadline is None:
        return datetime.min.replace(tzinfo=UTC), "", False
    return now - deadline, f"more than {show_span(deadline)} late (--starting-deadline)", True


def _were(times: Missed) -> str:
    return f"{times} was" if times.count == 1 else f"{times} were"


def show_span(span: timedelta) -> str:
    """`6h`, `90m`, `45s`, as it may be given."""
    seconds = span.total_seconds()
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"
