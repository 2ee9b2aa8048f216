"""`nightherd schedule`: the group, and what looks at schedules or turns them on and off."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from producer.commands.common import (
    duration,
    json_option,
    load,
    notice,
    print_json,
    read,
    table,
    write,
)
from producer.commands.schedules.add_edit import add, edit
from producer.commands.schedules.display import in_zone, view_of
from producer.commands.schedules.run_now_backfill import backfill, run_now

if TYPE_CHECKING:
    from models.database import Database
    from producer.schedules.views import FiringView, ScheduleView

_OVERDUE_SECONDS = 60


@click.group()
def schedule() -> None:
    """Submit jobs by the clock, each scheduled time once. `nightherd beat` fires them.

    \b
    Example:
      nightherd schedule list
    """


for command in (add, edit, run_now, backfill):
    schedule.add_command(command)


def _next_time(view: ScheduleView) -> str:
    if view.row.paused:
        return "paused"
    if view.row.next_at is None:
        return "never"
    return in_zone(view.row.next_at, view.row.timezone)


def _last_outcome(last: FiringView | None) -> str | None:
    if last is None:
        return None
    job = f" {last.job}" if last.job else ""
    return f"{last.state}{job}"


@schedule.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List schedules: when each fires next, in its own zone, and how its last firing went.

    \b
    Example:
      nightherd schedule list
      nightherd schedule list --json | jq -r '.[] | select(.last.state == "failed") | .name'
    """
    from producer.schedules.views import schedule_views

    _, database = load()
    views = read(database, schedule_views)
    if as_json:
        print_json([view.as_json() for view in views])
        return
    if not views:
        notice("no schedules yet; `nightherd schedule add` makes one")
        return
    rows = [
        (
            view.row.name,
            view.row.cron,
            view.row.timezone,
            _next_time(view),
            _last_outcome(view.last),
            None if view.last is None else in_zone(view.last.scheduled_for, view.row.timezone),
        )
        for view in views
    ]
    click.echo(table(rows, ("NAME", "CRON", "ZONE", "NEXT", "LAST", "OF")))
    _say_overdue(views)


def _say_overdue(views: list[ScheduleView]) -> None:
    late = [
        view.row.name
        for view in views
        if not view.row.paused
        and view.row.next_at is not None
        and (view.database_now - view.row.next_at).total_seconds() > _OVERDUE_SECONDS
    ]
    if late:
        notice(f"{late[0]} is overdue: is a beat running? (nightherd beat)", always=True)


@schedule.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show all about schedule NAME.

    \b
    Example:
      nightherd schedule show summaries
    """
    _, database = load()
    view = view_of(database, name)
    if as_json:
        print_json(view.as_json())
        return
    click.echo(_describe(view))
    _say_overdue([view])


def _describe(view: ScheduleView) -> str:
    from datetime import timedelta

    from producer.schedules.misfire import show_span

    row = view.row
    source = row.input.get("path") or f"{row.input['database']}: {row.input['sql']}"
    lines = [f"{row.name}: {row.cron} in {row.timezone}", f"  next: {_next_time(view)}"]
    if view.last is not None:
        when = in_zone(view.last.scheduled_for, row.timezone)
        lines.append(f"  last: {when} {_last_outcome(view.last)}")
        if view.last.reason:
            lines.append(f"        {view.last.reason}")
    lines.append(f"  input: {source}")
    given = {
        name: value
        for name, value in row.options.items()
        if value not in (None, [], False, 0, "auto") and name != "submitted_by"
    }
    lines += [f"  {name.replace('_', '-')}: {value}" for name, value in given.items()]
    rules = f"concurrency {row.concurrency}, misfire {row.misfire}"
    if row.starting_deadline_seconds is not None:
        span = show_span(timedelta(seconds=row.starting_deadline_seconds))
        rules += f", starting deadline {span}"
    for state in ("succeeded", "failed"):
        if (keep := getattr(row, f"keep_{state}")) is not None:
            rules += f", keeps {keep} {state}"
    return "\n".join([*lines, f"  {rules}"])


@schedule.command("next")
@click.argument("name")
@click.option(
    "--count", type=click.IntRange(1, 1_000), default=5, show_default=True, help="So many."
)
@json_option
def next_(name: str, count: int, as_json: bool) -> None:
    """Print when schedule NAME fires next, in its own zone.

    \b
    Example:
      nightherd schedule next summaries --count 3
    """
    from itertools import islice

    from producer.schedules.cron import parse_rule

    _, database = load()
    view = view_of(database, name)
    rule = parse_rule(view.row.cron, view.row.timezone)
    begin = view.database_now
    if view.row.next_at is not None and not view.row.paused:
        first = [view.row.next_at]
        begin = view.row.next_at
    else:
        first = []
    times = [*first, *islice(rule.after(begin), count - len(first))]
    if as_json:
        print_json([time.isoformat() for time in times])
        return
    for time in times:
        click.echo(in_zone(time, view.row.timezone))
    if view.row.paused:
        notice(f"{name} is paused: none of these fires before it is resumed", always=True)


@schedule.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@json_option
def pause(names: tuple[str, ...], as_json: bool) -> None:
    """Let schedules NAME fire no more for now. Jobs that run go on.

    \b
    Example:
      nightherd schedule pause summaries
    """
    from models.store import schedules as store
    from producer.schedules.manual import find_schedule

    _, database = load()
    for name in names:
        done = write(database, lambda c, name=name: store.pause(c, find_schedule(c, name).id))  # type: ignore[misc]
        notice(f"{name} " + ("is paused" if done else "was paused already"))
    _print_views(database, names, as_json)


@schedule.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@json_option
def resume(names: tuple[str, ...], as_json: bool) -> None:
    """Let paused schedules NAME fire again, from their next scheduled time on.

    The scheduled times of the pause are recorded as skipped; `backfill` fires them.

    \b
    Example:
      nightherd schedule resume summaries
    """
    from producer.schedules.manual import resume_schedule

    _, database = load()
    for name in names:
        done = write(database, lambda c, name=name: resume_schedule(c, name))  # type: ignore[misc]
        notice(f"{name} " + ("goes on" if done else "was not paused"))
    _print_views(database, names, as_json)


def _print_views(database: Database, names: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        print_json([view_of(database, name).as_json() for name in names])


@schedule.command()
@click.argument("name")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="So many.")
@click.option(
    "--state",
    type=click.Choice(["claimed", "submitted", "succeeded", "failed", "skipped"]),
    help="Only firings in this state.",
)
@json_option
def history(name: str, limit: int, state: str | None, as_json: bool) -> None:
    """List the firings of schedule NAME, the latest scheduled time first.

    \b
    Example:
      nightherd schedule history summaries
      nightherd schedule history summaries --state failed --json | jq -r '.[].reason'
    """
    from producer.schedules.manual import find_schedule
    from producer.schedules.views import history as views_of

    _, database = load()
    row = read(database, lambda c: find_schedule(c, name))
    views = read(database, lambda c: views_of(c, row.id, limit=limit, state=state))
    if as_json:
        print_json([view.as_json() for view in views])
        return
    if not views:
        notice("no firings yet")
        return
    rows: list[tuple[Any, ...]] = [
        (
            str(view.id),
            in_zone(view.scheduled_for, row.timezone),
            view.kind,
            view.state,
            view.job,
            _duration(view),
            view.reason,
        )
        for view in views
    ]
    click.echo(table(rows, ("FIRING", "SCHEDULED FOR", "KIND", "STATE", "JOB", "TOOK", "REASON")))


def _duration(view: FiringView) -> str | None:
    if view.finished_at is None or view.state == "skipped":
        return None
    return duration((view.finished_at - view.created_at).total_seconds())


@schedule.command()
@click.argument("name")
@json_option
def remove(name: str, as_json: bool) -> None:
    """Remove schedule NAME and its history. Its jobs and their results stay.

    \b
    Example:
      nightherd schedule remove summaries
    """
    from models.store import schedules as store
    from producer.schedules.manual import no_schedule

    _, database = load()
    removed = False

    def work(connection: Any) -> list[str]:
        nonlocal removed
        row = store.lock(connection, name)
        if row is None:
            if removed:
                return []  # committed before, and only the answer was lost
            raise no_schedule(connection, name)
        removed = True
        return store.remove(connection, row.id)

    going_on = write(database, work)
    for job in going_on:
        notice(f"job {job} goes on, its --output will not be written: nightherd results {job}")
    if as_json:
        print_json({"removed": name, "open_jobs": going_on, "at": datetime.now(UTC).isoformat()})
    else:
        notice(f"{name} is removed")
