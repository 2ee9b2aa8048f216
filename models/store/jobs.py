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

from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import (
    Connection,
    Integer,
    Row,
    bindparam,
    case,
    exists,
    insert,
    null,
    select,
    update,
)

from models.base import db_now, one_of
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

_FETCH_ROWS = 10_000
"""Rows that are read from the database at a time."""
_MAX_SPAN = 20_000
"""Positions that a chunk of a retry covers at most."""

ChunkRow = Row[*tuple[Any, ...]]


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


def _cancelled_chunk(done: Any, failed: Any) -> dict[str, Any]:
    # What a retry has not run counts as failed again: the old errors are still in `results`.
    failed = case((Chunk.pass_ > 1, Chunk.samples - done), else_=failed)
    return {"state": "cancelled", "failed": failed, "finished_at": db_now()}


def returned_chunk(
    job_state: str | None, *, done: Any = Chunk.done, failed: Any = Chunk.failed
) -> dict[str, Any]:
    """The values of a chunk that its holder gives back, by the state of its (locked) job.

    `queued`, or `cancelled` if the job has ended meanwhile. `done` and `failed` are its counters.
    """
    if job_state in ENDED_JOB_STATES:
        return {"worker_id": None, **_cancelled_chunk(done, failed)}
    return {"worker_id": None, "state": "queued"}


def _end_early(connection: Connection, job_id: str, state: str) -> None:
    """Ends a locked, open job. Running chunks are left to their holders, who save what finished."""
    connection.execute(
        update(Job)
        .where(Job.id == job_id, Job.state.in_(OPEN_JOB_STATES))
        .values(state=state, finished_at=db_now())
    )
    connection.execute(
        update(Chunk)
        .where(Chunk.job_id == job_id, one_of(Chunk.state, "queued"))
        .values(**_cancelled_chunk(Chunk.done, Chunk.failed))
    )


def cancel(connection: Connection, job_id: str) -> bool:
    """Cancels an open job; False if it was cancelled already. Finished results stay."""
    state = _lock_job(connection, job_id)
    if state == "cancelled":
        return False
    if state not in OPEN_JOB_STATES:
        raise ConflictError(f"job {job_id} is {state}; only an open job can be cancelled")
    _end_early(connection, job_id, "cancelled")
    return True


def pause(connection: Connection, job_id: str) -> bool:
    """Pauses a job; False if it is paused. Holders hand its chunks back within a second or two."""
    state = _lock_job(connection, job_id)
    if state == "paused":
        return False
    if state not in RUNNABLE_JOB_STATES:
        raise ConflictError(f"job {job_id} is {state}; only a queued or running job can be paused")
    connection.execute(
        update(Job)
        .where(Job.id == job_id, Job.state.in_(RUNNABLE_JOB_STATES))
        .values(state="paused")
    )
    return True


def resume(connection: Connection, job_id: str) -> bool:
    """Makes a paused job claimable again; False if it is not paused."""
    state = _lock_job(connection, job_id)
    if state in RUNNABLE_JOB_STATES:
        return False
    if state != "paused":
        raise ConflictError(f"job {job_id} is {state}; only a paused job can be resumed")
    connection.execute(
        update(Job)
        .where(Job.id == job_id, Job.state == "paused")
        .values(state=case((Job.started_at.is_(None), "queued"), else_="running"))
    )
    return True


def change(connection: Connection, job_id: str, values: dict[str, Any]) -> None:
    """Sets `priority`, `deadline` or `not_before` of an open job, for the next claims."""
    state = _lock_job(connection, job_id)
    if state not in OPEN_JOB_STATES:
        raise ConflictError(f"job {job_id} is {state}; only an open job can be changed")
    connection.execute(update(Job).where(Job.id == job_id).values(**values))


def _has_open_chunk() -> Any:
    # One EXISTS a state: each has its partial index, however many chunks are done.
    return (
        exists().where(Chunk.job_id == Job.id, one_of(Chunk.state, "queued"))
        | exists().where(Chunk.job_id == Job.id, one_of(Chunk.state, "running"))
    )  # fmt: skip


def complete_ended(connection: Connection, job_ids: Iterable[str]) -> list[str]:
    """Completes those of these (locked) jobs that have no open chunk; returns their ids."""
    ended = []
    for job_id in sorted(set(job_ids)):
        hit = connection.execute(
            update(Job)
            .where(Job.id == job_id, Job.state.in_(OPEN_JOB_STATES), ~_has_open_chunk())
            .values(state="completed", finished_at=db_now())
        )
        if hit.rowcount == 1:
            ended.append(job_id)
    return ended


def complete_all(connection: Connection) -> list[str]:
    """Completes all open jobs without an open chunk: in the tick, for what a save has missed."""
    candidates = connection.execute(
        select(Job.id).where(one_of(Job.state, *OPEN_JOB_STATES), ~_has_open_chunk())
    ).scalars()
    found = list(candidates)
    return complete_ended(connection, lock_jobs(connection, found)) if found else []


def expire_overdue(connection: Connection) -> list[str]:
    """Ends open jobs past their deadline; what finished stays."""
    overdue = connection.execute(
        select(Job.id)
        .where(one_of(Job.state, *OPEN_JOB_STATES), Job.deadline <= db_now())
        .order_by(Job.id)
        .with_for_update(key_share=True, skip_locked=True)
    ).scalars()
    expired = list(overdue)
    for job_id in expired:
        _end_early(connection, job_id, "expired")
    return expired


def retry(connection: Connection, job_id: str, *, only_code: str | None, chunk_size: int) -> int:
    """Queues the failed samples again, as chunks of a new pass; returns how many there are.

    A failed sample moves from the counters of the chunk that counted it to those of the new one;
    its old error stays in `results` until the new result replaces it. Chunks of the first pass may
    still be open: what fails in them is for a later retry. Repeated while the same retry is open,
    it changes nothing and returns how many samples that one has left. A completed job loses a
    deadline that has passed.
    """
    state = _lock_job(connection, job_id)
    if state in ("cancelled", "expired"):
        raise ConflictError(f"job {job_id} is {state}; submit what is missing as a new job")
    chunks = connection.execute(
        select(
            Chunk.id,
            Chunk.pass_,
            Chunk.state,
            Chunk.first_position,
            Chunk.only_code,
            (Chunk.samples - Chunk.done - Chunk.failed).label("pending"),
        )
        .where(Chunk.job_id == job_id)
        .order_by(Chunk.first_position)
    ).all()
    running = [row for row in chunks if row.pass_ > 1 and row.state in OPEN_CHUNK_STATES]
    if running and running[0].only_code != only_code:
        raise ConflictError(f"another retry of job {job_id} is still running; wait for its end")
    if running:
        return sum(row.pending for row in running)
    moved: Counter[int] = Counter()
    barriers = [row.first_position for row in chunks if row.state in OPEN_CHUNK_STATES]
    new = [
        {
            "job_id": job_id,
            "first_position": first,
            "count": last - first + 1,
            "samples": samples,
            "pass_": max(row.pass_ for row in chunks) + 1,
            "only_code": only_code,
            "state": "queued",
        }
        for first, last, samples in _ranges(
            _failures(connection, job_id, only_code, chunks, moved), chunk_size, barriers
        )
    ]
    if not new:
        return 0
    moved_samples = bindparam("moved", type_=Integer())
    connection.execute(
        update(Chunk)
        .where(Chunk.id == bindparam("chunk"))
        .values(samples=Chunk.samples - moved_samples, failed=Chunk.failed - moved_samples),
        [{"chunk": chunk_id, "moved": count} for chunk_id, count in sorted(moved.items())],
    )
    connection.execute(insert(Chunk), new)
    connection.execute(
        update(Job)
        .where(Job.id == job_id, Job.state == "completed")
        .values(
            state="running",
            finished_at=None,
            deadline=case((Job.deadline <= db_now(), null()), else_=Job.deadline),
        )
    )
    return moved.total()


def _failures(
    connection: Connection,
    job_id: str,
    only_code: str | None,
    chunks: Sequence[ChunkRow],
    moved: Counter[int],
) -> Iterator[int]:
    """Positions of failed samples of `done` chunks, in order; counts them by chunk into `moved`."""
    # A subquery a row, not a join: see `load_pending`.
    position = (
        select(Request.position)
        .where(Request.job_id == Result.job_id, Request.index == Result.index)
        .scalar_subquery()
        .label("position")
    )
    failed = (
        select(position, Result.pass_)
        .where(Result.job_id == job_id, Result.error_code.is_not(None))
        .order_by(position)
    )
    if only_code is not None:
        failed = failed.where(Result.error_code == only_code)
    passes: dict[int, list[ChunkRow]] = {}
    for row in chunks:
        passes.setdefault(row.pass_, []).append(row)
    firsts = {pass_: [row.first_position for row in rows] for pass_, rows in passes.items()}
    rows = connection.execute(failed, execution_options={"yield_per": _FETCH_ROWS})
    for failed_at, pass_ in rows:
        # The chunks of one pass do not overlap.
        chunk = passes[pass_][bisect(firsts[pass_], failed_at) - 1]
        if chunk.state == "done":
            moved[chunk.id] += 1
            yield failed_at


def _ranges(
    positions: Iterable[int], size: int, barriers: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Groups sorted positions, one a sample, into (first, last, samples) of `size` requests.

    No range reaches across a barrier, the first position of an open chunk: what fails in that
    chunk later would be counted by both. None spans more than `_MAX_SPAN` positions, which bounds
    what its claim reads.
    """
    first = last = -1
    requests = samples = 0
    for position in positions:
        if position != last:
            over = requests == size or position - first >= _MAX_SPAN
            if requests and (over or bisect(barriers, position) != bisect(barriers, last)):
                yield first, last, samples
                requests = samples = 0
            if requests == 0:
                first = position
            requests += 1
        last = position
        samples += 1
    if requests:
        yield first, last, samples
