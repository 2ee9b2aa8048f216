"""Cron lines in time zones: their scheduled times. cronsim computes them, as Debian's cron would.

A scheduled time is a moment in UTC. A line that names its hours and minutes (`30 2 * * *`) has one
a day whatever the clock does: an hour that the spring leaves out moves to the first minute after
the gap, and of an hour that the autumn repeats the first one counts. A line with `*` in its hours
or minutes goes by the time that passes, so that `@hourly` has 23 in spring and 25 in autumn.
"""

from __future__ import annotations

import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from cronsim import CronSim, CronSimError

from nightherd.errors import UsageError

ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@nightly": "0 2 * * *",
    "@weekly": "0 0 * * 0",
}

_MAX_COUNT = 1_000
_LOOK_BACK = tuple(timedelta(hours=hours) for hours in (1, 24, 24 * 32, 24 * 366, 24 * 366 * 9))
_EXAMPLE = "five fields as in '0 2 * * *' (minute, hour, day, month, weekday)"


@dataclass(frozen=True, slots=True)
class Missed:
    """Scheduled times of a span: how many, counted up to a limit, the first and the last.

    `count` is one more than `_MAX_COUNT` where there are more.
    """

    count: int
    first: datetime
    last: datetime

    def __str__(self) -> str:
        if self.count == 1:
            return f"the scheduled time {show_utc(self.last)}"
        many = f"more than {_MAX_COUNT:,}" if self.count > _MAX_COUNT else f"{self.count:,}"
        return f"{many} scheduled times from {show_utc(self.first)} to {show_utc(self.last)}"


def show_utc(time: datetime) -> str:
    """`2026-03-29T01:00Z`, with seconds where there are some."""
    utc = time.astimezone(UTC)
    return f"{utc:%Y-%m-%dT%H:%M:%SZ}" if utc.second else f"{utc:%Y-%m-%dT%H:%MZ}"


@dataclass(frozen=True, slots=True)
class Rule:
    """A checked cron line in a zone."""

    line: str
    """As it was given."""
    zone: zoneinfo.ZoneInfo
    _fields: str

    def after(self, time: datetime) -> Iterator[datetime]:
        """The scheduled times after `time`, in order and each once; in UTC. Ends with the years."""
        last = time.astimezone(UTC)
        # A little earlier: of an hour that comes twice cronsim gives the first, and it counts the
        # hours of a day from the clock on the wall.
        start = (last - timedelta(hours=3)).astimezone(self.zone)
        try:
            for found in CronSim(self._fields, start):
                scheduled = found.astimezone(UTC)
                # Two times of an hour that the spring leaves out become the same moment.
                if scheduled > last:
                    last = scheduled
                    yield scheduled
        except (OverflowError, ValueError):
            return  # the year 9999

    def next(self, time: datetime) -> datetime | None:
        """The first scheduled time after `time`."""
        return next(self.after(time), None)

    def between(self, after: datetime, until: datetime) -> Iterator[datetime]:
        """The scheduled times in (after, until]."""
        for scheduled in self.after(after):
            if scheduled > until:
                return
            yield scheduled

    def latest(self, until: datetime, after: datetime | None = None) -> datetime | None:
        """The last scheduled time in (after, until]; without `after` of the last nine years."""
        for back in _LOOK_BACK:
            begin = until - back
            if after is not None and begin <= after:
                begin = after
            found = max(self.between(begin, until), default=None)
            if found is not None or begin == after:
                return found
        return None

    def previous(self, time: datetime) -> datetime | None:
        """The last scheduled time before `time`."""
        return self.latest(time - timedelta(microseconds=1))

    def missed(self, after: datetime, until: datetime) -> Missed | None:
        """The scheduled times in (after, until], which may be many; None if there are none."""
        first = last = None
        count = 0
        for scheduled in self.between(after, until):
            count += 1
            first = first or scheduled
            last = scheduled
            if count > _MAX_COUNT:
                last = self.latest(until, after)
                break
        return None if first is None or last is None else Missed(count, first, last)


@lru_cache(maxsize=4_096)
def parse_rule(line: str, timezone: str) -> Rule:
    """The rule of a cron line or an alias; raises `UsageError` in one line."""
    zone = parse_zone(timezone)
    text = " ".join(line.split())
    fields = text
    if text.startswith("@"):
        fields = ALIASES.get(text.lower(), "")
        if not fields:
            raise UsageError(f"--cron {line!r} is no alias; there are {', '.join(ALIASES)}")
    if len(fields.split()) != 5:
        raise UsageError(f"--cron {line!r} has {len(fields.split())} fields; write {_EXAMPLE}")
    try:
        rule = Rule(line, zone, fields)
        first = next(CronSim(fields, datetime(2024, 1, 1, tzinfo=UTC)), None)
    except CronSimError as error:
        reason = str(error).replace("Bad ", "bad ")
        raise UsageError(f"--cron {line!r}: {reason}; write {_EXAMPLE}") from None
    except (ValueError, AssertionError, IndexError, TypeError):
        # Lines such as `L-3` reach the depths of its parser.
        raise UsageError(f"--cron {line!r} cannot be read; write {_EXAMPLE}") from None
    if first is None:
        raise UsageError(f"--cron {line!r} never comes true")
    return rule


def parse_zone(name: str) -> zoneinfo.ZoneInfo:
    """The zone of that name; raises `UsageError`, with a name that is close."""
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        import difflib

        known = {zone.casefold(): zone for zone in zoneinfo.available_timezones()}
        wanted = name.strip().replace(" ", "_").casefold()
        tails = {zone.rpartition("/")[2].casefold(): zone for zone in known.values()}
        close = known.get(wanted) or tails.get(wanted)
        if close is None:
            found = difflib.get_close_matches(wanted, known, n=1)
            close = known[found[0]] if found else None
        hint = f"did you mean {close}?" if close else "write one as Europe/Berlin, or UTC"
        raise UsageError(f"--timezone {name!r} is not known; {hint}") from None
