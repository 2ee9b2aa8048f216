"""Where the rows of a firing come from (a stand-in: paths without much ado)."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nightherd.errors import InputError, UsageError
from producer.readers import Reader, ReadOptions, Row, RowProblem, open_input
from producer.templates import BadRowError, compile_template


@dataclass(frozen=True, slots=True)
class Moment:
    """What stands in `{{ scheduled_for }}`, `{{ firing }}` and `:previous`."""

    scheduled_for: datetime
    previous: datetime | None
    firing: int | None


def fill(text: str, moment: Moment, what: str) -> str:
    values = {
        "scheduled_for": moment.scheduled_for.isoformat(timespec="seconds"),
        "firing": 0 if moment.firing is None else moment.firing,
    }
    try:
        return compile_template(text, what).render(values)
    except BadRowError as error:
        raise UsageError(f"{what}: {error}") from None


def check_source(source: dict[str, Any]) -> None:
    if "path" in source:
        compile_template(source["path"], "the input")


@contextlib.contextmanager
def open_source(
    source: dict[str, Any], moment: Moment, options: ReadOptions
) -> Iterator[tuple[Iterable[Row | RowProblem], str]]:
    path = fill(source["path"], moment, "the input")
    found = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    if not found:
        raise InputError(f"{path}: no such file")
    with open_input(found[0]) as file:
        yield Reader(file, found[0], options), found[0]
