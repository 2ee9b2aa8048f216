"""Reads a few rows from memory, for the tests of readers and rows."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any

from producer.inputs.reader import Format, Reader, ReadOptions, Row, RowProblem, open_input
from producer.tasks.registry import make_builder

USER = {"role": "user", "content": "Hi"}
KEEP_HINT = "(--keep {0} keeps the column in the request's metadata, --ignore-unknown drops it)"
TEXT_HINT = "(--format text takes each line as a prompt)"


def read(
    data: str | bytes,
    name: str = "in.jsonl",
    *,
    format: Format = "auto",
    keep: tuple[str, ...] = (),
    ignore_unknown: bool = False,
    **building: Any,
) -> list[Row | RowProblem]:
    options = ReadOptions(
        format=format,
        keep=frozenset(keep),
        ignore_unknown=ignore_unknown,
        builder=make_builder(**building),
    )
    file = io.BytesIO(data.encode() if isinstance(data, str) else data)
    return list(Reader(file, name, options))


def read_file(
    path: str | os.PathLike[str], options: ReadOptions | None = None
) -> Iterator[Row | RowProblem]:
    with open_input(path) as file:
        yield from Reader(file, os.fspath(path), options)


def one(row: object, **options: Any) -> Row:
    (got,) = read(json.dumps(row), **options)
    assert isinstance(got, Row), str(got)
    return got


def problem(row: object, **options: Any) -> str:
    (got,) = read(row if isinstance(row, str) else json.dumps(row), **options)
    assert isinstance(got, RowProblem), str(got)
    assert got.line == 1
    return got.message
