"""What a schedule reads at each firing: a path or glob with placeholders, or a query.

A source is stored with its schedule, as JSON: `{"path": "/data/{{ scheduled_for | date }}.jsonl"}`
or `{"sql": "SELECT …", "database": "WAREHOUSE_URL"}` (see `producer/inputs/query.py`).
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from nightherd.errors import InputError, UsageError
from producer.inputs.moment import Moment, fill
from producer.inputs.reader import (
    CustomIds,
    Part,
    Reader,
    ReadOptions,
    Row,
    RowProblem,
    Rows,
    open_input,
)
from producer.prompts.template import one_line


def _sample() -> Moment:
    """Any moment, to try placeholders with."""
    now = datetime.now(UTC)
    return Moment(now, now - timedelta(days=1), 1)


def check_source(source: Mapping[str, Any]) -> None:
    """What can be known of a source before it is read; raises `UsageError`."""
    if "sql" in source:
        from producer.inputs.query import check_query

        check_query(source["sql"], source["database"])
        return
    path = fill(source["path"], _sample(), "INPUT")
    if path == "-":
        raise UsageError("INPUT - is standard input, which cannot be read again; give a file")
    if not path:
        raise UsageError("INPUT is empty; give a path or a glob")


def open_source(
    source: Mapping[str, Any], moment: Moment, options: ReadOptions
) -> AbstractContextManager[tuple[Rows, str]]:
    """The rows of a source at this moment, and its name for messages.

    Rows are read while they are iterated, in constant memory. Raises `InputError` in one line for
    what cannot be opened, then or while iterating.
    """
    if "sql" in source:
        from producer.inputs.query import open_query

        return open_query(source["sql"], source["database"], moment, options)
    return _open_files(fill(source["path"], moment, "INPUT"), options)


@contextmanager
def _open_files(pattern: str, options: ReadOptions) -> Iterator[tuple[Rows, str]]:
    paths = _matches(pattern)
    if len(paths) == 1:
        with open_input(paths[0]) as file:
            yield Reader(file, paths[0], options), paths[0]
        return
    with closing(CustomIds()) as ids:
        yield _one_after_another(paths, options, ids), f"{pattern} ({len(paths)} files)"


def _matches(pattern: str) -> list[str]:
    """The files of a pattern in their order; the path itself where one is called so."""
    try:
        if os.path.lexists(pattern):
            return [pattern]
        found = sorted(glob.glob(pattern, recursive=True))
    except (OSError, ValueError) as error:
        raise InputError(one_line(f"{pattern} cannot be read: {error}")) from None
    if not found:
        nothing = "no file matches" if glob.has_magic(pattern) else "no such file"
        raise InputError(one_line(f"{pattern}: {nothing}"))
    for path in found:
        # All before the first is read: one that is no file would be found after an hour.
        if os.path.isdir(path):
            raise InputError(one_line(f"{path} is a folder; give a pattern that matches files"))
        if not os.access(path, os.R_OK):
            raise InputError(one_line(f"{path} cannot be read: Permission denied"))
    return found


def _one_after_another(
    paths: list[str], options: ReadOptions, ids: CustomIds
) -> Iterator[Row | RowProblem]:
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    for path in paths:
        name = os.path.relpath(path, folder) if folder else path
        with open_input(path) as file:
            part = Part(f"{one_line(name, 200)} line", ids)
            yield from Reader(file, path, options, part=part)
