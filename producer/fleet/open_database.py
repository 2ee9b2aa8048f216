"""Opens the configured database, with its schema made sure of."""

from __future__ import annotations

from migrations import schema
from models.database import Database
from nightherd.errors import DatabaseError
from nightherd.settings import Settings


def open_database(settings: Settings, *, pool_size: int = 3) -> Database:
    """The database of the settings, ready to use.

    Makes the data folder (mode 700) and the SQLite schema if they are not there. Raises
    `DatabaseError` or `SchemaError` in one line.
    """
    if settings.database_url is None:
        try:
            settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DatabaseError(
                f"cannot make the data folder {settings.home}: {error.strerror}; set NIGHTHERD_HOME"
            ) from error
    database = Database(
        settings.resolved_database_url(),
        pool_size=pool_size,
        patience=settings.database_patience,
    )
    schema.ensure_schema(database)
    return database
