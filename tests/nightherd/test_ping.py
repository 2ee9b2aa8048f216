"""Asking a broker whether it is there, and what the user is told if it is not."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from nightherd.broker import ping
from nightherd.errors import BrokerError
from tests.nightherd.brokers import one_line


def ping_error(url: str, timeout: float = 1.0) -> str:
    started = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        ping(url, timeout)
    assert time.monotonic() - started < timeout + 1
    message = one_line(caught.value)
    assert "hunter2" not in message
    assert "NIGHTHERD_BROKER_URL" in message
    assert caught.value.__cause__ is None
    return message


def test_ping_refused() -> None:
    with socket.socket() as bound:  # bound and not listening: nobody else gets the port
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        message = ping_error(f"redis://:hunter2@127.0.0.1:{port}/0")
    assert f"redis://:***@127.0.0.1:{port}/0" in message
    assert "refused" in message


def test_ping_no_such_socket(tmp_path: Path) -> None:
    message = ping_error(f"redis+socket://:hunter2@{tmp_path}/none.sock?virtual_host=0")
    assert "No such file" in message


def test_ping_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        assert "no answer for 0.2 s" in ping_error(f"redis://:hunter2@127.0.0.1:{port}/0", 0.2)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:12/hunter2@127.0.0.1/0",
        "redis://:hunter2/12@127.0.0.1/0",
        "redis://:12#hunter2@127.0.0.1/0",
        "redis://:12?hunter2@127.0.0.1/0",
        "redis://127.0.0.1:1/0?password=hunter2",
        "redis://127.0.0.1:1/0?hunter2=1",
        "redis://:hunter2@127.0.0.1:port/0",
        "redis://:hunter2@[::1/0",
        "redis+socket:///x?virtual_host=hunter2",
        "amqp://:hunter2@127.0.0.1/0",
        "hunter2",
    ],
)
def test_ping_unreadable_url(url: str) -> None:
    assert "cannot be read" in ping_error(url)


def test_ping_takes_kombus_names_of_certificate_checks() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        assert "refused" in ping_error(f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=CERT_REQUIRED")
