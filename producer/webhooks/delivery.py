"""Webhooks: delivering what is due, with retries, from threads of any process."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from models.store import webhooks as store
from nightherd.errors import DatabaseError, UsageError
from nightherd.log import OncePerState
from producer.webhooks.urls import SECRET_URL, check_url, shown_url

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from models.database import Database
    from models.store.webhooks import Delivery
    from nightherd.settings import Settings
    from producer.webhooks.sender import Sender

log = logging.getLogger("nightherd.webhooks")

RETRY_SECONDS = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""The pauses between attempts, 76 hours in all: a receiver may be down over a week-end."""
_GONE = 410
MAX_PARALLEL = 4
"""Deliveries that a process makes at once: one slow receiver does not hold up all others."""
_ROUND_SECONDS = 30.0
_LEASE_MARGIN = 30.0
"""Beyond the time limit of an attempt, for recording its answer."""

T = TypeVar("T")


class WebhookDeliverer:
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
        self._one_transaction = threading.Lock()
        self._wake_up = threading.Event()
        self._stop = threading.Event()
        self._sender: Sender | None = None
        self._database_down = OncePerState(log)
        self._no_secret = OncePerState(log)
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 0.0) -> None:
        """Begins nothing more, and waits so long for what is under way.

        An attempt whose answer is not waited for is made again, by another process.
        """
        self._stop.set()
        self._wake_up.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def wake(self) -> None:
        """A job has ended: looks at once."""
        self._wake_up.set()

    def finish(self, job_id: str) -> None:
        """One attempt at what is due of a job that has ended; for a process that ends with it."""
        deadline = time.monotonic() + self._settings.webhook_timeout
        with self._logging_trouble():
            while self._transaction(store.make_due):
                pass
            if self._settings.webhook_secret is None and not self._is_any_due(job_id):
                return
            self._deliver_until(deadline, job_id)

    def _is_any_due(self, job_id: str) -> bool:
        """Whether a webhook of this job is to be attempted now."""
        rows = self._database.retrying(
            lambda connection: store.of_job(connection, job_id), reading=True, patience=1.0
        )
        times = [row.next_attempt_at for row in rows if row.state == "due"]
        return bool(times) and min(times) <= self._database.now()

    def round(self) -> None:
        """Makes due what has ended, and delivers what is due. Raises `DatabaseError`."""
        ended, due = self._database.retrying(
            lambda connection: store.poll(connection, limit=MAX_PARALLEL), reading=True, patience=0
        )
        while ended and not self._stop.is_set():
            settled = self._transaction(store.make_due)
            ended, due = settled > 0, min(MAX_PARALLEL, due + settled)
        if due == 0 or self._stop.is_set():
            return
        deadline = time.monotonic() + _ROUND_SECONDS
        others = [
            threading.Thread(target=self._deliver_in_parallel, args=(deadline,), daemon=True)
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
            with self._logging_trouble():
                self.round()
            self._wake_up.wait(self._settings.webhook_poll_seconds)
            self._wake_up.clear()

    def _deliver_in_parallel(self, deadline: float) -> None:
        with self._logging_trouble():
            self._deliver_until(deadline)

    def _logging_trouble(self) -> _LogTrouble:
        return _LogTrouble(self._database_down)

    def _transaction(self, work: Callable[[Connection], T], *, patience: float = 1.0) -> T:
        """A transaction; one at a time, so that a worker's pool is never all taken by webhooks."""
        with self._one_transaction:
            return self._database.retrying(work, patience=patience, stop=self._stop)

    # Delivering.

    def _deliver_until(self, deadline: float, job_id: str | None = None) -> None:
        """Delivers until nothing is due, or the time has come to look at all again.

        For callers that know that something is due: without a secret this says that it waits.
        """
        sender = self._sender_or_warning()
        if sender is None:
            return
        lease = self._settings.webhook_timeout + _LEASE_MARGIN
        while time.monotonic() < deadline and not (self._stop.is_set() and job_id is None):
            delivery = self._transaction(
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

    def _sender_or_warning(self) -> Sender | None:
        from producer.webhooks.sender import Sender

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
            self._record(lambda connection: store.delivered(connection, delivery.id, answer))
            log.info("webhook %s to %s: %d", delivery.id, shown_url(delivery.url), answer)
            return
        last = status == _GONE or delivery.attempt >= self._settings.webhook_attempts
        pause = None if last else self._pause(delivery.attempt)
        self._record(
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
            *(delivery.id, shown_url(delivery.url), delivery.attempt, error, then),
        )

    def _pause(self, attempt: int) -> float:
        return self._retry_seconds[min(attempt, len(self._retry_seconds)) - 1]

    def _record(self, work: Callable[[Connection], None]) -> None:
        """Records an answer, patiently: what is not recorded is sent again."""
        self._transaction(work, patience=_LEASE_MARGIN)

    def _attempt(self, sender: Sender, delivery: Delivery) -> tuple[int | None, str | None]:
        """The status, if there was an answer, and what was wrong with it."""
        from producer.webhooks.sender import SendError

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
        from producer.webhooks.sender import SendError

        if not url.startswith(SECRET_URL):
            return url
        name = url.removeprefix(SECRET_URL)
        found = os.environ.get(name, "")
        try:
            check_url(found, name, allow_private=self._settings.webhook_allow_private)
        except UsageError as error:
            raise SendError(str(error) if found else f"{name} is not set here") from None
        return found


class _LogTrouble:
    """Logs the errors of a block that is run again later: the database's once, others each time."""

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
