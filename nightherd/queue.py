"""The Celery application and its queues.

A message is a wake-up: "there is work for this checkpoint". It names no chunk; SQL decides what
is done. So a lost message delays work by a tick, a doubled one makes a worker look and find
nothing, and Redis holds a few messages however many prompts wait.
"""

from __future__ import annotations

import hashlib
from typing import Any

from celery import Celery
from kombu import Connection, Exchange, Queue

from nightherd.settings import Settings

WAKE_TASK = "nightherd.wake"
KEY_PREFIX = "nightherd:"


def queue_name(checkpoint_key: str, only_job: str | None = None) -> str:
    """The queue of a checkpoint; workers that serve one job alone have a queue of their own."""
    digest = hashlib.sha256(checkpoint_key.encode()).hexdigest()[:16]
    return f"wake.{digest}.{only_job}" if only_job else f"wake.{digest}"


def wake_queue(name: str) -> Queue:
    # The default exchange (no name): Redis then keeps no binding tables for it.
    return Queue(name, Exchange(""), routing_key=name)


def make_app(broker_url: str, settings: Settings) -> Celery:
    """The Celery application; each setting has its reason in docs/operations.md."""
    app = Celery("nightherd", broker=broker_url, set_as_current=False)
    app.conf.update(
        result_backend=None,
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        worker_pool="threads",
        task_reject_on_worker_lost=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        worker_soft_shutdown_timeout=0,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": settings.visibility_timeout,
            "unacked_restore_interval": 30,
            "unacked_restore_throttle": 1,
            "health_check_interval": 25,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "global_keyprefix": KEY_PREFIX,
        },
        task_publish_retry=False,
        task_serializer="json",
        accept_content=["json"],
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        enable_utc=True,
        timezone="UTC",
        task_create_missing_queues=True,
    )
    return app


def publishing_connection(app: Celery, settings: Settings) -> Connection:
    """A connection that gives up after `broker_timeout` seconds, not with a worker's patience."""
    options: dict[str, Any] = dict(app.conf.broker_transport_options)
    options |= {
        "socket_timeout": settings.broker_timeout,
        "socket_connect_timeout": settings.broker_timeout,
        "health_check_interval": 0,
    }
    return app.connection_for_write(transport_options=options)
