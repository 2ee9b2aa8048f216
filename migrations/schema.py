"""Upgrade, current revision, check: for `nightherd db`, and for the first start on SQLite."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from models import SCHEMA_REVISION, Base
from models.database import Database, explain
from nightherd.errors import DatabaseError, SchemaError

_ADVISORY_LOCK = 0x6E69676874686572  # "nighther": one upgrade at a time on PostgreSQL
_LOCK_TIMEOUT = "10s"


def current_revision(database: Database) -> str | None:
    """The database's revision; None if it has no schema yet. Raises `DatabaseError`."""
    try:
        with database.read() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(
                text("SELECT version_num FROM alembic_version")
            ).scalar_one_or_none()
    except DBAPIError as error:
        raise explain(error, database.url) from error


def ensure_schema(database: Database) -> None:
    """Makes sure that the schema is this program's.

    On SQLite migrations run by themselves; on PostgreSQL `nightherd db upgrade` runs them, and
    anything else is a `SchemaError` with that hint. A newer schema is always an error.
    """
    revision = current_revision(database)
    if revision == SCHEMA_REVISION:
        return
    if revision is not None and revision not in known_revisions():
        raise SchemaError(
            f"the database's schema {revision!r} is newer than this program's "
            f"({SCHEMA_REVISION}); upgrade nightherd"
        )
    if database.dialect != "sqlite":
        state = "has no schema yet" if revision is None else f"has the old schema {revision}"
        raise SchemaError(f"the database {state}; run: nightherd db upgrade")
    upgrade(database)


def known_revisions() -> list[str]:
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory(_folder()).walk_revisions()]


def _folder() -> str:
    return str(Path(__file__).parent)


def _config(connection: Connection) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", _folder().replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def _exclusive_transaction(database: Database) -> Iterator[Connection]:
    """A writing transaction, while no other process upgrades or downgrades."""
    if database.dialect == "postgresql":
        with database.write() as connection:
            connection.execute(
                text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK}
            )
            connection.execute(
                text("SELECT set_config('lock_timeout', :limit, true)"), {"limit": _LOCK_TIMEOUT}
            )
            yield connection
        return
    # BEGIN IMMEDIATE alone would do, but for the switch to WAL on a new file, which cannot wait.
    path = f"{database.url.database}.migrate.lock"
    try:
        lock = open(path, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DatabaseError(
            f"cannot write {path}: {error.strerror}; make its folder writable, or set "
            "NIGHTHERD_HOME or NIGHTHERD_DATABASE_URL to another place"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with database.write() as connection:
            yield connection


def upgrade(database: Database, revision: str = "head") -> None:
    """Brings the schema to `revision`; safe to run from many processes at once."""
    from alembic import command

    _prepare_folder(database)
    try:
        with _exclusive_transaction(database) as connection:
            command.upgrade(_config(connection), revision)
    except DBAPIError as error:
        raise explain(error, database.url) from error


def downgrade(database: Database, revision: str) -> None:
    """Takes the schema back to `revision` (`base`: to nothing)."""
    from alembic import command

    try:
        with _exclusive_transaction(database) as connection:
            command.downgrade(_config(connection), revision)
    except DBAPIError as error:
        raise explain(error, database.url) from error


def differences(database: Database) -> list[str]:
    """How the database's tables differ from the models; empty when they agree."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return [str(difference) for difference in compare_metadata(context, Base.metadata)]


def _prepare_folder(database: Database) -> None:
    name = database.url.database
    if database.dialect != "sqlite" or name is None:
        return
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise DatabaseError(
            f"cannot make the folder of the database {name}: {error.strerror}; set NIGHTHERD_HOME "
            "or NIGHTHERD_DATABASE_URL to a place that can be written"
        ) from error
