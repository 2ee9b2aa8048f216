"""`nightherd schedule add` and `edit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from producer.commands.common import Delay, json_option, load, notice, print_json, read, write
from producer.commands.jobs.submit_options import submit_options

F = TypeVar("F", bound=Callable[..., Any])

_NOT_FOR_SCHEDULES = {"name", "not_before", "deadline", "on_complete", "on_failure"}
"""Options of a submission that mean something else here, or nothing."""
_COLUMNS = ("cron", "timezone", "concurrency", "misfire", "keep_succeeded", "keep_failed")

_RULE_OPTIONS = (
    click.option("--cron", metavar="LINE",
                 help="Minute, hour, day, month, weekday: '0 2 * * *'; or @hourly, @daily, "
                      "@nightly (at 02:00), @weekly (Sunday)."),
    click.option("--timezone", default="UTC", show_default=True, metavar="ZONE",
                 help="The zone that the line is meant in, as Europe/Berlin."),
    click.option("--input-sql", metavar="QUERY",
                 help="Take rows from a SELECT; its columns are those of --template. It may use "
                      ":scheduled_for, :previous and :firing."),
    click.option("--input-database", metavar="VARIABLE",
                 help="The environment variable of the beat that holds that database's URL."),
    click.option("-o", "--output", metavar="FILE",
                 help="Write the results there when the job has ended; {{ scheduled_for | date }} "
                      "and {{ firing }} may stand in it, as in INPUT, --template and --system."),
    click.option("--concurrency", type=click.Choice(["forbid", "allow", "replace"]),
                 default="forbid", show_default=True,
                 help="While a job of an earlier scheduled time is open: skip this one, fire all "
                      "the same, or cancel that job."),
    click.option("--misfire", type=click.Choice(["coalesce", "skip", "all"]),
                 default="coalesce", show_default=True,
                 help="Scheduled times that no beat was there for: fire the latest, none, or all."),
    click.option("--starting-deadline", type=Delay(),
                 help="A scheduled time that is later than this (6h) is skipped."),
    click.option("--deadline", type=Delay(), help="End each job so long after its firing (8h)."),
    click.option("--not-before", type=Delay(), help="Start each job only so long after it fired."),
    click.option("--keep-succeeded", type=click.IntRange(0), metavar="N",
                 help="Keep the last N firings that succeeded, with their jobs; default: all."),
    click.option("--keep-failed", type=click.IntRange(0), metavar="N",
                 help="Keep the last N that failed; default: all."),
    click.option("--on-complete", metavar="URL", help="Tell this URL when a job has completed."),
    click.option("--on-failure", metavar="URL",
                 help="Tell this URL when a job or a firing has failed, or was missed."),
)  # fmt: skip


def schedule_options(command: F) -> F:
    """Options of schedules, then those of `submit` that go with them."""
    decorated = submit_options(command)
    params = getattr(decorated, "__click_params__", [])
    params[:] = [param for param in params if param.name not in _NOT_FOR_SCHEDULES]
    for option in reversed(_RULE_OPTIONS):
        decorated = option(decorated)
    return decorated


@click.command()
@click.argument("name")
@click.argument("input", required=False)
@schedule_options
@click.option("--paused", is_flag=True, help="Do not fire before `schedule resume`.")
@json_option
def add(name: str, input: str | None, paused: bool, as_json: bool, **given: Any) -> None:
    """Add schedule NAME: submit INPUT as a job at each scheduled time of --cron.

    INPUT is a file or a glob, read afresh at each firing; several files are one input in sorted
    order. What can be known to be wrong is refused now; what turns out wrong later is a failed
    firing with its reason, and the next one tries again. `nightherd beat` must be running.

    \b
    Example:
      nightherd schedule add stories --cron '0 2 * * *' --timezone Europe/Berlin prompts.jsonl
      nightherd schedule add weekly --cron @weekly '/data/*.jsonl' -o '/out/{{ firing }}.jsonl'
      nightherd schedule add hourly --cron @hourly '/in/{{ scheduled_for | date }}.jsonl'
      nightherd schedule add sum --cron @daily --input-sql 'SELECT body FROM a' --input-database DWH
    """
    from models.store import schedules as store
    from producer.jobs.options import user
    from producer.schedules.cron import parse_rule
    from producer.schedules.definition import Definition, check, make_input, make_options
    from producer.schedules.firing_loop import database_clock

    if given["cron"] is None:
        raise click.UsageError("--cron is needed, as --cron '0 2 * * *' or --cron @nightly")
    source = make_input(input, given.pop("input_sql"), given.pop("input_database"))
    columns = {column: given.pop(column) for column in _COLUMNS}
    columns["starting_deadline_seconds"] = given.pop("starting_deadline")
    options = make_options({**_renamed(given), "submitted_by": user()})
    definition = Definition(name=name, input=source, options=options, **columns)
    settings, database = load()
    for line in check(definition, settings):
        notice(line, always=True)
    rule = parse_rule(definition.cron, definition.timezone)
    tries = 0

    def work(connection: Any) -> None:
        nonlocal tries
        tries += 1
        first = rule.next(database_clock(connection))
        store.add(connection, _row(definition, paused, first), repeated=tries > 1)

    write(database, work)
    _report(database, name, as_json, "is added")


def _row(definition: Any, paused: bool, next_at: Any) -> Any:
    from dataclasses import asdict

    from models.store.schedules import NewSchedule

    return NewSchedule(**asdict(definition), paused=paused, next_at=next_at)


def _renamed(given: dict[str, Any]) -> dict[str, Any]:
    """Spans of time under names that say their unit."""
    spans = {f"{name}_seconds": given[name] for name in ("deadline", "not_before") if name in given}
    rest = {name: value for name, value in given.items() if name not in ("deadline", "not_before")}
    return {**rest, **spans}


def _report(database: Any, name: str, as_json: bool, what: str) -> None:
    from producer.commands.schedules.display import in_zone, view_of

    view = view_of(database, name)
    if as_json:
        print_json(view.as_json())
    elif view.row.paused or view.row.next_at is None:
        notice(f"{name} {what}")
    else:
        notice(f"{name} {what}; it fires next on {in_zone(view.row.next_at, view.row.timezone)}")


@click.command()
@click.argument("name")
@click.argument("input", required=False)
@schedule_options
@click.option(
    "--unset",
    multiple=True,
    metavar="OPTION",
    help="Take an option off again, as --unset starting-deadline.",
)
@json_option
@click.pass_context
def edit(
    context: click.Context,
    /,
    name: str,
    input: str | None,
    unset: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Change schedule NAME: only what is given changes, from the next firing on.

    A new --cron or --timezone counts from now on: no time of the past fires by it.

    \b
    Example:
      nightherd schedule edit summaries --cron '30 3 * * *' --max-tokens 200
      nightherd schedule edit summaries --unset starting-deadline --unset output
    """
    from models.store import schedules as store
    from producer.schedules.cron import parse_rule
    from producer.schedules.definition import changed, check
    from producer.schedules.firing_loop import database_clock
    from producer.schedules.manual import find_schedule, no_schedule

    values = _given_values(context, given, unset)
    settings, database = load()
    row = read(database, lambda c: find_schedule(c, name))
    source = _new_input(row, input, given)
    if source != row.input:
        values["input"] = source
    definition = changed(_definition(row), values)
    if definition == _definition(row):
        raise click.UsageError("nothing to change; give an option")
    for line in check(definition, settings):
        notice(line, always=True)
    rule = parse_rule(definition.cron, definition.timezone)
    moved = (definition.cron, definition.timezone) != (row.cron, row.timezone)

    def work(connection: Any) -> None:
        locked = store.lock(connection, name)
        if locked is None:
            raise no_schedule(connection, name)
        new = _columns(definition)
        if moved:
            store.set_next(connection, locked.id, new, rule.next(database_clock(connection)))
        else:
            store.change(connection, locked.id, new)

    write(database, work)
    _report(database, name, as_json, "is changed")


def _definition(row: Any) -> Any:
    from dataclasses import fields

    from producer.schedules.definition import Definition

    return Definition(**{field.name: getattr(row, field.name) for field in fields(Definition)})


def _columns(definition: Any) -> dict[str, Any]:
    from dataclasses import asdict

    columns = asdict(definition)
    del columns["name"]
    return columns


def _new_input(row: Any, path: str | None, given: dict[str, Any]) -> dict[str, Any]:
    from producer.schedules.definition import make_input

    query, database = given["input_sql"], given["input_database"]
    if path is None and query is None and database is None:
        return dict(row.input)
    if path is None and "sql" in row.input:
        # One of the two may change alone.
        query = query or row.input["sql"]
        database = database or row.input["database"]
    return make_input(path, query, database)


def _given_values(
    context: click.Context, given: dict[str, Any], unset: tuple[str, ...]
) -> dict[str, Any]:
    """Columns and `options` that the command line names, and the defaults of those unset."""
    from producer.schedules.definition import make_options

    options = {
        name: value
        for name, value in given.items()
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    for word in unset:
        name = word.lstrip("-").replace("-", "_")
        if name in ("cron", "checkpoint", "input_sql", "input_database") or name not in given:
            raise click.UsageError(f"--unset {word}: there is no such option that can be unset")
        if name in options:
            raise click.UsageError(f"--unset {word}: it is given as well")
        options[name] = given[name]  # which is its default
    for name in ("input_sql", "input_database"):
        options.pop(name, None)
    values: dict[str, Any] = {name: options.pop(name) for name in _COLUMNS if name in options}
    if "starting_deadline" in options:
        values["starting_deadline_seconds"] = options.pop("starting_deadline")
    renamed = _renamed(options)
    if renamed:
        whole = make_options({"checkpoint": "demo", "schema": None, "output": None, **renamed})
        values["options"] = {name: whole[name] for name in renamed}
    return values
