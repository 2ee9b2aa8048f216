"""Workers, what they serve, and when the fleet's sweeps last ran."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, db_now

WORKER_STATES = ("starting", "ready", "draining", "stopped", "dead")
LIVE_WORKER_STATES = ("starting", "ready", "draining")
"""Those whose lease counts."""


class Worker(Base):
    """One process with one loaded checkpoint; a new row, with a new id, at each start."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    host: Mapped[str] = mapped_column(Text)
    pid: Mapped[int] = mapped_column(Integer)
    device: Mapped[str] = mapped_column(Text)
    checkpoint_key: Mapped[str] = mapped_column(Text)
    slots: Mapped[int] = mapped_column(Integer)
    """Chunks that it may have in flight."""
    only_job: Mapped[str | None] = mapped_column(String(16))
    """Claims chunks of this job alone (`nightherd run` starts such workers)."""
    state: Mapped[str] = mapped_column(String(16))
    phase: Mapped[str | None] = mapped_column(Text)
    """While starting: what it is doing."""
    lease_until: Mapped[datetime]
    started_at: Mapped[datetime] = mapped_column(insert_default=db_now())
    renewed_at: Mapped[datetime] = mapped_column(insert_default=db_now())
    speed: Mapped[float] = mapped_column(Float, default=0.0)
    """Output tokens a second over the last ten seconds or so."""
    version: Mapped[str] = mapped_column(Text)

    __table_args__ = (
        CheckConstraint(
            f"state IN ({', '.join(repr(state) for state in WORKER_STATES)})", name="state"
        ),
        Index("ix_workers_state", "state", "lease_until"),
    )


class ServedCheckpoint(Base):
    """The checkpoint keys that a worker answers to: its own and its `--serve-as` names."""

    __tablename__ = "served_checkpoints"

    worker_id: Mapped[str] = mapped_column(
        ForeignKey("workers.id", ondelete="CASCADE"), primary_key=True
    )
    checkpoint_key: Mapped[str] = mapped_column(Text, primary_key=True)


class Sweep(Base):
    """When a kind of housekeeping last ran, anywhere: one guarded update elects who runs it."""

    __tablename__ = "sweeps"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    last_at: Mapped[datetime]
