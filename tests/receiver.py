"""A receiver of webhooks: a real HTTP server on this machine, which notes what comes."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "a secret of the tests, long enough"
Behaviour = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """One request, as it came."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def body(self) -> dict[str, Any]:
        got: dict[str, Any] = json.loads(self.raw)
        return got

    def is_signed(self, secret: str = SECRET) -> bool:
        """By a computation of the test's own, from the words of the standard."""
        content = f"{self.id}.{self.headers['webhook-timestamp']}.".encode() + self.raw
        mac = hmac.new(secret.encode(), content, hashlib.sha256).digest()
        return self.headers["webhook-signature"] == "v1," + base64.b64encode(mac).decode("ascii")


@dataclass(slots=True)
class Receiver:
    url: str
    port: int
    received: list[ReceivedRequest] = field(default_factory=list)
    answers: list[int | Behaviour] = field(default_factory=list)
    """What is answered next, in turn; 204 when there is nothing left."""


@contextmanager
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with lock:
                got.received.append(ReceivedRequest(self.path, headers, raw))
                answer = got.answers.pop(0) if got.answers else 204
            if callable(answer):
                answer(self)
                return
            self.send_response(answer)
            if 300 <= answer < 400:
                self.send_header("location", f"{got.url}/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that was killed

    lock = threading.Lock()
    server = Server(("127.0.0.1", 0), Handler)
    port = int(server.server_address[1])
    got = Receiver(f"http://127.0.0.1:{port}", port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
