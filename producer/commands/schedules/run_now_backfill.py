"""`nightherd schedule run-now` and `backfill`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from producer.commands.common import json_option, load, notice, print_json, read
from producer.commands.jobs.control import publish_wakeups


@click.command("run-now")
@click.argument("name")
@json_option
def run_now(name: str, as_json: bool) -> None:
    """Fire schedule NAME once, now, and print the job's id; its scheduled times stay as they are.

    \b
    Example:
      nightherd schedule run-now summaries
      nightherd schedule run-now summaries --json | jq -r .job
    """
    from nightherd.errors import ConflictError
    from producer.schedules.manual import run_now as fire_now
    from producer.schedules.views import firing_view

    settings, database = load()
    fired = fire_now(database, settings, name)
    if fired.error is not None:
        raise fired.error
    if fired.job is None:
        raise ConflictError(f"firing {fired.firing_id} was taken over; see schedule history {name}")
    if as_json:
        view = read(database, lambda c: firing_view(c, fired.firing_id))
        print_json(None if view is None else view.as_json())
    else:
        click.echo(fired.job.id)
    if fired.checkpoint_key is not None:
        publish_wakeups(settings, database, fired.checkpoint_key)


class _DateOrTime(click.ParamType[Any]):
    """A date, or a time; in the schedule's zone unless it says one."""

    name = "time"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "DATE|TIME"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[datetime, bool]:
        if isinstance(value, tuple):
            return value
        try:
            return datetime.fromisoformat(value), len(value) <= len("2026-11-24")
        except ValueError:
            self.fail(f"{value!r} is no time; write 2026-11-24 or 2026-11-24T02:00")


@click.command()
@click.argument("name")
@click.option(
    "--from", "begin", type=_DateOrTime(), required=True, help="The first day or time, in its zone."
)
@click.option(
    "--to", "end", type=_DateOrTime(), required=True, help="The last one; a day counts whole."
)
@click.option("--dry-run", is_flag=True, help="Only list what would fire.")
@json_option
def backfill(
    name: str,
    begin: tuple[datetime, bool],
    end: tuple[datetime, bool],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fire the scheduled times of NAME in a span that were skipped or have failed.

    Those from before the schedule was added fire too. Others are left alone: those that succeeded,
    run, are still due, or whose record is gone. Whatever --concurrency says, all are submitted,
    the oldest first. Exits 1 if a firing failed.

    \b
    Example:
      nightherd schedule backfill summaries --from 2026-11-01 --to 2026-11-07 --dry-run
    """
    from producer.schedules.manual import backfill as fire_times
    from producer.schedules.manual import backfill_times, find_schedule

    settings, database = load()
    row = read(database, lambda c: find_schedule(c, name))
    first, last = _span(begin, end, row.timezone)
    schedule, times = backfill_times(database, name, first, last)
    report = _BackfillReport(as_json, row.timezone)
    for each in times:
        if not each.fires:
            report.add(each.time, "left", each.why)
        elif dry_run:
            report.add(each.time, "would fire", each.why)
    keys = set()
    failed = False
    if not dry_run:
        for each, fired in fire_times(database, settings, schedule, times):
            if fired is None or fired.lost:
                report.add(each.time, "left", "another was faster")
            elif fired.error is not None:
                failed = True
                report.add(each.time, "failed", str(fired.error).rstrip(":"), fired.firing_id)
            elif fired.job is not None:
                keys.add(fired.checkpoint_key)
                report.add(each.time, "fired", each.why, fired.firing_id, fired.job.id)
    report.end()
    for key in sorted(filter(None, keys)):
        publish_wakeups(settings, database, key)
    if failed:
        raise SystemExit(1)


def _span(
    begin: tuple[datetime, bool], end: tuple[datetime, bool], timezone: str
) -> tuple[datetime, datetime]:
    from datetime import UTC, timedelta

    from nightherd.errors import UsageError
    from producer.schedules.cron import parse_zone

    zone = parse_zone(timezone)

    def in_utc(time: datetime) -> datetime:
        return (time.replace(tzinfo=zone) if time.tzinfo is None else time).astimezone(UTC)

    first = in_utc(begin[0])
    last = in_utc(end[0])
    if end[1]:
        last = in_utc(end[0] + timedelta(days=1)) - timedelta(microseconds=1)
    if last < first:
        raise UsageError("--to is before --from")
    return first, last


class _BackfillReport:
    """A line for each scheduled time as it is dealt with, or all of it as JSON at the end."""

    def __init__(self, as_json: bool, timezone: str) -> None:
        self._as_json = as_json
        self._timezone = timezone
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        time: datetime,
        what: str,
        why: str,
        firing: int | None = None,
        job: str | None = None,
    ) -> None:
        from producer.commands.schedules.display import in_zone

        self._rows.append(
            {
                "scheduled_for": time.isoformat(),
                "done": what,
                "reason": why,
                "firing": firing,
                "job": job,
            }
        )
        if not self._as_json:
            ids = f" as job {job}" if job else ""
            click.echo(f"{in_zone(time, self._timezone)}  {what}{ids} ({why})")

    def end(self) -> None:
        if self._as_json:
            print_json(sorted(self._rows, key=lambda row: row["scheduled_for"]))
        elif not self._rows:
            notice("no scheduled times in that span")
