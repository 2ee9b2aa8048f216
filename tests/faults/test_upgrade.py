"""Fault 24: a job is half done under the schema of before; new workers finish it under this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alembic.script import ScriptDirectory
from sqlalchemy import insert, select, text

import models
from migrations import schema
from models import Base
from models.database import Database
from models.store import jobs
from nightherd.settings import Settings
from tests.conftest import wait_until
from tests.seeding import die
from tests.worker.harness import open_harness, store_job

MakeSettings = Callable[..., Settings]
Rows = dict[str, list[dict[str, Any]]]

PROMPTS = [f"prompt {number}" for number in range(16)]
TOO_LONG = [5, 8, 9]
for number in TOO_LONG:
    PROMPTS[number] = "longer than the first worker's context " * 10


def _revision_before() -> str | None:
    """The revision before the newest; None while there is but one."""
    script = ScriptDirectory(schema._folder()).get_revision(models.SCHEMA_REVISION)
    assert script is not None
    before = script.down_revision
    assert before is None or isinstance(before, str)
    return before


def _dump(database: Database) -> Rows:
    with database.read() as connection:
        return {
            table.name: [
                {column.key: row._mapping[column] for column in table.columns}
                for row in connection.execute(select(table))
            ]
            for table in Base.metadata.sorted_tables
        }


def _load(database: Database, rows: Rows) -> None:
    with database.write() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())
        for table in Base.metadata.sorted_tables:
            if rows[table.name]:
                connection.execute(insert(table), rows[table.name])
        if database.dialect == "postgresql":
            connection.execute(
                text("SELECT setval(pg_get_serial_sequence('chunks', 'id'), max(id)) FROM chunks")
            )


def test_upgrade_of_a_job_that_is_half_done(
    database: Database, make_settings: MakeSettings
) -> None:
    """Down and up again on filled tables; where down leaves no table, the rows come from a dump."""
    settings = make_settings()
    job = store_job(database, PROMPTS)
    with open_harness(database, settings) as harness:
        assert [harness.wake().result(20) for _ in range(2)] == ["done"] * 2
        # Of the third chunk two have their answer, and then it dies.
        harness.engine.hang()
        wake = harness.wake()
        wait_until(lambda: harness.chunks(job)[2].failed == 2, what="half a chunk")
        worker = harness.identity.id
        harness.inflight.abort_all(lost=True)
        wake.result(20)
    dumped = _dump(database)
    before = _revision_before()
    schema.downgrade(database, before or "base")
    assert schema.current_revision(database) == before
    schema.upgrade(database)
    assert schema.current_revision(database) == models.SCHEMA_REVISION
    if before is None:
        _load(database, dumped)
    assert _dump(database) == dumped

    die(database, worker)
    with open_harness(database, settings, context_length=1024) as successor:
        states = [(chunk.state, chunk.deaths) for chunk in successor.chunks(job)]
        assert states == [("done", 0), ("done", 0), ("queued", 1), ("queued", 0)]
        successor.work_off()
        assert successor.engine.added == 6, "what was done is not computed again"
        assert successor.job_state(job) == "completed"
        assert [row.number for row in successor.results(job) if row.error_code] == TOO_LONG
        # New chunks can be made, too.
        assert database.retrying(lambda c: jobs.retry(c, job, only_code=None, chunk_size=4)) == 3
        successor.work_off()
        assert len(successor.chunks(job)) == 5
        successor.check_complete(job, PROMPTS)
