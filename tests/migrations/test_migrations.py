"""The schema's history: up, down and up again, on filled tables, by many at once."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, inspect, select, text

import models
from migrations import schema
from models import Base
from models.base import db_now
from models.database import Database
from models.job import Job
from models.schedule import Firing, Schedule
from models.store import leases, results
from models.webhook import Webhook
from nightherd.errors import DatabaseError, SchemaError
from producer.fleet.open_database import open_database
from tests.seeding import as_save, check_sums, claim, job, make_job, make_worker, result_row, save


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An open database without a schema, of each kind in turn."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        url = request.getfixturevalue("empty_postgresql")
    opened = Database(url)
    yield opened
    opened.close()


def fill(database: Database) -> str:
    """A row in every table; returns the id of a job that is half done."""
    with database.write() as connection:
        (schedule,) = connection.execute(
            insert(Schedule).values(
                name="nightly", cron="0 2 * * *", timezone="UTC", input={}, options={}
            )
        ).inserted_primary_key or (None,)
        (firing,) = connection.execute(
            insert(Firing).values(schedule_id=schedule, scheduled_for_utc=db_now(), state="claimed")
        ).inserted_primary_key or (None,)
        results.store_parameter_set(connection, "s" * 32, {"temperature": 1})
        facts: dict[str, Any] = dict.fromkeys(
            ("checkpoint_key", "tokenizer_hash", "dtype", "device", "engine"), "x"
        )
        results.store_provenance(connection, {"id": "p" * 32, "versions": {}, **facts})
    job_id = make_job(database, 8, firing_id=firing)
    with database.write() as connection:
        connection.execute(
            insert(Webhook).values(
                id="w" * 32, job_id=job_id, occasion="complete", url="https://x", state="waiting"
            )
        )
    worker = make_worker(database)
    held = claim(database, worker)
    rows = [
        {**result_row(i), "parameter_set_id": "s" * 32, "provenance_id": "p" * 32} for i in range(4)
    ]
    with database.write() as connection:
        results.save(connection, worker, [as_save(held, rows, end="done")])
    return job_id


def rows_of(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in Base.metadata.sorted_tables
        }


def tables(database: Database) -> set[str]:
    with database.read() as connection:
        return set(inspect(connection).get_table_names())


def test_up_down_up_on_filled_tables(empty_database: Database) -> None:
    database = empty_database
    assert schema.current_revision(database) is None
    for _ in range(2):
        schema.upgrade(database)
        assert schema.current_revision(database) == models.SCHEMA_REVISION
        assert schema.differences(database) == []
        job_id = fill(database)
        assert all(rows_of(database).values()), rows_of(database)
        check_sums(database, job_id)
        schema.downgrade(database, "base")
        assert tables(database) == {"alembic_version"}
        assert schema.current_revision(database) is None


def test_an_upgrade_of_what_is_up_to_date_changes_nothing(empty_database: Database) -> None:
    schema.upgrade(empty_database)
    job_id = fill(empty_database)
    before = rows_of(empty_database)
    schema.upgrade(empty_database)
    schema.ensure_schema(empty_database)
    assert rows_of(empty_database) == before
    worker = make_worker(empty_database)
    save(empty_database, worker, claim(empty_database, worker))
    assert job(empty_database, job_id).state == "completed"


def test_the_first_sweep_is_due_at_once(empty_database: Database) -> None:
    schema.upgrade(empty_database)
    with empty_database.write() as connection:
        assert leases.elect(connection, "fleet", period_seconds=3600)
        assert not leases.elect(connection, "fleet", period_seconds=3600)


def test_the_program_knows_the_newest_revision_and_no_more() -> None:
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(schema.__file__).parent))
    assert script.get_heads() == [models.SCHEMA_REVISION]
    assert len(script.get_bases()) == 1
    assert models.SCHEMA_REVISION in schema.known_revisions()


def schema_of(database: Database) -> dict[str, str]:
    """Every table, index and constraint as the database itself spells it."""
    with database.read() as connection:
        if database.dialect == "sqlite":
            query = "SELECT type || ' ' || name, sql FROM sqlite_master WHERE sql IS NOT NULL"
        else:
            query = """
                SELECT 'index ' || indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
                UNION ALL
                SELECT conrelid::regclass || ' ' || conname, pg_get_constraintdef(oid)
                FROM pg_constraint WHERE connamespace = 'public'::regnamespace
                UNION ALL
                SELECT table_name || '.' || column_name,
                       concat_ws(' ', data_type, character_maximum_length, is_nullable,
                                 column_default)
                FROM information_schema.columns WHERE table_schema = 'public'
            """
        found = {
            name: sql for name, sql in connection.execute(text(query)) if "alembic" not in name
        }
    # The order of columns and constraints within a table is nobody's concern, nor are spaces.
    return {
        name: " ".join(sorted(re.split(r",\s|\s+|[()]", sql))).strip()
        for name, sql in found.items()
    }


def test_the_migrations_make_what_the_models_say(empty_database: Database, tmp_path: Path) -> None:
    """Down to partial indexes and checks, which Alembic's own comparison does not look at."""
    database = empty_database
    schema.upgrade(database)
    migrated = schema_of(database)
    schema.downgrade(database, "base")
    with database.write() as connection:
        Base.metadata.create_all(connection)
    created = schema_of(database)
    assert created.keys() == migrated.keys()
    assert created == migrated


def test_names_follow_the_convention(empty_database: Database) -> None:
    schema.upgrade(empty_database)
    with empty_database.read() as connection:
        inspector = inspect(connection)
        for table in Base.metadata.tables:
            names = [inspector.get_pk_constraint(table)["name"]]
            assert names == [f"pk_{table}"]
            for key in inspector.get_foreign_keys(table):
                column = key["constrained_columns"][0]
                assert key["name"] == f"fk_{table}_{column}_{key['referred_table']}"
            for check in inspector.get_check_constraints(table):
                assert str(check["name"]).startswith(f"ck_{table}_")
            for index in inspector.get_indexes(table):
                assert str(index["name"]).startswith((f"ix_{table}_", f"uq_{table}_"))
            for unique in inspector.get_unique_constraints(table):
                assert unique["name"] == f"uq_{table}_{'_'.join(unique['column_names'])}"


UPGRADE = """
import sys
from migrations import schema
from models.database import Database
database = Database(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
{call}
print(schema.current_revision(database), flush=True)
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_four_processes_upgrade_at_once(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On SQLite as the first commands after an installation do, on a file that is not there yet."""
    if kind == "sqlite":
        url, call = (
            f"sqlite:///{tmp_path / 'new' / 'nightherd.db'}",
            "schema.ensure_schema(database)",
        )
        (tmp_path / "new").mkdir()
    else:
        url, call = request.getfixturevalue("empty_postgresql"), "schema.upgrade(database)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", UPGRADE.format(call=call), url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, f"{models.SCHEMA_REVISION}\n", "")
    database = Database(url)
    assert schema.differences(database) == []
    database.close()


# What other commands say of a schema that is not theirs.


def set_revision(database: Database, revision: str) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})


def test_a_newer_schema_is_refused_and_left_alone(empty_database: Database) -> None:
    schema.upgrade(empty_database)
    fill(empty_database)
    set_revision(empty_database, "9999")
    with pytest.raises(SchemaError, match=r"'9999' is newer .*upgrade nightherd"):
        schema.ensure_schema(empty_database)
    assert schema.current_revision(empty_database) == "9999"
    assert rows_of(empty_database)["jobs"] == 1


def test_postgresql_waits_for_its_owner(empty_postgresql: str) -> None:
    database = Database(empty_postgresql)
    with pytest.raises(SchemaError, match="no schema yet; run: nightherd db upgrade"):
        schema.ensure_schema(database)
    assert tables(database) == set()
    schema.upgrade(database)
    schema.ensure_schema(database)
    database.close()


def test_sqlite_is_made_by_itself(make_settings: Any) -> None:
    settings = make_settings()
    database = open_database(settings)
    assert settings.home.stat().st_mode & 0o777 == 0o700
    assert schema.current_revision(database) == models.SCHEMA_REVISION
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(Job)).scalar_one() == 0
    database.close()
    open_database(settings).close()


def test_folders_and_files_that_cannot_be_made(tmp_path: Path, make_settings: Any) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(DatabaseError, match="cannot make the data folder"):
        open_database(make_settings(home=blocked / "home"))
    database = Database(f"sqlite:///{blocked}/nightherd.db")
    with pytest.raises(DatabaseError, match="NIGHTHERD_DATABASE_URL"):
        schema.upgrade(database)
    (tmp_path / "a.db.migrate.lock").mkdir()
    database = Database(f"sqlite:///{tmp_path}/a.db")
    with pytest.raises(DatabaseError, match=r"cannot write .*a\.db\.migrate\.lock"):
        schema.upgrade(database)


def test_a_file_that_is_no_database_is_one_line(make_settings: Any) -> None:
    settings = make_settings()
    settings.home.mkdir()
    settings.sqlite_path.write_bytes(b"noise " * 1000)
    with pytest.raises(DatabaseError, match="file is not a database"):
        open_database(settings)
