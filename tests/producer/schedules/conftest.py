"""A schedule's beat on a clock that the test sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models.database import Database
from nightherd.settings import Settings
from producer.schedules.firing_loop import FiringLoop
from tests.scheduling import (
    Clock,
    firing_loop,
    utc,
    write_input,
)

MakeSettings = Callable[..., Settings]


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in.jsonl")


@pytest.fixture
def clock() -> Clock:
    return Clock(utc("2026-01-05T01:59"))


@pytest.fixture
def beat(database: Database, settings: Settings, clock: Clock) -> Iterator[FiringLoop]:
    with firing_loop(database, settings, clock) as made:
        yield made
