"""How fast a beat fires schedules that are due at once; prints a table line and one JSON line.

`python -P benchmarks/schedules.py [--schedules 10000] [--rows 1] [--database-url URL]`; by default
on a new SQLite file in the temporary folder. The firings are those of `nightherd beat`: a claim,
the input read and checked, the job stored, and a last transaction.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select

from migrations import schema
from models.database import Database
from models.job import Job
from models.schedule import Firing
from models.store import schedules
from nightherd.settings import Settings
from producer.commands.schedules.add_edit import add
from producer.schedules.definition import make_options
from producer.schedules.firing_loop import FiringLoop

DUE = datetime(2026, 1, 5, 2, 0, tzinfo=UTC)


def default_options() -> dict[str, Any]:
    """The options of `schedule add` where none is given."""
    context = add.make_context("add", ["bench", "-", "--cron", "0 2 * * *"])
    own = ("name", "input", "cron", "timezone", "input_sql", "input_database", "concurrency")
    given = {name: value for name, value in context.params.items() if name not in own}
    more = {"deadline_seconds": None, "not_before_seconds": None, "submitted_by": None}
    return make_options({**given, **more})


def fill(database: Database, count: int, path: Path) -> None:
    options = default_options()

    def insert(connection: Connection) -> None:
        for number in range(count):
            new = schedules.NewSchedule(
                name=f"bench-{number}",
                cron="0 2 * * *",
                timezone="Europe/Berlin",
                input={"path": str(path)},
                options=options,
                concurrency="forbid",
                misfire="coalesce",
                starting_deadline_seconds=None,
                keep_succeeded=None,
                keep_failed=None,
                paused=False,
                next_at=DUE,
            )
            schedules.add(connection, new)

    database.retrying(insert)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="a beat has two")
    parser.add_argument("--database-url")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="nightherd-bench-") as folder:
        path = Path(folder) / "in.jsonl"
        path.write_text('{"prompt": "Once upon a time"}\n' * given.rows)
        url = given.database_url or f"sqlite:///{folder}/bench.db"
        database = Database(url, pool_size=1 + 2 * given.threads)
        schema.upgrade(database)
        fill(database, given.schedules, path)
        settings = Settings.model_validate({"home": folder})
        beats = [
            FiringLoop(database, settings, clock=lambda connection: DUE)
            for _ in range(given.threads)
        ]
        began, cpu = time.monotonic(), time.process_time()
        with ThreadPoolExecutor(given.threads) as pool:
            fired_ids = [
                one.firing_id
                for report in pool.map(lambda beat: beat.round(), beats)
                for one in report.fired
            ]
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        idle = time.monotonic()
        beats[0].round()
        idle = time.monotonic() - idle
        for beat in beats:
            beat.close()
        with database.read() as connection:
            live = connection.execute(
                select(func.count()).select_from(Job).where(Job.state == "queued")
            ).scalar_one()
            fired = connection.execute(
                select(func.count()).select_from(Firing).where(Firing.state == "submitted")
            ).scalar_one()
        assert len(set(fired_ids)) == live == fired == given.schedules  # noqa: S101
        dialect = database.dialect
        database.close()
    each = 1000 * seconds / given.schedules
    print(
        f"{dialect}: {fired:,} firings of {given.rows} rows in {seconds:.1f} s, {each:.2f} ms each"
    )
    print(
        json.dumps(
            {
                "benchmark": "schedules",
                "database": dialect,
                "schedules": given.schedules,
                "rows": given.rows,
                "threads": given.threads,
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu, 2),
                "idle_round_ms": round(1000 * idle, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
