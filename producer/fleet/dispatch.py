"""Wake-ups: keeps just enough of them in Redis, from what SQL says is queued."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from models.database import Database
from models.store import chunks
from nightherd.broker import ping
from nightherd.errors import BrokerError
from nightherd.settings import Settings, redact_url


@dataclass(frozen=True, slots=True)
class _Wanted:
    queue: str
    messages: int


class Dispatcher:
    """Publishes wake-ups; may be called from any thread, by any number of processes at once.

    Two at once may publish a few too many: each costs one empty look by a worker.
    """

    def __init__(self, database: Database, settings: Settings, broker_url: str) -> None:
        self._database = database
        self._settings = settings
        self._broker_url = broker_url
        self._app: Any = None
        self._lock = threading.Lock()

    def top_up(self, checkpoint_key: str) -> int:
        """Fills the checkpoint's queues to `min(queued chunks, max(1, 2 × live slots))`.

        Returns how many wake-ups it published. Raises `BrokerError` within `broker_timeout` or
        so if Redis is down or full: nothing is lost then, the next tick tries again.
        """
        wanted = self._wanted(checkpoint_key)
        if not wanted:
            return 0
        # Faster to fail than Celery's own connection, whose client retries with pauses.
        ping(self._broker_url, self._settings.broker_timeout)
        with self._lock:
            return self._publish(checkpoint_key, wanted)

    def _wanted(self, key: str) -> list[_Wanted]:
        from nightherd.queue import queue_name

        def count(connection: Connection) -> list[_Wanted]:
            slots = chunks.live_slots(connection, key)
            slots.setdefault(None, 0)
            wanted = []
            for only_job, live in slots.items():
                limit = max(1, 2 * live)
                messages = chunks.count_queued(connection, key, limit=limit, only_job=only_job)
                if messages:
                    wanted.append(_Wanted(queue_name(key, only_job), messages))
            return wanted

        return self._database.retrying(count, reading=True)

    def _publish(self, key: str, wanted: list[_Wanted]) -> int:
        from kombu.exceptions import OperationalError as KombuError
        from redis.exceptions import RedisError

        from nightherd.queue import WAKE_TASK, make_app, publishing_connection, wake_queue

        if self._app is None:
            self._app = make_app(self._broker_url, self._settings)
        published = 0
        try:
            with publishing_connection(self._app, self._settings) as connection:
                for queue in wanted:
                    declared = connection.default_channel.queue_declare(queue.queue)
                    for _ in range(queue.messages - declared.message_count):
                        self._app.send_task(
                            WAKE_TASK,
                            kwargs={"checkpoint": key},
                            queue=wake_queue(queue.queue),
                            connection=connection,
                            retry=False,
                        )
                        published += 1
        except (KombuError, RedisError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BrokerError(
                f"the broker {redact_url(self._broker_url)} refuses: {reason}"
            ) from error
        return published
