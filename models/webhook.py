"""Webhooks: which URL is called when a job or a firing has ended."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, Integer, String, Text
from sqlalchemy import text as sql
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, db_now

WEBHOOK_STATES = ("waiting", "due", "delivered", "failed", "dropped")
"""`waiting` for the end; `due` until a 2xx; `dropped`: the job ended otherwise than it is for."""
WEBHOOK_OCCASIONS = ("complete", "failure")


class Webhook(Base):
    """One URL to be called at one end: at least once, and not again after a recorded 2xx."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    """Random; the delivery's id, the same at each attempt."""
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    firing_id: Mapped[int | None] = mapped_column(ForeignKey("firings.id", ondelete="CASCADE"))
    occasion: Mapped[str] = mapped_column(String(16))
    url: Mapped[str] = mapped_column(Text)
    """As given: a URL, or `env:NAME` for one that is a secret."""
    state: Mapped[str] = mapped_column(String(16))
    payload: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """The body, fixed when it becomes due."""
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_attempt_at: Mapped[datetime | None]
    """Not before then; while an attempt runs, when another may take it over."""
    last_status: Mapped[int | None] = mapped_column(Integer)
    last_error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(insert_default=db_now())
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(
            f"state IN ({', '.join(repr(state) for state in WEBHOOK_STATES)})", name="state"
        ),
        CheckConstraint(
            f"occasion IN ({', '.join(repr(word) for word in WEBHOOK_OCCASIONS)})", name="occasion"
        ),
        Index("ix_webhooks_job_id", "job_id"),
        Index("ix_webhooks_firing_id", "firing_id"),
        Index(
            "ix_webhooks_open",
            "state",
            "next_attempt_at",
            sqlite_where=sql("state IN ('waiting', 'due')"),
            postgresql_where=sql("state IN ('waiting', 'due')"),
        ),
    )
