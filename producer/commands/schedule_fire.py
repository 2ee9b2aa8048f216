"""`nightherd schedule run-now` and `backfill`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from producer.commands.common import json_option, load, notice, print_json, read
from producer.commands.control import ring


@click.command("run-now")
@click.argument("name")
@json_option
def run_now(name: str, as_json: bool) -> None:
    """Fire schedule NAME once, now, and print the job's id; its slots stay as they are.

    \b
    Example:
      nightherd schedule run-now summaries
      nightherd schedule run-now summaries --json | jq -r .job
    """
    from nightherd.errors import ConflictError
    from producer.schedules.by_hand import run_now as fire_now
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
        ring(settings, database, fired.checkpoint_key)


class _Slot(click.ParamType[Any]):
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
    "--from", "begin", type=_Slot(), required=True, help="The first day or time, in its zone."
)
@click.option("--to", "end", type=_Slot(), required=True, help="The last one; a day counts whole.")
@click.option("--dry-run", is_flag=True, help="Only list what would fire.")
@json_option
def backfill(
    name: str,
    begin: tuple[datetime, bool],
    end: tuple[datetime, bool],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fire the slots of schedule NAME in a span that were skipped or have failed.

    Slots from before the schedule was added fire too. Others are left alone: those that succeeded,
    run, are still due, or whose record is gone. Whatever --concurrency says, all are submitted,
    the oldest first. Exits 1 if a firing failed.

    \b
    Example:
      nightherd schedule backfill summaries --from 2026-11-01 --to 2026-11-07 --dry-run
    """
    from producer.schedules.by_hand import backfill as fire_slots
    from producer.schedules.by_hand import find_schedule, slots_of_backfill

    settings, database = load()
    row = read(database, lambda c: find_schedule(c, name))
    first, last = _span(begin, end, row.timezone)
    schedule, slots = slots_of_backfill(database, name, first, last)
    said = _Said(as_json, row.timezone)
    for slot in slots:
        if not slot.fires:
            said.say(slot.slot, "left", slot.why)
        elif dry_run:
            said.say(slot.slot, "would fire", slot.why)
    keys = set()
    failed = False
    if not dry_run:
        for slot, fired in fire_slots(database, settings, schedule, slots):
            if fired is None or fired.lost:
                said.say(slot.slot, "left", "another was faster")
            elif fired.error is not None:
                failed = True
                said.say(slot.slot, "failed", str(fired.error).rstrip(":"), fired.firing_id)
            elif fired.job is not None:
                keys.add(fired.checkpoint_key)
                said.say(slot.slot, "fired", slot.why, fired.firing_id, fired.job.id)
    said.end()
    for key in sorted(filter(None, keys)):
        ring(settings, database, key)
    if failed:
        raise SystemExit(1)


def _span(
    begin: tuple[datetime, bool], end: tuple[datetime, bool], timezone: str
) -> tuple[datetime, datetime]:
    from datetime import UTC, timedelta

    from nightherd.errors import UsageError
    from producer.cron import parse_zone

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


class _Said:
    """A line a slot as it happens, or all of it as JSON at the end."""

    def __init__(self, as_json: bool, timezone: str) -> None:
        self._as_json = as_json
        self._timezone = timezone
        self._rows: list[dict[str, Any]] = []

    def say(
        self,
        slot: datetime,
        what: str,
        why: str,
        firing: int | None = None,
        job: str | None = None,
    ) -> None:
        from producer.commands.schedule import in_zone

        self._rows.append(
            {
                "scheduled_for": slot.isoformat(),
                "done": what,
                "reason": why,
                "firing": firing,
                "job": job,
            }
        )
        if not self._as_json:
            ids = f" as job {job}" if job else ""
            click.echo(f"{in_zone(slot, self._timezone)}  {what}{ids} ({why})")

    def end(self) -> None:
        if self._as_json:
            print_json(sorted(self._rows, key=lambda row: row["scheduled_for"]))
        elif not self._rows:
            notice("no slots in that span")
