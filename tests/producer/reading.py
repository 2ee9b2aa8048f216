"""Reads a few rows from memory, for the tests of readers and rows."""

from __future__ import annotations

import io
import json
from typing import Any

from producer.readers import Format, Reader, ReadOptions, Row, RowProblem
from producer.tasks import make_builder

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


def one(row: object, **options: Any) -> Row:
    (got,) = read(json.dumps(row), **options)
    assert isinstance(got, Row), str(got)
    return got


def problem(row: object, **options: Any) -> str:
    (got,) = read(row if isinstance(row, str) else json.dumps(row), **options)
    assert isinstance(got, RowProblem), str(got)
    assert got.line == 1
    return got.message
