"""What the user is told of a database that cannot be used."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from sqlalchemy import make_url, select

from models.database import Database, explain
from nightherd.errors import DatabaseError, SettingsError
from tests.models.test_database import with_state, wrapped


def refusal(url: str) -> str:
    database = Database(url)
    with pytest.raises(DatabaseError) as failure:
        database.retrying(lambda c: c.execute(select(1)), patience=0)
    database.close()
    message = str(failure.value)
    assert "\n" not in message
    assert "s3cret" not in message
    return message


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = refusal(f"postgresql+psycopg://bob:s3cret@127.0.0.1:{port}/db")
    assert f"bob:***@127.0.0.1:{port}/db" in message
    assert "Connection refused" in message
    assert "NIGHTHERD_DATABASE_URL" in message


def test_a_database_that_is_not_there(postgresql: str) -> None:
    url = make_url(postgresql).set(database="nosuch").render_as_string(hide_password=False)
    assert 'database "nosuch" does not exist' in refusal(url)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "unable to open database file" in refusal(f"sqlite:///{tmp_path}/no/such/folder.db")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "noise.db"
    path.write_bytes(b"this is no database at all, but it is long enough to look at" * 100)
    assert "file is not a database" in refusal(f"sqlite:///{path}")


def test_neither_statement_nor_values_are_told() -> None:
    error = explain(
        wrapped(with_state("57P01", "terminated\nLINE 1: SELECT s3cret")), make_url("sqlite:///x")
    )
    assert "secret" not in str(error)
    assert "terminated" in str(error)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "is no URL"),
        ("postgresql://bob:s3cret@host:port/db", "is no URL"),
        ("mysql://bob:s3cret@host/db", "'mysql' is not supported"),
        ("postgresql+nosuchdriver://bob:s3cret@host/db", "nosuchdriver"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
    ],
)
def test_urls_that_cannot_be_used(url: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as refused:
        Database(url)
    assert "s3cret" not in str(refused.value)
