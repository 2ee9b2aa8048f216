"""The databases of the producer's tests."""

from tests.quick_databases import (  # noqa: F401 - fixtures
    common_postgresql,
    database,
    postgresql_database,
    sqlite_database,
    sqlite_template,
)
