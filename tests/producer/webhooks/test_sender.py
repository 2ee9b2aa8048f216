"""One attempt: its signature, the addresses that it may go to, a resolver that hangs."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from producer.webhooks import sender as webhook_sender
from producer.webhooks.sender import Sender, SendError, is_public, secret_key, sign
from tests.receiver import SECRET, Receiver, receiver


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as started:
        yield started


def test_the_example_of_the_standards_libraries() -> None:
    """The vector of the test suites of standard-webhooks' own libraries."""
    key = secret_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    assert key == base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


# Where it connects to.


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("64:ff9b::5db8:d70e", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),  # noqa: S104 - refused
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::127.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:a00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def resolver(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """A fake of the system's resolver: its answers in turn. Returns the list of names it got.

    Addresses resolve to themselves, as ever.
    """
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def fake(host: str, port: int, *more: Any, **given: Any) -> Any:
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(host)
            return real(host, port, *more, **given)
        looked_up.append(host)
        found = answers[min(len(looked_up), len(answers)) - 1]
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, 1, 6, "", (one, port))
            for one in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", fake)
    return looked_up


def sender(*, allow_private: bool = False, timeout: float = 5.0) -> Sender:
    return Sender(SECRET, timeout=timeout, allow_private=allow_private)


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["fe80::1"],
        ["::ffff:127.0.0.1"],
        ["93.184.215.14", "127.0.0.1"],
    ],
    ids=str,
)
def test_a_name_with_a_private_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, hook: Receiver, addresses: list[str]
) -> None:
    resolver(monkeypatch, addresses)
    with pytest.raises(SendError, match=r"hooks\.example is at \S+, which is not public"):
        sender().send(f"http://hooks.example:{hook.port}/", "id", b"{}")
    assert not hook.received


def test_a_name_that_means_another_address_the_second_time(
    monkeypatch: pytest.MonkeyPatch, hook: Receiver
) -> None:
    """DNS rebinding: public when it is looked at, this machine when it is connected to."""
    looked_up = resolver(monkeypatch, ["192.0.0.9"], ["127.0.0.1"])
    connected: list[Any] = []

    def connect(address: Any, *_more: Any, **_given: Any) -> Any:
        connected.append(address[0])
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(SendError, match="nobody there"):
        sender().send(f"http://hooks.example:{hook.port}/", "id", b"{}")
    assert connected == ["192.0.0.9"], "the address that was looked at, not the name"
    assert looked_up == ["hooks.example"], "it was resolved once"
    assert not hook.received


def test_the_name_is_in_the_request_and_the_next_address_is_tried(
    monkeypatch: pytest.MonkeyPatch, hook: Receiver
) -> None:
    resolver(monkeypatch, ["127.0.0.2", "127.0.0.1"])
    url = f"http://hooks.example:{hook.port}/"
    assert sender(allow_private=True).send(url, "id", b"{}") == 204
    assert hook.received[0].headers["host"] == f"hooks.example:{hook.port}"


def test_tls_is_verified_by_the_hosts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver(monkeypatch, ["127.0.0.1"])
    names: list[str | None] = []

    def wrap_socket(_self: ssl.SSLContext, sock: Any, server_hostname: str | None = None) -> Any:
        names.append(server_hostname)
        sock.close()
        raise ssl.SSLCertVerificationError("certificate verify failed")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap_socket)
    attempt = sender(allow_private=True)
    assert attempt._tls.check_hostname
    assert attempt._tls.verify_mode == ssl.CERT_REQUIRED
    with receiver() as hook, pytest.raises(SendError, match="certificate verify failed"):
        attempt.send(f"https://hooks.example:{hook.port}/", "id", b"{}")
    assert names == ["hooks.example"]


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_given: Any, **_more: Any) -> Any:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(SendError, match=r"the name hooks\.example cannot be resolved"):
        sender().send("http://hooks.example/", "id", b"{}")


def test_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(webhook_sender.socket, "getaddrinfo", lambda *_a, **_b: over.wait(60))
    began = time.monotonic()
    with pytest.raises(SendError, match="not resolved in time"):
        sender(timeout=0.2).send("http://hooks.example/", "id", b"{}")
    over.set()
    assert time.monotonic() - began < 3
