"""Storing a new job: invisible while `storing`, live in one last transaction.

Submit dies half-way: the job stays `storing`, nobody sees it, and housekeeping removes it. A job
whose removal has begun has a `finished_at`: a submit that stood still and goes on finds it refused,
else it would finish a job with holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from models.base import db_now
from models.database import driver_errors
from models.job import Chunk, Job, Request, Result
from nightherd.errors import ConflictError

_FEW_ROWS = 50
"""Below, COPY is more to do than to send the rows one by one."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """What is known of a job before its rows are stored."""

    id: str
    checkpoint_key: str
    seed: int
    params: dict[str, Any]
    name: str | None = None
    template: dict[str, Any] | None = None
    priority: int = 0
    not_before: datetime | None = None
    deadline: datetime | None = None
    metadata: dict[str, Any] | None = None
    firing_id: int | None = None
    submitted_by: str | None = None


@dataclass(frozen=True, slots=True)
class NewRequest:
    index: int
    body: dict[str, Any]
    params: dict[str, Any] | None
    custom_id: str | None
    samples: int


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """Positions [first, first + count) and the samples that they owe."""

    first: int
    count: int
    samples: int


def begin_storing(connection: Connection, job: NewJob) -> None:
    """Inserts the job in state `storing`; an id that is taken raises IntegrityError."""
    connection.execute(insert(Job).values(**_values(job), state="storing"))


def _values(job: NewJob) -> dict[str, Any]:
    return {
        "id": job.id,
        "name": job.name,
        "checkpoint_key": job.checkpoint_key,
        "seed": job.seed,
        "params": job.params,
        "template": job.template,
        "priority": job.priority,
        "not_before": job.not_before,
        "deadline": job.deadline,
        "metadata_": job.metadata,
        "firing_id": job.firing_id,
        "submitted_by": job.submitted_by,
    }


def begin_whole(connection: Connection, job: NewJob, chunks: Sequence[ChunkRange]) -> None:
    """Inserts a job that is live with this very transaction; `store_whole` adds what it has."""
    connection.execute(insert(Job).values(**_values(job), state="queued", **_totals(chunks)))


def store_whole(
    connection: Connection, job_id: str, rows: Sequence[NewRequest], chunks: Sequence[ChunkRange]
) -> None:
    """The rows and chunks of a job of `begin_whole`."""
    if connection.dialect.name == "postgresql" and len(rows) > _FEW_ROWS:
        _copy_requests(connection, job_id, rows)
    else:
        _insert_requests(connection, job_id, rows)
    _insert_chunks(connection, job_id, chunks)


def _totals(chunks: Sequence[ChunkRange]) -> dict[str, int]:
    return {
        "total_requests": sum(chunk.count for chunk in chunks),
        "total_samples": sum(chunk.samples for chunk in chunks),
    }


def _touch_storing(connection: Connection, job_id: str) -> None:
    touched = connection.execute(
        update(Job)
        .where(Job.id == job_id, Job.state == "storing", Job.finished_at.is_(None))
        .values(touched_at=db_now())
    )
    if touched.rowcount != 1:
        raise ConflictError(
            f"job {job_id} was removed while it was being stored (submit stood still for too "
            "long); submit it again"
        )


def store_requests(connection: Connection, job_id: str, rows: Sequence[NewRequest]) -> None:
    """Adds rows to a job in state `storing`; raises `ConflictError` if it is not there any more.

    Binary COPY on PostgreSQL, executemany on SQLite: the fastest way of each (368k and 155k
    rows/s measured).
    """
    _touch_storing(connection, job_id)
    there = select(Request.index).where(Request.job_id == job_id, Request.index == rows[0].index)
    if connection.execute(there).first() is not None:
        return  # this very batch was committed before, and only the answer was lost
    if connection.dialect.name == "postgresql":
        _copy_requests(connection, job_id, rows)
    else:
        _insert_requests(connection, job_id, rows)


def _insert_requests(connection: Connection, job_id: str, rows: Sequence[NewRequest]) -> None:
    connection.execute(
        insert(Request),
        [
            {
                "job_id": job_id,
                "index": row.index,
                "position": row.index,
                "custom_id": row.custom_id,
                "body": row.body,
                "params": row.params,
                "samples": row.samples,
            }
            for row in rows
        ],
    )


def _copy_requests(connection: Connection, job_id: str, rows: Sequence[NewRequest]) -> None:
    driver: Any = connection.connection.driver_connection
    statement = (
        'COPY requests (job_id, "index", position, custom_id, body, params, samples) '
        "FROM STDIN (FORMAT BINARY)"
    )
    with (
        driver_errors(connection, statement),
        driver.cursor() as cursor,
        cursor.copy(statement) as copy,
    ):
        copy.set_types(["varchar", "int8", "int8", "text", "json", "json", "int4"])
        for row in rows:
            copy.write_row(
                (job_id, row.index, row.index, row.custom_id, row.body, row.params, row.samples)
            )


def is_there(connection: Connection, job_id: str) -> bool:
    return connection.execute(select(Job.id).where(Job.id == job_id)).first() is not None


def is_storing(connection: Connection, job_id: str) -> bool:
    """Whether a job is not live yet, or has been removed meanwhile."""
    state = connection.execute(select(Job.state).where(Job.id == job_id)).scalar_one_or_none()
    return state in (None, "storing")


def finish_storing(connection: Connection, job_id: str, chunks: Sequence[ChunkRange]) -> None:
    """The last transaction: the chunks, and the job becomes `queued`, visible and claimable."""
    if not is_storing(connection, job_id):
        return  # committed before, and only the answer was lost
    _touch_storing(connection, job_id)
    _insert_chunks(connection, job_id, chunks)
    connection.execute(
        update(Job)
        .where(Job.id == job_id, Job.state == "storing")
        .values(state="queued", created_at=db_now(), **_totals(chunks))
    )


def _insert_chunks(connection: Connection, job_id: str, chunks: Sequence[ChunkRange]) -> None:
    connection.execute(
        insert(Chunk),
        [
            {
                "job_id": job_id,
                "first_position": chunk.first,
                "count": chunk.count,
                "samples": chunk.samples,
                "state": "queued",
            }
            for chunk in chunks
        ],
    )


def remove_orphans(connection: Connection, *, idle_seconds: float, limit: int = 20_000) -> int:
    """Deletes up to `limit` rows of a job whose submit gave up, or stood still for `idle_seconds`.

    Returns how many rows went; call again in a new transaction for more: one delete of millions
    would lock SQLite for too long.
    """
    orphan = connection.execute(
        select(Job.id)
        .where(
            Job.state == "storing",
            Job.finished_at.is_not(None) | (Job.touched_at < db_now(-idle_seconds)),
        )
        .order_by(Job.id)
        .limit(1)
        .with_for_update(key_share=True, skip_locked=True)
    ).scalar_one_or_none()
    if orphan is None:
        return 0
    return discard_storing(connection, orphan, limit=limit)


def discard_storing(connection: Connection, job_id: str, *, limit: int = 20_000) -> int:
    """Deletes up to `limit` rows of a job in state `storing`: results, requests, then the job.

    Returns how many rows went, the job's own included: 0 when there is nothing to remove. Only a
    job that had ended, and was removed with its firing, has results, and chunks that count.
    """
    doomed = connection.execute(
        update(Job).where(Job.id == job_id, Job.state == "storing").values(finished_at=db_now())
    )
    if doomed.rowcount != 1:
        return 0
    gone = 0
    for table in (Result, Request):
        page, is_last = _delete_page(connection, table, job_id, limit - gone)
        gone += page
        if not is_last:
            return gone
    # What is left is small: a chunk stands for many requests.
    connection.execute(delete(Chunk).where(Chunk.job_id == job_id))
    return gone + connection.execute(delete(Job).where(Job.id == job_id)).rowcount


def _delete_page(
    connection: Connection, table: type[Result] | type[Request], job_id: str, limit: int
) -> tuple[int, bool]:
    """Deletes about `limit` rows of a job, lowest indices first; how many, and whether all went."""
    of_job = table.job_id == job_id
    rest = connection.execute(
        select(table.index).where(of_job).order_by(table.index).offset(limit).limit(1)
    ).scalar_one_or_none()
    if rest is None:
        return connection.execute(delete(table).where(of_job)).rowcount, True
    gone = connection.execute(delete(table).where(of_job, table.index < rest)).rowcount
    if not gone:  # one request with more samples than that
        gone = connection.execute(delete(table).where(of_job, table.index == rest)).rowcount
    return gone, False
