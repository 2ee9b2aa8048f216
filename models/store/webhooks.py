"""Webhooks (a stand-in: nothing is told to anybody)."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection


def expect(
    connection: Connection,
    *,
    job_id: str | None = None,
    firing_id: int | None = None,
    on_complete: str | None,
    on_failure: str | None,
) -> None:
    """In the transaction that makes a job live: who is to be told of its end."""


def firing_failed(
    connection: Connection, firing_id: int, event: str, url: str | None, data: dict[str, Any]
) -> None:
    """A delivery for a firing that failed, or was missed, without a job; nothing without a URL."""
