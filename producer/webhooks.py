"""Webhooks: which URLs are accepted, and the courier that delivers what is due."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError

from models.store import webhooks as store
from nightherd.errors import DatabaseError, UsageError
from nightherd.log import OncePerState

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from models.database import Database
    from models.store.webhooks import Delivery
    from nightherd.settings import Settings
    from producer.webhook_sender import Sender

log = logging.getLogger("nightherd.webhooks")

RETRY_SECONDS = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""The pauses between attempts, 76 hours in all: a receiver may be down over a week-end."""
_SECRET_URL = "env:"  # noqa: S105 - a prefix
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_URL = 2_000
_GONE = 410
_HANDS = 4
"""Deliveries that a process makes at once: one slow receiver does not hold up all others."""
_ROUND_SECONDS = 30.0
_LEASE_MARGIN = 30.0
"""Beyond the time limit of an attempt, for noting its answer."""

T = TypeVar("T")


def place(url: str) -> str:
    """Scheme and host, for logs and tables; the rest of a URL may be a secret."""
    if url.startswith(_SECRET_URL):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}"


def check(settings: Settings, **urls: str | None) -> None:
    """Raises `UsageError` for a webhook that could not be delivered, as far as is known here.

    `urls` by the names of their options: `on_complete`, `on_failure`.
    """
    for name, url in urls.items():
        if url is None:
            continue
        option = f"--{name.replace('_', '-')}"
        _check_url(url, option, allow_private=settings.webhook_allow_private)
        if settings.webhook_secret is None:
            raise UsageError(
                f"{option} needs NIGHTHERD_WEBHOOK_SECRET, with which bodies are signed; "
                "openssl rand -base64 32 makes one"
            )


def _check_url(url: str, option: str, *, allow_private: bool) -> None:
    # Its text is not repeated: it may hold a secret.
    if url.startswith(_SECRET_URL):
        if not _VARIABLE.fullmatch(url.removeprefix(_SECRET_URL)):
            raise UsageError(f"{option}: after env: comes the name of a variable, as env:HOOK_URL")
        return
    if len(url) > _MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(
            f"{option} must be at most {_MAX_URL} characters of ASCII without spaces; "
            "write others as %XX"
        )
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        raise UsageError(f"{option} is no URL: its host or port cannot be read") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"{option} must be an http:// or https:// URL, or env:NAME")
    if "@" in parts.netloc:
        raise UsageError(
            f"{option} must hold no user or password; put a URL that is a secret into a variable: "
            "env:NAME"
        )
    if not allow_private and _is_private(host):
        raise UsageError(
            f"{option}: {host} is not public; NIGHTHERD_WEBHOOK_ALLOW_PRIVATE=true allows it"
        )


def _is_private(host: str) -> bool:
    """Whether an address is; names are looked at when a webhook is sent."""
    from producer.webhook_sender import is_public

    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return not is_public(host)


def job_webhooks(connection: Connection, job_id: str) -> list[dict[str, Any]]:
    """A job's webhooks as `status --json` shows them."""
    return [
        {
            "id": row.id,
            "on": row.occasion,
            "to": place(row.url),
            "state": row.state,
            "attempts": row.attempts,
            "next_attempt_at": _iso(row.next_attempt_at),
            "last_status": row.last_status,
            "last_error": row.last_error,
            "finished_at": _iso(row.finished_at),
        }
        for row in store.of_job(connection, job_id)
    ]


def _iso(time: Any) -> str | None:
    return None if time is None else str(time.isoformat())


class Courier:
    """One process's deliveries, in threads of their own. Any number of processes may have one.

    It never holds a connection to the database while it waits for a receiver, uses one at a time,
    and one statement every `webhook_poll_seconds` while there is nothing to do.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        retry_seconds: Sequence[float] = RETRY_SECONDS,
    ) -> None:
        self._database = database
        self._settings = settings
        self._retry_seconds = retry_seconds
        self._turn = threading.Lock()
        self._bell = threading.Event()
        self._stop = threading.Event()
        self._sender: Sender | None = None
        self._database_down = OncePerState(log)
        self._no_secret = OncePerState(log)
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 0.0) -> None:
        """Begins nothing more, and waits so long for what is under way.

        An attempt whose answer is not waited for is made again, by another process.
        """
        self._stop.set()
        self._bell.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def nudge(self) -> None:
        """A job has ended: looks at once."""
        self._bell.set()

    def finish(self, job_id: str) -> None:
        """One attempt at what is due of a job that has ended; for a process that ends with it."""
        deadline = time.monotonic() + self._settings.webhook_timeout
        with self._noting_trouble():
            while self._ask(store.settle):
                pass
            self._deliver_until(deadline, job_id)

    def round(self) -> None:
        """Makes due what has ended, and delivers what is due. Raises `DatabaseError`."""
        ended, due = self._database.retrying(
            lambda connection: store.look(connection, most=_HANDS), reading=True, patience=0
        )
        while ended and not self._stop.is_set():
            settled = self._ask(store.settle)
            ended, due = settled > 0, min(_HANDS, due + settled)
        if due == 0 or self._stop.is_set():
            return
        deadline = time.monotonic() + _ROUND_SECONDS
        others = [
            threading.Thread(target=self._lend_a_hand, args=(deadline,), daemon=True)
            for _ in range(due - 1)
        ]
        for other in others:
            other.start()
        try:
            self._deliver_until(deadline)
        finally:
            for other in others:
                other.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._noting_trouble():
                self.round()
            self._bell.wait(self._settings.webhook_poll_seconds)
            self._bell.clear()

    def _lend_a_hand(self, deadline: float) -> None:
        with self._noting_trouble():
            self._deliver_until(deadline)

    def _noting_trouble(self) -> _NotingTrouble:
        return _NotingTrouble(self._database_down)

    def _ask(self, work: Callable[[Connection], T], *, patience: float = 1.0) -> T:
        """A transaction; one at a time, so that a worker's pool is never the courier's alone."""
        with self._turn:
            return self._database.retrying(work, patience=patience, stop=self._stop)

    # Delivering.

    def _deliver_until(self, deadline: float, job_id: str | None = None) -> None:
        """Delivers until nothing is due, or the time has come to look at all again."""
        sender = self._ready()
        if sender is None:
            return
        lease = self._settings.webhook_timeout + _LEASE_MARGIN
        while time.monotonic() < deadline and not (self._stop.is_set() and job_id is None):
            delivery = self._ask(
                lambda connection: store.claim(
                    connection,
                    lease_seconds=lease,
                    attempts=self._settings.webhook_attempts,
                    job_id=job_id,
                )
            )
            if delivery is None:
                return
            self._deliver(sender, delivery)

    def _ready(self) -> Sender | None:
        from producer.webhook_sender import Sender

        secret = self._settings.webhook_secret
        if secret is None:
            self._no_secret.begin(
                "webhooks wait: NIGHTHERD_WEBHOOK_SECRET is not set where this process runs"
            )
        elif self._sender is None:
            self._sender = Sender(
                secret.get_secret_value(),
                timeout=self._settings.webhook_timeout,
                allow_private=self._settings.webhook_allow_private,
            )
        return self._sender

    def _deliver(self, sender: Sender, delivery: Delivery) -> None:
        status, error = self._attempt(sender, delivery)
        if error is None and status is not None:
            answer = status
            self._note(lambda connection: store.delivered(connection, delivery.id, answer))
            log.info("webhook %s to %s: %d", delivery.id, place(delivery.url), answer)
            return
        last = status == _GONE or delivery.attempt >= self._settings.webhook_attempts
        pause = None if last else self._pause(delivery.attempt)
        self._note(
            lambda connection: store.not_delivered(
                connection,
                delivery,
                status=status,
                error=error or "",
                retry_seconds=pause,
            )
        )
        then = "given up" if pause is None else f"again in {pause:g} s"
        log.warning(
            "webhook %s to %s, attempt %d: %s; %s",
            *(delivery.id, place(delivery.url), delivery.attempt, error, then),
        )

    def _pause(self, attempt: int) -> float:
        return self._retry_seconds[min(attempt, len(self._retry_seconds)) - 1]

    def _note(self, work: Callable[[Connection], None]) -> None:
        """Notes an answer, patiently: what is not noted is sent again."""
        self._ask(work, patience=_LEASE_MARGIN)

    def _attempt(self, sender: Sender, delivery: Delivery) -> tuple[int | None, str | None]:
        """The status, if there was an answer, and what was wrong with it."""
        from producer.webhook_sender import SendError

        body = json.dumps(delivery.payload, ensure_ascii=False, separators=(",", ":")).encode()
        try:
            status = sender.send(self._resolved(delivery.url), delivery.id, body)
        except SendError as error:
            return None, str(error)
        except Exception as error:
            # One URL must not keep the others waiting, whatever it makes of a library.
            log.debug("webhook %s", delivery.id, exc_info=True)
            return None, f"it cannot be sent: {type(error).__name__}"
        if 200 <= status < 300:
            return status, None
        redirected = ", a redirect, which is not followed" if 300 <= status < 400 else ""
        return status, f"it was answered with {status}{redirected}"

    def _resolved(self, url: str) -> str:
        from producer.webhook_sender import SendError

        if not url.startswith(_SECRET_URL):
            return url
        name = url.removeprefix(_SECRET_URL)
        found = os.environ.get(name, "")
        try:
            _check_url(found, name, allow_private=self._settings.webhook_allow_private)
        except UsageError as error:
            raise SendError(str(error) if found else f"{name} is not set here") from None
        return found


class _NotingTrouble:
    """Around what a thread does again later: the database's trouble is said once, others each."""

    def __init__(self, database_down: OncePerState) -> None:
        self._database_down = database_down

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            self._database_down.end("the database answers again")
            return True
        if isinstance(error, DatabaseError | SQLAlchemyError):
            self._database_down.begin("no webhooks: %s; tried again", error)
            return True
        if isinstance(error, Exception):
            log.error("a round of webhooks failed", exc_info=error)
            return True
        return False
