"""The `database` fixture for tests by the hundred: emptied, or copied, instead of made anew.

A `conftest.py` imports the fixtures that its folder uses.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from migrations import schema
from models.database import Database

_TABLES = ("jobs", "workers", "schedules", "parameter_sets", "provenance")
"""Deleting their rows deletes those of all other tables but `sweeps`."""


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with the whole schema, to be copied."""
    path = tmp_path_factory.mktemp("template") / "nightherd.db"
    made = Database(f"sqlite:///{path}")
    schema.upgrade(made)
    with made.engine.connect() as connection:
        connection.exec_driver_sql("ROLLBACK")
        connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]
    made.close()
    return path


@pytest.fixture(scope="session")
def common_postgresql(postgresql: str) -> Iterator[str]:
    """The URL of a database with the whole schema that the session's tests share."""
    administration = Database(postgresql)
    engine = administration.engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        # Each folder that imports this fixture has its own.
        name = f"common_{uuid.uuid4().hex}"
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = make_url(postgresql).set(database=name).render_as_string(hide_password=False)
    made = Database(url)
    schema.upgrade(made)
    made.close()
    yield url
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    administration.close()


def _empty(database: Database) -> None:
    with database.write() as connection:
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        for table in _TABLES:
            connection.execute(text(f"DELETE FROM {table}"))
        connection.execute(text("DELETE FROM sweeps WHERE name <> 'fleet'"))
        connection.execute(text("UPDATE sweeps SET last_at = '2000-01-01'"))


@pytest.fixture
def sqlite_database(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    """An open SQLite database, for what does not depend on the kind."""
    path = tmp_path / "nightherd.db"
    shutil.copy(sqlite_template, path)
    opened = Database(f"sqlite:///{path}", pool_size=10)
    yield opened
    opened.close()


@pytest.fixture
def postgresql_database(common_postgresql: str) -> Iterator[Database]:
    """An open PostgreSQL database, for what SQLite with its one writer does not know."""
    opened = Database(common_postgresql, pool_size=10)
    try:
        yield opened
    finally:
        _empty(opened)
        opened.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """An open database, SQLite and PostgreSQL in turn."""
    opened = request.getfixturevalue(f"{request.param}_database")
    assert isinstance(opened, Database)
    return opened
