"""What a user says of a schedule, checked as far as it can be known before its first firing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nightherd.errors import UsageError
from nightherd.params import effective_params
from nightherd.settings import Settings
from nightherd.structured import check_structure
from producer.inputs.moment import Moment, fill
from producer.inputs.source import check_source
from producer.jobs.limits import cached_limits
from producer.jobs.options import prepare
from producer.prompts.template import one_line, unstorable
from producer.schedules.cron import parse_rule
from producer.tasks.registry import parse_schema
from producer.webhooks.urls import check_urls

MAX_NAME = 200
_GLOB = ("*", "?", "[")


@dataclass(frozen=True, slots=True)
class Definition:
    """A schedule but for its state; `input` and `options` are the plain JSON that is stored."""

    name: str
    cron: str
    timezone: str
    input: dict[str, Any]
    options: dict[str, Any]
    concurrency: str = "forbid"
    misfire: str = "coalesce"
    starting_deadline_seconds: float | None = None
    keep_succeeded: int | None = None
    keep_failed: int | None = None


def make_input(path: str | None, query: str | None, database: str | None) -> dict[str, Any]:
    """The source of rows as it is stored; raises `UsageError` if it is none or two."""
    if query is None and database is None:
        if path is None:
            raise UsageError("no input: give INPUT, a path, or --input-sql with --input-database")
        if path == "-":
            raise UsageError("a schedule reads its input at each firing: give a path, not -")
        return {"path": os.path.abspath(os.path.expanduser(path))}
    if path is not None:
        raise UsageError("two inputs: give INPUT or --input-sql, not both")
    if query is None or database is None:
        missing = "--input-sql" if query is None else "--input-database"
        raise UsageError(f"--input-sql and --input-database go together; {missing} is not given")
    return {"sql": query, "database": database}


def make_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options as they are stored: paths absolute, a schema's file read."""
    from nightherd.catalogue import checkpoint_key

    options: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in given.items()
    }
    options["checkpoint"] = checkpoint_key(options["checkpoint"])
    if options["schema"] is not None:
        options["schema"] = json.dumps(parse_schema(options["schema"]))
    if options["output"] is not None:
        options["output"] = os.path.abspath(os.path.expanduser(options["output"]))
    return options


def check(definition: Definition, settings: Settings) -> list[str]:
    """Refuses what can be known to be wrong; returns what is only worth a notice.

    Raises the `NightherdError` that names the option.
    """
    _check_name(definition.name)
    rule = parse_rule(definition.cron, definition.timezone)
    for text in _texts([definition.input, definition.options]):
        if reason := unstorable(text):
            raise UsageError(f"an option of the schedule holds {reason}")
    now = datetime.now(UTC).astimezone(rule.zone).replace(microsecond=0)
    moment = Moment(scheduled_for=now, previous=now, firing=1)
    prepared = prepare(definition.options, {"scheduled_for": now, "firing": 1})
    check_structure(effective_params(None, prepared.params))
    limits = cached_limits(prepared.checkpoint_key, settings.home)
    if limits is not None:
        limits.check_params(prepared.params)
    check_source(definition.input)
    urls = {name: definition.options[name] for name in ("on_complete", "on_failure")}
    check_urls(settings, **urls)
    _check_output(definition.options["output"], moment)
    return _notices(definition.input)


def _check_name(name: str) -> None:
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise UsageError(
            f"{one_line(name, 60)!r} is no name for a schedule: 1 to {MAX_NAME} printable "
            "characters"
        )


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _check_output(output: str | None, moment: Moment) -> None:
    if output is None:
        return
    path = Path(fill(output, moment, "--output"))
    if path.is_dir():
        raise UsageError(f"--output {output}: it is a folder; give a file")
    # The folders that no placeholder names must be there.
    folder = Path(output).parent
    while "{{" in str(folder) or "{%" in str(folder) or "}}" in str(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"--output {output}: there is no folder {folder}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"the folder {folder} cannot be written to: {error.strerror}"
        raise UsageError(f"--output {output}: {reason}") from None


def _notices(source: Mapping[str, Any]) -> list[str]:
    path = source.get("path")
    if path is None or any(mark in path for mark in ("{{", "{%", *_GLOB)) or Path(path).exists():
        return []
    return [f"{path} is not there yet; it must be at each firing"]


def changed(definition: Definition, values: Mapping[str, Any]) -> Definition:
    """The definition with other values; those of `options` are merged."""
    values = dict(values)
    options = {**definition.options, **values.pop("options", {})}
    return replace(definition, **values, options=options)
