"""One attempt at a webhook: signed, to an address that was looked at, within a time limit.

The signature is that of Standard Webhooks (https://www.standardwebhooks.com). A URL is given by a
user, and this process may stand where others cannot: so the name is resolved once, every address
that it has must be public, and the connection goes to one of these addresses, not to the name,
which might mean another a moment later. Redirects are not followed, answers not read.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpcore2

from nightherd import __version__

_PREFIX = "whsec_"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_OLD_IPV4 = ipaddress.ip_network("::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class SendError(Exception):
    """No answer came; the message says why, without the URL."""


def secret_key(secret: str) -> bytes:
    """The key of a secret: `whsec_` and base64, as the libraries have it, else the text itself."""
    if secret.startswith(_PREFIX):
        return base64.b64decode(secret.removeprefix(_PREFIX))
    return secret.encode()


def sign(key: bytes, webhook_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`."""
    signed = b".".join((webhook_id.encode(), str(timestamp).encode(), body))
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def is_public(address: str) -> bool:
    """Whether an address is global, and so is an IPv4 address that it may embed."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return all(_is_global(one) for one in _destinations(ip))


def _destinations(ip: Address) -> Iterator[Address]:
    """The addresses that a packet to this one may reach: itself, or an IPv4 one that it embeds."""
    if isinstance(ip, ipaddress.IPv4Address):
        yield ip
    elif ip.ipv4_mapped is not None:
        yield ip.ipv4_mapped
    elif ip in _NAT64:
        yield ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    else:
        yield ip
        if ip.sixtofour is not None:
            yield ip.sixtofour
        if ip.teredo is not None:
            yield from ip.teredo
        if ip in _OLD_IPV4:
            yield ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)


def _is_global(ip: Address) -> bool:
    site_local = isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local
    return ip.is_global and not (ip.is_multicast or ip.is_unspecified or site_local)


class Sender:
    """Makes attempts; any number of threads may use it at once."""

    def __init__(self, secret: str, *, timeout: float, allow_private: bool) -> None:
        self._key = secret_key(secret)
        self._timeout = timeout
        self._allow_private = allow_private
        self._tls = ssl.create_default_context()

    def send(self, url: str, webhook_id: str, body: bytes) -> int:
        """Posts the body and returns the status of the answer; raises `SendError` if none came.

        All of it, from the look-up of the name to the head of the answer, takes `timeout` seconds
        at most.
        """
        timestamp = int(time.time())
        headers: dict[bytes | str, bytes | str] = {
            "content-type": "application/json",
            "user-agent": f"nightherd/{__version__}",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._key, webhook_id, timestamp, body),
        }
        backend = _CheckedBackend(_Deadline(self._timeout), allow_private=self._allow_private)
        try:
            with (
                httpcore2.ConnectionPool(
                    max_connections=1, ssl_context=self._tls, network_backend=backend
                ) as pool,
                pool.stream("POST", url, headers=headers, content=body) as answer,
            ):
                return int(answer.status)
        except httpcore2.TimeoutException:
            raise SendError(f"no answer within {self._timeout:g} s") from None
        except (
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            httpcore2.UnsupportedProtocol,
            OSError,
            ValueError,
        ) as error:
            raise SendError(f"{type(error).__name__}: {error}".removesuffix(": ")) from None


class _Deadline:
    """When an attempt must end, however many steps it has."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds; raises the time-out when none are left."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout
        return left


class _Stream(httpcore2.NetworkStream):
    """A stream whose every step ends with the attempt, whatever time-out it is given."""

    def __init__(self, inner: httpcore2.NetworkStream, deadline: _Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._deadline.left())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        left = self._deadline.left()
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _CheckedBackend(httpcore2.NetworkBackend):
    """Connects to addresses that were looked at, and to nothing else."""

    def __init__(self, deadline: _Deadline, *, allow_private: bool) -> None:
        self._deadline = deadline
        self._allow_private = allow_private
        self._inner = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = _resolve(host, port, self._deadline)
        if not self._allow_private:
            # One bad address is enough: which one is tried first is the name's owner's choice.
            for address in addresses:
                if not is_public(address):
                    raise SendError(
                        f"{host} is at {address}, which is not public; "
                        "NIGHTHERD_WEBHOOK_ALLOW_PRIVATE=true allows it"
                    )
        for number, address in enumerate(addresses, 1):
            try:
                inner = self._inner.connect_tcp(address, port, self._deadline.left())
            except httpcore2.ConnectError:
                if number == len(addresses):
                    raise
            else:
                return _Stream(inner, self._deadline)
        raise SendError(f"{host} has no address")


def _resolve(host: str, port: int, deadline: _Deadline) -> list[str]:
    """The addresses of a host, in the system's order."""
    answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    # A resolver takes no time limit, and may take minutes.
    threading.Thread(target=look_up, name="resolver", daemon=True).start()
    try:
        found = answers.get(timeout=deadline.left())
    except queue.Empty:
        raise SendError(f"the name {host} was not resolved in time") from None
    if isinstance(found, Exception):
        raise SendError(f"the name {host} cannot be resolved: {found}")
    return list(dict.fromkeys(str(one[4][0]) for one in found))
