"""Claiming chunks, loading what they owe, asking whether they are still wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, and_, exists, func, select, update

from models.base import db_now
from models.job import ENDED_JOB_STATES, RUNNABLE_JOB_STATES, Chunk, Job, Request, Result
from models.worker import LIVE_WORKER_STATES, ServedCheckpoint, Worker

SOLO_DEATHS = 2
"""A chunk that was running on so many workers that died is claimed with nothing beside it."""


CHUNK_COLUMNS = (
    Chunk.id,
    Chunk.job_id,
    Chunk.state,
    Chunk.fence,
    Chunk.deaths,
    Chunk.first_position,
    Chunk.count.label("size"),  # a row's own `count` is a method
    Chunk.pass_,
    Chunk.only_code,
    Chunk.samples,
    Chunk.done,
    Chunk.failed,
    Chunk.prompt_tokens,
    Chunk.completion_tokens,
)


@dataclass(frozen=True, slots=True)
class Claim:
    """A chunk held under a fence, with what its holder must know of the job."""

    chunk_id: int
    job_id: str
    fence: int
    first_position: int
    count: int
    pass_: int
    only_code: str | None
    solo: bool
    samples: int
    done: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    checkpoint_key: str
    params: dict[str, Any]
    seed: int
    priority: int


ClaimOutcome = Claim | Literal["nothing", "again", "solo waits", "not registered"]
"""`again`: another took the last chunk of the best job meanwhile; look once more."""


def claim(
    connection: Connection,
    worker_id: str,
    *,
    keys: Sequence[str],
    only_job: str | None = None,
    idle: bool = True,
) -> ClaimOutcome:
    """Claims the best queued chunk for these checkpoint keys.

    Best is: job priority, deadline, age; in a job, chunks that never saw a worker die, in order.
    Only one job row is locked, so this cannot deadlock with any other statement. A chunk that
    must run solo is taken only if the worker is `idle`; else the answer says that it waits, and
    the worker claims nothing more until it is.
    """
    waiting = exists().where(Chunk.job_id == Job.id, Chunk.state == "queued")
    candidates = (
        select(Job.id)
        .where(
            Job.state.in_(RUNNABLE_JOB_STATES),
            Job.checkpoint_key.in_(keys),
            Job.not_before.is_(None) | (Job.not_before <= db_now()),
            Job.deadline.is_(None) | (Job.deadline > db_now()),
            waiting,
        )
        .order_by(Job.priority.desc(), Job.deadline.asc().nulls_last(), Job.created_at, Job.id)
        .limit(1)
    )
    if only_job is not None:
        candidates = candidates.where(Job.id == only_job)
    best = connection.execute(candidates).scalar_one_or_none()
    if best is None:
        return "nothing"
    job = connection.execute(
        select(
            Job.id,
            Job.state,
            Job.checkpoint_key,
            Job.params,
            Job.seed,
            Job.priority,
            Job.started_at,
        )
        .where(Job.id == best, Job.state.in_(RUNNABLE_JOB_STATES))
        .with_for_update(key_share=True)
    ).one_or_none()
    if job is None:
        return "again"
    chunk = connection.execute(
        select(*CHUNK_COLUMNS)
        .where(Chunk.job_id == best, Chunk.state == "queued")
        .order_by(Chunk.deaths, Chunk.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    ).one_or_none()
    if chunk is None:
        return "again"
    solo = chunk.deaths >= SOLO_DEATHS
    if solo and not idle:
        return "solo waits"
    registered = exists().where(Worker.id == worker_id, Worker.state == "ready")
    hit = connection.execute(
        update(Chunk)
        .where(Chunk.id == chunk.id, Chunk.state == "queued", registered)
        .values(state="running", worker_id=worker_id, fence=Chunk.fence + 1, claimed_at=db_now())
    )
    if hit.rowcount != 1:
        return "not registered"
    if job.state == "queued":
        values: dict[str, Any] = {"state": "running"}
        if job.started_at is None:
            values["started_at"] = db_now()
        connection.execute(
            update(Job).where(Job.id == best, Job.state == "queued").values(**values)
        )
    return Claim(
        chunk_id=chunk.id,
        job_id=best,
        fence=chunk.fence + 1,
        first_position=chunk.first_position,
        count=chunk.size,
        pass_=chunk.pass_,
        only_code=chunk.only_code,
        solo=solo,
        samples=chunk.samples,
        done=chunk.done,
        failed=chunk.failed,
        prompt_tokens=chunk.prompt_tokens,
        completion_tokens=chunk.completion_tokens,
        checkpoint_key=job.checkpoint_key,
        params=job.params,
        seed=job.seed,
        priority=job.priority,
    )


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request of a claimed chunk, and which of its samples are still owed."""

    index: int
    position: int
    body: dict[str, Any]
    params: dict[str, Any] | None
    samples: tuple[int, ...]


def load_pending(
    connection: Connection,
    *,
    job_id: str,
    first_position: int,
    count: int,
    pass_: int,
    only_code: str | None,
) -> list[PendingRequest]:
    """What a chunk owes: samples without a result; in a retry, failed ones of earlier passes."""
    within = and_(
        Request.job_id == job_id,
        Request.position >= first_position,
        Request.position < first_position + count,
    )
    columns = (
        Request.index.label("number"),  # a row's own `index` is a method
        Request.position,
        Request.body,
        Request.params,
    )
    same_request = and_(Result.job_id == Request.job_id, Result.index == Request.index)
    owed: dict[int, list[int]] = {}
    if pass_ == 1:
        rows = connection.execute(
            select(*columns, Request.samples).where(within).order_by(Request.position)
        ).all()
        owed = {row.number: list(range(row.samples)) for row in rows}
        saved = connection.execute(
            select(Result.index, Result.sample)
            .join_from(Request, Result, same_request)
            .where(within)
        )
        for number, sample in saved:
            owed[number].remove(sample)
        distinct = {row.number: row for row in rows}
    else:
        failed = (
            select(*columns, Result.sample)
            .join_from(Result, Request, same_request)
            .where(within, Result.error_code.is_not(None), Result.pass_ < pass_)
            .order_by(Request.position, Result.sample)
        )
        if only_code is not None:
            failed = failed.where(Result.error_code == only_code)
        again = connection.execute(failed).all()
        for row in again:
            owed.setdefault(row.number, []).append(row.sample)
        distinct = {row.number: row for row in again}
    return [
        PendingRequest(number, row.position, row.body, row.params, tuple(owed[number]))
        for number, row in distinct.items()
        if owed[number]
    ]


@dataclass(frozen=True, slots=True)
class Held:
    """A chunk that SQL says a worker holds."""

    fence: int
    job_id: str
    job_state: str

    @property
    def wanted(self) -> bool:
        return self.job_state in RUNNABLE_JOB_STATES


def held_by(connection: Connection, worker_id: str) -> dict[int, Held]:
    """Which chunks are this worker's own, and whether their jobs still want them."""
    rows = connection.execute(
        select(Chunk.id, Chunk.fence, Chunk.job_id, Job.state)
        .join(Job, Job.id == Chunk.job_id)
        .where(Chunk.worker_id == worker_id, Chunk.state == "running")
    )
    return {row.id: Held(row.fence, row.job_id, row.state) for row in rows}


def count_queued(
    connection: Connection, key: str, *, limit: int, only_job: str | None = None
) -> int:
    """Claimable chunks of a checkpoint, counted up to `limit`."""
    some = (
        select(Chunk.id)
        .join(Job, Job.id == Chunk.job_id)
        .where(
            Chunk.state == "queued",
            Job.state.in_(RUNNABLE_JOB_STATES),
            Job.checkpoint_key == key,
            Job.not_before.is_(None) | (Job.not_before <= db_now()),
        )
        .limit(limit)
    )
    if only_job is not None:
        some = some.where(Job.id == only_job)
    return connection.execute(select(func.count()).select_from(some.subquery())).scalar_one()


def keys_with_work(connection: Connection) -> list[str]:
    """Checkpoint keys for which some chunk is claimable."""
    return list(
        connection.execute(
            select(Job.checkpoint_key)
            .where(
                Job.state.in_(RUNNABLE_JOB_STATES),
                Job.not_before.is_(None) | (Job.not_before <= db_now()),
                exists().where(Chunk.job_id == Job.id, Chunk.state == "queued"),
            )
            .distinct()
        ).scalars()
    )


def live_slots(connection: Connection, key: str) -> dict[str | None, int]:
    """Slots of live workers that answer to a key: by the one job that they serve, or None."""
    rows = connection.execute(
        select(Worker.only_job, func.sum(Worker.slots))
        .join(ServedCheckpoint, ServedCheckpoint.worker_id == Worker.id)
        .where(
            ServedCheckpoint.checkpoint_key == key,
            Worker.state.in_(LIVE_WORKER_STATES),
            Worker.lease_until > db_now(),
        )
        .group_by(Worker.only_job)
    )
    return {row[0]: int(row[1]) for row in rows}


def job_has_ended(connection: Connection, job_id: str) -> bool:
    """Whether a job is completed, cancelled or expired (or gone)."""
    state = connection.execute(select(Job.state).where(Job.id == job_id)).scalar_one_or_none()
    return state is None or state in ENDED_JOB_STATES
