"""Schedules, and the times at which they fired."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, CheckConstraint, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy import text as sql
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, db_now

FIRING_STATES = ("claimed", "submitted", "succeeded", "failed", "skipped")
"""`claimed`: a beat makes its job; `submitted`: the job is live; the others are ends."""
FIRING_KINDS = ("due", "manual", "backfill")


class Schedule(Base):
    """A cron rule that submits a job."""

    __tablename__ = "schedules"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(Text, unique=True)
    cron: Mapped[str] = mapped_column(Text)
    timezone: Mapped[str] = mapped_column(Text)
    input: Mapped[dict[str, Any]] = mapped_column(JSON(none_as_null=True))
    options: Mapped[dict[str, Any]] = mapped_column(JSON(none_as_null=True))
    """The job's options, as `submit` knows them, and those of each firing (output, webhooks)."""
    concurrency: Mapped[str] = mapped_column(String(16), default="forbid")
    misfire: Mapped[str] = mapped_column(String(16), default="coalesce")
    starting_deadline_seconds: Mapped[float | None] = mapped_column(Float)
    keep_succeeded: Mapped[int | None] = mapped_column(Integer)
    keep_failed: Mapped[int | None] = mapped_column(Integer)
    paused: Mapped[bool] = mapped_column(default=False)
    next_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(insert_default=db_now())

    __table_args__ = (
        CheckConstraint("concurrency IN ('forbid', 'allow', 'replace')", name="concurrency"),
        CheckConstraint("misfire IN ('coalesce', 'skip', 'all')", name="misfire"),
        # The order in which beats look at them: many may be due at one instant.
        Index("ix_schedules_next_at", "next_at", "id"),
    )


class Firing(Base):
    """One firing of a schedule; its scheduled time is unique, so any number of beats may run."""

    __tablename__ = "firings"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    schedule_id: Mapped[int] = mapped_column(ForeignKey("schedules.id", ondelete="CASCADE"))
    scheduled_for_utc: Mapped[datetime]
    since_utc: Mapped[datetime | None]
    """Of a row that stands for several skipped times: the first of them; the last is its own."""
    kind: Mapped[str] = mapped_column(String(16), default="due", server_default="due")
    """One of FIRING_KINDS."""
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    output: Mapped[str | None] = mapped_column(Text)
    """The file that its results go to when the job ends, with everything filled in."""
    attempts: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Claims so far: more than one if a beat died with it."""
    claimed_by: Mapped[str | None] = mapped_column(String(16))
    lease_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(insert_default=db_now())
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(
            f"state IN ({', '.join(repr(state) for state in FIRING_STATES)})", name="state"
        ),
        Index(
            "uq_firings_schedule_id_scheduled_for_utc",
            "schedule_id",
            "scheduled_for_utc",
            unique=True,
        ),
        # The few that a beat is making the job of.
        Index(
            "ix_firings_claimed",
            "lease_until",
            sqlite_where=sql("state = 'claimed'"),
            postgresql_where=sql("state = 'claimed'"),
        ),
        # Firings that somebody must still see to.
        Index(
            "ix_firings_open",
            "schedule_id",
            sqlite_where=sql("state IN ('claimed', 'submitted')"),
            postgresql_where=sql("state IN ('claimed', 'submitted')"),
        ),
    )
