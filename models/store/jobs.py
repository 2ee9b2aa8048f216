"""A job's states: cancel, pause, resume, change, retry, complete, expire.

::

    storing ──► queued ──► running ──► completed
                  │ ▲         │ ▲          │
                  │ └─ retry ─┼─┼──────────┘  (failed rows again, as chunks of the next pass)
                  ▼           ▼ │
               paused ◄──────────┘
    queued, running, paused ──► cancelled | expired
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import Connection, exists, func, insert, select, update

from models.base import db_now
from models.job import (
    ENDED_JOB_STATES,
    OPEN_CHUNK_STATES,
    OPEN_JOB_STATES,
    RUNNABLE_JOB_STATES,
    Chunk,
    Job,
    Request,
    Result,
)
from nightherd.errors import ConflictError, NotFoundError


def lock_jobs(connection: Connection, job_ids: Iterable[str]) -> dict[str, str]:
    """Locks job rows in id order and returns their states."""
    rows = connection.execute(
        select(Job.id, Job.state)
        .where(Job.id.in_(sorted(set(job_ids))))
        .order_by(Job.id)
        .with_for_update(key_share=True)
    )
    return {row.id: row.state for row in rows}


def _lock_job(connection: Connection, job_id: str) -> str:
    state = lock_jobs(connection, [job_id]).get(job_id)
    if state is None or state == "storing":
        raise NotFoundError(f"no job {job_id}; `nightherd jobs` lists them")
    return state


def _end(connection: Connection, job_id: str, state: str) -> None:
    """Ends a locked, open job early. What runs is left to its holder, who saves what finished."""
    connection.execute(
        update(Job).where(Job.id == job_id).values(state=state, finished_at=db_now())
    )
    connection.execute(
        update(Chunk)
        .where(Chunk.job_id == job_id, Chunk.state == "queued")
        .values(state="cancelled", finished_at=db_now())
    )


def cancel(connection: Connection, job_id: str) -> bool:
    """Cancels an open job; False if it was cancelled already. Finished results stay."""
    state = _lock_job(connection, job_id)
    if state == "cancelled":
        return False
    if state not in OPEN_JOB_STATES:
        raise ConflictError(f"job {job_id} is {state}; only an open job can be cancelled")
    _end(connection, job_id, "cancelled")
    return True


def pause(connection: Connection, job_id: str) -> bool:
    """Pauses a job; False if it is paused. Holders hand its chunks back within a second or two."""
    state = _lock_job(connection, job_id)
    if state == "paused":
        return False
    if state not in RUNNABLE_JOB_STATES:
        raise ConflictError(f"job {job_id} is {state}; only a queued or running job can be paused")
    connection.execute(update(Job).where(Job.id == job_id).values(state="paused"))
    return True


def resume(connection: Connection, job_id: str) -> bool:
    """Makes a paused job claimable again; False if it was."""
    state = _lock_job(connection, job_id)
    if state in RUNNABLE_JOB_STATES:
        return False
    if state != "paused":
        raise ConflictError(f"job {job_id} is {state}; only a paused job can be resumed")
    started = connection.execute(select(Job.started_at).where(Job.id == job_id)).scalar_one()
    connection.execute(
        update(Job).where(Job.id == job_id).values(state="running" if started else "queued")
    )
    # It may have been paused after its last chunk had ended.
    complete_ended(connection, [job_id])
    return True


def change(connection: Connection, job_id: str, values: dict[str, Any]) -> None:
    """Sets `priority`, `deadline` or `not_before` of an open job; the next claim heeds them."""
    state = _lock_job(connection, job_id)
    if state not in OPEN_JOB_STATES:
        raise ConflictError(f"job {job_id} is {state}; only an open job can be changed")
    connection.execute(update(Job).where(Job.id == job_id).values(**values))


def complete_ended(connection: Connection, job_ids: Iterable[str]) -> list[str]:
    """Completes those of these (locked) jobs that have no open chunk; returns their ids."""
    ended = []
    for job_id in sorted(set(job_ids)):
        hit = connection.execute(
            update(Job)
            .where(
                Job.id == job_id,
                Job.state.in_(OPEN_JOB_STATES),
                ~exists().where(Chunk.job_id == Job.id, Chunk.state.in_(OPEN_CHUNK_STATES)),
            )
            .values(state="completed", finished_at=db_now())
        )
        if hit.rowcount == 1:
            ended.append(job_id)
    return ended


def complete_all(connection: Connection) -> list[str]:
    """The tick's net under `complete_ended`: open jobs without an open chunk."""
    candidates = connection.execute(
        select(Job.id).where(
            Job.state.in_(OPEN_JOB_STATES),
            ~exists().where(Chunk.job_id == Job.id, Chunk.state.in_(OPEN_CHUNK_STATES)),
        )
    ).scalars()
    return complete_ended(connection, lock_jobs(connection, candidates))


def expire_overdue(connection: Connection) -> list[str]:
    """Ends open jobs past their deadline; what finished stays."""
    overdue = connection.execute(
        select(Job.id)
        .where(Job.state.in_(OPEN_JOB_STATES), Job.deadline <= db_now())
        .order_by(Job.id)
        .with_for_update(key_share=True, skip_locked=True)
    ).scalars()
    expired = list(overdue)
    for job_id in expired:
        _end(connection, job_id, "expired")
    return expired


def cancel_leftovers(connection: Connection) -> int:
    """Chunks that went back to `queued` while their job ended: nobody will claim them."""
    return connection.execute(
        update(Chunk)
        .where(
            Chunk.state == "queued",
            Chunk.job_id.in_(select(Job.id).where(Job.state.in_(ENDED_JOB_STATES))),
        )
        .values(state="cancelled", finished_at=db_now())
    ).rowcount


def retry(connection: Connection, job_id: str, *, only_code: str | None, chunk_size: int) -> int:
    """Queues the failed samples again, as chunks of a new pass; returns how many there are.

    A failed sample moves from the counters of the chunk that counted it to those of the new one;
    its old error stays in `results` until the new result replaces it.
    """
    state = _lock_job(connection, job_id)
    if state in ("cancelled", "expired"):
        raise ConflictError(f"job {job_id} is {state}; submit what is missing as a new job")
    passes = connection.execute(
        select(
            func.max(Chunk.pass_),
            func.max(Chunk.pass_).filter(Chunk.state.in_(OPEN_CHUNK_STATES)),
        ).where(Chunk.job_id == job_id)
    ).one()
    if (passes[1] or 0) > 1:
        raise ConflictError(f"a retry of job {job_id} is still running; wait for its end")
    failed_rows = (
        select(Request.position, Chunk.id.label("chunk_id"))
        .select_from(Result)
        .join(Request, (Request.job_id == Result.job_id) & (Request.index == Result.index))
        .join(
            Chunk,
            (Chunk.job_id == Result.job_id)
            & (Chunk.pass_ == Result.pass_)
            & (Request.position >= Chunk.first_position)
            & (Request.position < Chunk.first_position + Chunk.count),
        )
        .where(Result.job_id == job_id, Result.error_code.is_not(None), Chunk.state == "done")
        .order_by(Request.position)
    )
    if only_code is not None:
        failed_rows = failed_rows.where(Result.error_code == only_code)
    rows = connection.execute(failed_rows).all()
    if not rows:
        return 0
    moved: dict[int, int] = {}
    for row in rows:
        moved[row.chunk_id] = moved.get(row.chunk_id, 0) + 1
    for chunk_id in sorted(moved):
        connection.execute(
            update(Chunk)
            .where(Chunk.id == chunk_id)
            .values(samples=Chunk.samples - moved[chunk_id], failed=Chunk.failed - moved[chunk_id])
        )
    connection.execute(
        insert(Chunk),
        [
            {
                "job_id": job_id,
                "first_position": first,
                "count": last - first + 1,
                "samples": samples,
                "pass_": passes[0] + 1,
                "only_code": only_code,
                "state": "queued",
            }
            for first, last, samples in _ranges((row.position for row in rows), chunk_size)
        ],
    )
    if state == "completed":
        connection.execute(
            update(Job)
            .where(Job.id == job_id, Job.state == "completed")
            .values(state="running", finished_at=None)
        )
    return len(rows)


def _ranges(positions: Iterable[int], size: int) -> Iterator[tuple[int, int, int]]:
    """Groups sorted positions, one a sample, into (first, last, samples) of `size` requests."""
    first = last = -1
    requests = samples = 0
    for position in positions:
        if position != last:
            if requests == size:
                yield first, last, samples
                requests = samples = 0
            if requests == 0:
                first = position
            requests += 1
        last = position
        samples += 1
    yield first, last, samples
