"""Fault 16: `submit` is killed with -9 at each of its statements; and what it does to workers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update

from models.base import db_now
from models.database import Database
from models.job import Chunk, Job, Request
from models.store import leases
from models.store.chunks import Claim
from nightherd.settings import Settings
from producer.fleet.housekeeping import ORPHAN_SECONDS, Housekeeper
from producer.inputs.reader import Row
from producer.jobs.create import JobOptions, SubmittedJob, submit
from producer.jobs.status import job_views
from tests.commands.invoking import CommandLine, environment
from tests.faults.killing import kills, url_of, wait_for_rollback
from tests.seeding import (
    KEY,
    check_sums,
    claim,
    job,
    make_job,
    make_worker,
    save,
    try_claim,
    work_off,
)

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
    """A tick once the orphan is old enough; how many rows it removed."""
    with database.write() as connection:
        connection.execute(update(Job).values(touched_at=db_now(-ORPHAN_SECONDS - 1)))
        connection.exec_driver_sql("UPDATE sweeps SET last_at = '2000-01-01 00:00:00.000000'")
    dispatcher: Any = SimpleNamespace(top_up=lambda key: 0)
    return Housekeeper(database, dispatcher, settings).tick().orphan_rows


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
        wait_for_rollback(database)
        found = _visible(database)
        if not found:
            ends.add("absent")
            assert try_claim(database, worker) == "nothing", point
            left = sum(_count(database).values())
            # What is left does no harm, and is removed.
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


# Beside a worker, on SQLite with its one writer.


class _Stopwatch:
    """Does something again and again in a thread, and keeps the longest time that it took."""

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        self.longest = 0.0
        self.count = 0
        self._work = work
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.05):  # more often than any worker
                started = time.monotonic()
                self._work()
                self.longest = max(self.longest, time.monotonic() - started)
                self.count += 1
        except BaseException as error:
            self._error = error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert self._error is None, self._error


@pytest.mark.parametrize(
    "count",
    [
        50_000,
        pytest.param(1_000_000, marks=[pytest.mark.faults, pytest.mark.timeout(900)]),
    ],
)
def test_submitting_many_rows_stalls_no_worker(
    sqlite_database: Database, tmp_path: Path, count: int
) -> None:
    """A worker claims, saves and renews all the while, and waits at most 2 s for any of it."""
    path = tmp_path / "prompts.jsonl"
    with path.open("w") as file:
        for number in range(count):
            filler = f"{number} little foxes " * 10
            file.write(f'{{"prompt": "Once upon a time, {filler}", "custom_id": "{number}"}}\n')
    make_job(sqlite_database, 60_000, chunk_size=1)
    worker = make_worker(sqlite_database)
    held: queue.SimpleQueue[Claim] = queue.SimpleQueue()

    def claim_one() -> None:
        if held.qsize() < 4:
            held.put(claim(sqlite_database, worker))

    def save_one() -> None:
        if not held.empty():
            save(sqlite_database, worker, held.get())

    def renew() -> None:
        with sqlite_database.write() as connection:
            assert leases.renew(connection, worker, lease_seconds=3600, state="ready")

    nightherd = CommandLine(environment(tmp_path, database_url=url_of(sqlite_database)), tmp_path)
    watches = {
        name: _Stopwatch(name, work)
        for name, work in (("claim", claim_one), ("save", save_one), ("renew", renew))
    }
    started = time.monotonic()
    outcome = nightherd("submit", path, "--checkpoint", "fakes/bytes@main", seconds=600)
    took = time.monotonic() - started
    for watch in watches.values():
        watch.stop()
    assert outcome.code == 0, outcome
    stored = job(sqlite_database, outcome.out.strip())
    assert (stored.state, stored.total_requests) == ("queued", count)
    longest = {name: round(watch.longest, 2) for name, watch in watches.items()}
    done = {name: watch.count for name, watch in watches.items()}
    print(f"{count} rows in {took:.1f} s; longest {longest}, done {done}")
    assert all(number > 10 for number in done.values()), done
    assert max(longest.values()) < 2, longest
