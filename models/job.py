"""Jobs and what belongs to one: requests, chunks, results, parameter sets, provenance."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
)
from sqlalchemy import text as sql
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, db_now

JOB_STATES = ("storing", "queued", "running", "paused", "completed", "cancelled", "expired")
OPEN_JOB_STATES = ("queued", "running", "paused")
"""Accepted and not ended."""
RUNNABLE_JOB_STATES = ("queued", "running")
"""Workers may claim chunks of these."""
ENDED_JOB_STATES = ("completed", "cancelled", "expired")
CHUNK_STATES = ("queued", "running", "done", "cancelled")
OPEN_CHUNK_STATES = ("queued", "running")

# SQLite assigns ids by itself only in a column of type INTEGER.
_BigId = BigInteger().with_variant(Integer(), "sqlite")
_Json = JSON(none_as_null=True)


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


class Job(Base):
    """What a user submitted: many requests, one checkpoint, default parameters, one seed."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16))
    checkpoint_key: Mapped[str] = mapped_column(Text)
    seed: Mapped[int] = mapped_column(BigInteger)
    params: Mapped[dict[str, Any]] = mapped_column(_Json)
    """The job's layer of parameters, by canonical names."""
    template: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    """How rows became requests, as given: template, system, task, task arguments."""
    priority: Mapped[int] = mapped_column(Integer, default=0)
    """Higher runs first."""
    not_before: Mapped[datetime | None]
    deadline: Mapped[datetime | None]
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata", _Json, key="metadata_")
    firing_id: Mapped[int | None] = mapped_column(ForeignKey("firings.id", ondelete="SET NULL"))
    submitted_by: Mapped[str | None] = mapped_column(Text)
    total_requests: Mapped[int] = mapped_column(BigInteger, default=0)
    total_samples: Mapped[int] = mapped_column(BigInteger, default=0)
    created_at: Mapped[datetime] = mapped_column(insert_default=db_now())
    touched_at: Mapped[datetime] = mapped_column(insert_default=db_now())
    """While `storing`: when submit last stored something; housekeeping goes by it."""
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(_one_of("state", JOB_STATES), name="state"),
        # The order in which workers look for work.
        Index(
            "ix_jobs_runnable",
            "checkpoint_key",
            "priority",
            "created_at",
            sqlite_where=sql(_one_of("state", RUNNABLE_JOB_STATES)),
            postgresql_where=sql(_one_of("state", RUNNABLE_JOB_STATES)),
        ),
        Index("ix_jobs_created_at", "created_at"),
        Index("ix_jobs_firing_id", "firing_id"),
    )


class Request(Base):
    """One prompt or chat of a job, at `index` in the input and `position` in execution order."""

    __tablename__ = "requests"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    index: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    position: Mapped[int] = mapped_column(BigInteger)
    custom_id: Mapped[str | None] = mapped_column(Text)
    body: Mapped[dict[str, Any]] = mapped_column(_Json)
    params: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    """The request's own layer of parameters."""
    samples: Mapped[int] = mapped_column(Integer, default=1)
    """Its effective `n`: how many results it will have."""

    __table_args__ = (
        Index("uq_requests_job_id_position", "job_id", "position", unique=True),
        Index(
            "uq_requests_job_id_custom_id",
            "job_id",
            "custom_id",
            unique=True,
            sqlite_where=sql("custom_id IS NOT NULL"),
            postgresql_where=sql("custom_id IS NOT NULL"),
        ),
    )


class Chunk(Base):
    """A range of a job's requests in execution order: what is claimed, leased, handed back.

    `samples`, `done` and `failed` are absolute numbers for this range and pass; over a job's
    chunks they sum to its totals (a retry moves the failed samples to a chunk of the next pass).
    """

    __tablename__ = "chunks"

    id: Mapped[int] = mapped_column(_BigId, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    first_position: Mapped[int] = mapped_column(BigInteger)
    count: Mapped[int] = mapped_column(Integer)
    """Positions covered: [first_position, first_position + count)."""
    pass_: Mapped[int] = mapped_column("pass", Integer, key="pass_", default=1)
    only_code: Mapped[str | None] = mapped_column(String(64))
    """A retry of failures of one code alone."""
    state: Mapped[str] = mapped_column(String(16), default="queued")
    fence: Mapped[int] = mapped_column(Integer, default=0)
    """Grows by one at each claim; a write that carries an older one fails."""
    deaths: Mapped[int] = mapped_column(Integer, default=0)
    """Workers that died with it running."""
    worker_id: Mapped[str | None] = mapped_column(String(16))
    samples: Mapped[int] = mapped_column(BigInteger)
    done: Mapped[int] = mapped_column(BigInteger, default=0)
    failed: Mapped[int] = mapped_column(BigInteger, default=0)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    completion_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    claimed_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(_one_of("state", CHUNK_STATES), name="state"),
        CheckConstraint("done + failed <= samples", name="counts"),
        Index("ix_chunks_job_id", "job_id", "id"),
        Index(
            "ix_chunks_queued",
            "job_id",
            "deaths",
            "id",
            sqlite_where=sql("state = 'queued'"),
            postgresql_where=sql("state = 'queued'"),
        ),
        Index(
            "ix_chunks_running",
            "worker_id",
            sqlite_where=sql("state = 'running'"),
            postgresql_where=sql("state = 'running'"),
        ),
    )


class ParameterSet(Base):
    """Effective parameters, without the seed, by the hash of their canonical JSON."""

    __tablename__ = "parameter_sets"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    params: Mapped[dict[str, Any]] = mapped_column(_Json)


class Provenance(Base):
    """What produced results: the checkpoint to the byte, the software to the version."""

    __tablename__ = "provenance"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    checkpoint_key: Mapped[str] = mapped_column(Text)
    revision: Mapped[str | None] = mapped_column(Text)
    weights_hash: Mapped[str | None] = mapped_column(Text)
    tokenizer_hash: Mapped[str] = mapped_column(Text)
    template_hash: Mapped[str | None] = mapped_column(Text)
    dtype: Mapped[str] = mapped_column(String(16))
    device: Mapped[str] = mapped_column(Text)
    engine: Mapped[str] = mapped_column(Text)
    versions: Mapped[dict[str, str]] = mapped_column(_Json)


class Result(Base):
    """What is stored for one sample: its text, or its error."""

    __tablename__ = "results"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    index: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    sample: Mapped[int] = mapped_column(Integer, primary_key=True)
    pass_: Mapped[int] = mapped_column("pass", Integer, key="pass_")
    text: Mapped[str | None] = mapped_column(Text)
    finish_reason: Mapped[str] = mapped_column(String(16))
    stop_reason: Mapped[str | None] = mapped_column(Text)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    logprobs: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    seed: Mapped[int | None] = mapped_column(BigInteger)
    worker_id: Mapped[str | None] = mapped_column(String(16))
    parameter_set_id: Mapped[str | None] = mapped_column(ForeignKey("parameter_sets.id"))
    provenance_id: Mapped[str | None] = mapped_column(ForeignKey("provenance.id"))
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    seconds: Mapped[float | None] = mapped_column(Float)
    """From its first step in the engine to its last."""

    __table_args__ = (
        CheckConstraint(_one_of("finish_reason", ("stop", "length", "error")), name="reason"),
        Index(
            # Failures in the order of export; with the code, to count them from it alone.
            "ix_results_failed",
            "job_id",
            "index",
            "sample",
            "error_code",
            sqlite_where=sql("error_code IS NOT NULL"),
            postgresql_where=sql("error_code IS NOT NULL"),
        ),
    )
