"""Fault 16: `submit` is killed with -9 at each of its statements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update

from models.base import db_now
from models.database import Database
from models.job import Chunk, Job, Request
from nightherd.settings import Settings
from producer.housekeeping import ORPHAN_SECONDS, Housekeeper
from producer.readers import Row
from producer.status import job_views
from producer.submit import JobOptions, SubmittedJob, submit
from tests.faults.killing import kills, settle, url_of
from tests.seeding import KEY, check_sums, job, make_worker, try_claim, work_off

MakeSettings = Callable[..., Settings]
ROWS = 10
COPIED = "psycopg:Copy.write_row"
"""COPY goes past SQLAlchemy, so its rows are points of their own."""


def _submit(database: Database, home: Path) -> SubmittedJob:
    settings = Settings.model_validate({"home": home, "store_batch": 4, "chunk_size": 3})
    rows = [Row(i + 1, {"prompt": f"p{i}"}, None, f"id-{i}") for i in range(ROWS)]
    return submit(database, settings, rows, JobOptions(checkpoint_key=KEY))


def submit_in_child(url: str, home: str) -> None:
    _submit(Database(url), Path(home))


def _count(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {
            table.__tablename__: connection.execute(
                select(func.count()).select_from(table)
            ).scalar_one()
            for table in (Job, Request, Chunk)
        }


NOTHING = {"jobs": 0, "requests": 0, "chunks": 0}
ONE_JOB = {"jobs": 1, "requests": ROWS, "chunks": 4}


def _visible(database: Database) -> list[str]:
    with database.read() as connection:
        return [view.id for view in job_views(connection)]


def _tick_later(database: Database, settings: Settings) -> int:
    """The tick that comes when the orphan has stood still for long enough; how much it removed."""
    with database.write() as connection:
        connection.execute(update(Job).values(touched_at=db_now(-ORPHAN_SECONDS - 1)))
        connection.exec_driver_sql("UPDATE sweeps SET last_at = '2000-01-01 00:00:00.000000'")
    bells: Any = SimpleNamespace(top_up=lambda key: 0)
    return Housekeeper(database, bells, settings).tick().orphan_rows


@pytest.fixture
def worker(database: Database) -> str:
    return make_worker(database)


def test_producer_kill9_at_every_statement_of_submit(
    database: Database, worker: str, tmp_path: Path, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    ends = set()
    points = 0
    home = str(tmp_path / "home")
    for point in kills(submit_in_child, url_of(database), home, also=[COPIED]):
        points += 1
        settle(database)
        found = _visible(database)
        if not found:
            ends.add("absent")
            assert try_claim(database, worker) == "nothing", point
            left = sum(_count(database).values())
            # What is left stands in nobody's way, and goes.
            again = _submit(database, tmp_path)
            assert _visible(database) == [again.id], point
            assert _tick_later(database, settings) == left, point
            assert _count(database) == ONE_JOB, point
            _remove(database, again.id)
            assert _count(database) == NOTHING, point
        else:
            ends.add("whole")
            assert _count(database) == ONE_JOB, point
            assert _tick_later(database, settings) == 0, point
            (whole,) = found
            work_off(database, worker)
            assert job(database, whole).state == "completed", point
            assert check_sums(database, whole)["done"] == ROWS, point
            _remove(database, whole)
    # And the one that survived.
    assert len(_visible(database)) == 1
    assert _count(database) == ONE_JOB
    assert ends == {"absent", "whole"}
    assert points > 25


def _remove(database: Database, job_id: str) -> None:
    with database.write() as connection:
        connection.execute(delete(Job).where(Job.id == job_id))
