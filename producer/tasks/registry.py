"""Which tasks there are, and the way from a command's options to a builder of requests."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nightherd.errors import UsageError
from producer.prompts.builder import RowBuilder
from producer.prompts.template import compile_template, one_line
from producer.tasks.answer import ANSWER
from producer.tasks.base import Task
from producer.tasks.classify import CLASSIFY
from producer.tasks.extract import EXTRACT
from producer.tasks.generate import GENERATE
from producer.tasks.summarize import SUMMARIZE
from producer.tasks.translate import TRANSLATE

TASKS: dict[str, Task] = {
    task.name: task for task in (GENERATE, SUMMARIZE, TRANSLATE, ANSWER, CLASSIFY, EXTRACT)
}


def get_task(name: str) -> Task:
    """The task of that name; raises `UsageError` with the names there are."""
    task = TASKS.get(name)
    if task is None:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"no task {name!r}{hint} (tasks: {', '.join(TASKS)})")
    return task


def parse_task_args(items: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` options as a dict; raises `UsageError`."""
    args: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UsageError(
                f"--task-arg {item!r} is not KEY=VALUE; e.g. --task-arg target_language=French"
            )
        if args.get(name, value) != value:
            raise UsageError(f"--task-arg {name} is given twice: {args[name]!r} and {value!r}")
        args[name] = value
    return args


def parse_labels(text: str) -> tuple[str, ...]:
    """`a,b,c` as labels, without the spaces around them."""
    return tuple(label.strip() for label in text.split(",")) if text.strip() else ()


def parse_schema(given: str) -> dict[str, Any]:
    """A JSON schema from itself or from the file that holds it; raises `UsageError`."""
    text = given
    if not given.lstrip().startswith("{"):
        try:
            text = Path(given).read_text("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
            raise UsageError(f"--schema {one_line(given, 100)} cannot be read: {reason}") from None
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--schema {one_line(given, 100)} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise UsageError(f"--schema {one_line(given, 100)} is not a JSON schema: not an object")
    return schema


def make_builder(
    *,
    template: str | None = None,
    system: str | None = None,
    chat: bool = False,
    task: str | None = None,
    task_args: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    schema: Mapping[str, Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> RowBuilder | None:
    """The builder for a command's options, None where rows are taken as they are.

    `variables` may be used by `template` and `system` beside the columns of a row. Raises
    `UsageError` for a template that does not compile and for arguments without their task.
    """
    if task is None and task_args:
        raise UsageError(f"--task-arg {next(iter(task_args))} has no --task to go to")
    if task is None and labels:
        raise UsageError("--labels has no --task to go to: add --task classify")
    if task is None and schema is not None:
        raise UsageError("--schema has no --task to go to: add --task extract")
    if template is None and system is None and not chat and task is None:
        return None
    return RowBuilder(
        template=None if template is None else compile_template(template, "--template", variables),
        system=None if system is None else compile_template(system, "--system", variables),
        chat=chat,
        task=None if task is None else get_task(task).bind(task_args, labels, schema),
    )
