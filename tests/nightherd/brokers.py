"""Embedded brokers from outside: their servers, their data, other processes that use them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import redis

from nightherd.broker import EmbeddedBroker

ROOT = Path(__file__).parents[2]
USER = """
import sys
from pathlib import Path
from nightherd.broker import EmbeddedBroker
sys.stdin.readline()
with EmbeddedBroker(Path(sys.argv[1])).use():
    print("in", flush=True)
    sys.stdin.readline()
print("out", flush=True)
"""
"""Goes in at the first line that it is sent, out at the second."""


def poll(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def server_pids(folder: Path) -> list[int]:
    """The processes that run in this folder; read from /proc, for which a zombie has none."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(entry / "cwd") == str(folder):
                    pids.append(int(entry.name))
    return pids


def none_left(folder: Path) -> bool:
    """Polls: a process closes its connections an instant before it has left its folder."""
    with contextlib.suppress(AssertionError):
        poll(lambda: server_pids(folder) == [], 2.0)
    return server_pids(folder) == []


def client(broker: EmbeddedBroker) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(broker.socket_path), decode_responses=True)


def put(broker: EmbeddedBroker, key: str, value: str) -> None:
    with client(broker) as connection:
        connection.set(key, value)


def get(broker: EmbeddedBroker, key: str) -> str | None:
    with client(broker) as connection:
        value: str | None = connection.get(key)
        return value


def info(broker: EmbeddedBroker) -> dict[str, str | int]:
    with client(broker) as connection:
        found: dict[str, str | int] = connection.info("server")
        return found


def run_id(broker: EmbeddedBroker) -> str | int:
    return info(broker)["run_id"]


def kill_server(broker: EmbeddedBroker) -> None:
    os.kill(int(info(broker)["process_id"]), signal.SIGKILL)
    poll(lambda: not broker.is_alive())


@contextlib.contextmanager
def python(script: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs the script on this home; killed at the end, if it lives so long."""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(home)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def one_line(message: object) -> str:
    assert "\n" not in str(message)
    return str(message)
