"""`nightherd db`: the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from producer.commands.common import notice

if TYPE_CHECKING:
    from models.database import Database


@click.group()
def db() -> None:
    """Upgrade and check the database's schema.

    \b
    Example:
      nightherd db upgrade
    """


def _open() -> Database:
    from models.database import Database
    from nightherd.settings import load_settings

    return Database(load_settings().resolved_database_url())


@db.command()
def upgrade() -> None:
    """Bring the schema to this program's version.

    Safe to run from many places at once. SQLite databases are upgraded by themselves;
    PostgreSQL ones only by this command.

    \b
    Example:
      NIGHTHERD_DATABASE_URL=postgresql://me@db/nightherd nightherd db upgrade
    """
    from migrations import schema
    from models import SCHEMA_REVISION

    database = _open()
    schema.upgrade(database)
    notice(f"the schema is at {SCHEMA_REVISION}")


@db.command()
def current() -> None:
    """Print the schema's version, or `none`.

    \b
    Example:
      nightherd db current
    """
    from migrations import schema

    click.echo(schema.current_revision(_open()) or "none")


@db.command()
def check() -> None:
    """Check the schema, table by table; exit 4 if it differs.

    \b
    Example:
      nightherd db check
    """
    from migrations import schema
    from models import SCHEMA_REVISION
    from nightherd.errors import SchemaError

    database = _open()
    revision = schema.current_revision(database)
    if revision != SCHEMA_REVISION:
        raise SchemaError(
            f"the schema is at {revision or 'none'}, this program needs {SCHEMA_REVISION}; "
            "run: nightherd db upgrade"
        )
    different = schema.differences(database)
    if different:
        raise SchemaError(f"the tables differ from the models: {'; '.join(different)}")
    click.echo(f"ok, {revision}")


@db.command()
def path() -> None:
    """Print where the database is, without its password.

    \b
    Example:
      nightherd db path
    """
    url = _open().url
    click.echo(url.database if url.get_backend_name() == "sqlite" else url.render_as_string())
