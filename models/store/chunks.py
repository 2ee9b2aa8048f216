"""Claiming chunks, loading their pending requests, asking whether they are still wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Text, cast, exists, func, select, update

from models.base import db_now, one_of
from models.job import ENDED_JOB_STATES, RUNNABLE_JOB_STATES, Chunk, Job, Request, Result
from models.worker import LIVE_WORKER_STATES, ServedCheckpoint, Worker

ISOLATE_AFTER_DEATHS = 2
"""From this many deaths on (workers that died while they ran it) a chunk is claimed isolated: by a
worker that runs nothing else, and claims nothing else until the chunk has ended."""


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
    isolated: bool
    """Its holder must run nothing beside it (see `ISOLATE_AFTER_DEATHS`)."""
    samples: int
    done: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    checkpoint_key: str
    params: dict[str, Any]
    seed: int
    priority: int


ClaimOutcome = Claim | Literal["nothing", "again", "isolated waits", "not registered"]
"""`again`: another took the last chunk of the best job meanwhile; look once more."""


def _claimable(only_job: str | None = None) -> list[ColumnElement[bool]]:
    """What a job must be for its queued chunks to be claimable now."""
    conditions = [
        one_of(Job.state, *RUNNABLE_JOB_STATES),
        Job.not_before.is_(None) | (Job.not_before <= db_now()),
        Job.deadline.is_(None) | (Job.deadline > db_now()),
    ]
    return conditions if only_job is None else [*conditions, Job.id == only_job]


def _has_queued_chunk() -> ColumnElement[bool]:
    # Not EXISTS, which PostgreSQL may turn into a join with all queued chunks of all jobs.
    some = select(Chunk.id).where(Chunk.job_id == Job.id, one_of(Chunk.state, "queued")).limit(1)
    return some.scalar_subquery().is_not(None)


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
    must run isolated is taken only if the worker is `idle`; else the answer is `isolated waits`,
    and the worker claims nothing more until it is idle.
    """
    candidates = (
        select(Job.id)
        .where(*_claimable(only_job), Job.checkpoint_key.in_(keys), _has_queued_chunk())
        .order_by(Job.priority.desc(), Job.deadline.asc().nulls_last(), Job.created_at, Job.id)
        .limit(1)
    )
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
        .where(*_claimable(best))
        .with_for_update(key_share=True)
    ).one_or_none()
    if job is None:
        return "again"
    chunk = connection.execute(
        select(*CHUNK_COLUMNS)
        .where(Chunk.job_id == best, one_of(Chunk.state, "queued"))
        .order_by(Chunk.deaths, Chunk.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    ).one_or_none()
    if chunk is None:
        return "again"
    isolated = chunk.deaths >= ISOLATE_AFTER_DEATHS
    if isolated and not idle:
        return "isolated waits"
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
        isolated=isolated,
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
    """A request of a claimed chunk, and which of its samples have no result yet."""

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
    """Requests that a chunk must still run, with their samples.

    In the first pass those without a result; in a retry those that failed in an earlier pass, with
    `only_code` alone if that is given.
    """
    of_request = [Result.job_id == Request.job_id, Result.index == Request.index]
    if pass_ > 1:
        of_request += [Result.error_code.is_not(None), Result.pass_ < pass_]
    if only_code is not None:
        of_request.append(Result.error_code == only_code)
    # A subquery a request, not a join: of a new job PostgreSQL's statistics know nothing, it takes
    # the job for one row and joins in a nested loop over all of it (measured: 8 s a chunk).
    listed = (
        select(func.aggregate_strings(cast(Result.sample, Text), ","))
        .where(*of_request)
        .scalar_subquery()
    )
    query = (
        select(
            Request.index.label("number"),  # a row's own `index` is a method
            Request.position,
            Request.body,
            Request.params,
            Request.samples,
            listed.label("listed"),
        )
        .where(
            Request.job_id == job_id,
            Request.position >= first_position,
            Request.position < first_position + count,
        )
        .order_by(Request.position)
    )
    if pass_ > 1:
        query = query.where(listed.is_not(None))
    pending = []
    for row in connection.execute(query):
        samples = {int(sample) for sample in row.listed.split(",")} if row.listed else set()
        remaining = samples if pass_ > 1 else set(range(row.samples)) - samples
        if remaining:
            pending.append(
                PendingRequest(
                    row.number, row.position, row.body, row.params, tuple(sorted(remaining))
                )
            )
    return pending


@dataclass(frozen=True, slots=True)
class Held:
    """A chunk that a worker holds by SQL, under this fence."""

    fence: int
    job_id: str
    job_state: str
    priority: int = 0
    """The job's current one: it may have been changed since the claim."""

    @property
    def wanted(self) -> bool:
        """Whether the job still runs: it is neither paused nor ended."""
        return self.job_state in RUNNABLE_JOB_STATES


def held_by(connection: Connection, worker_id: str) -> dict[int, Held]:
    """The running chunks of a worker by id, with the states of their jobs."""
    rows = connection.execute(
        select(Chunk.id, Chunk.fence, Chunk.job_id, Job.state, Job.priority)
        .join(Job, Job.id == Chunk.job_id)
        .where(Chunk.worker_id == worker_id, one_of(Chunk.state, "running"))
    )
    return {row.id: Held(row.fence, row.job_id, row.state, row.priority) for row in rows}


def queued_above(
    connection: Connection, keys: Sequence[str], priority: int, *, limit: int
) -> list[int]:
    """The priorities of up to `limit` claimable chunks that go before `priority`, best first."""
    jobs = connection.execute(
        select(Job.id, Job.checkpoint_key, Job.priority)
        .where(
            *_claimable(),
            Job.checkpoint_key.in_(keys),
            Job.priority > priority,
            _has_queued_chunk(),
        )
        .order_by(Job.priority.desc())
        .limit(limit)
    ).all()
    found: list[int] = []
    for job in jobs:
        left = limit - len(found)
        if left > 0:
            count = count_queued(connection, job.checkpoint_key, limit=left, only_job=job.id)
            found += [job.priority] * count
    return found


def count_queued(
    connection: Connection, key: str, *, limit: int, only_job: str | None = None
) -> int:
    """Claimable chunks of a checkpoint, counted up to `limit`."""
    jobs = select(Job.id).where(*_claimable(only_job), Job.checkpoint_key == key)
    some = (
        select(Chunk.id).where(one_of(Chunk.state, "queued"), Chunk.job_id.in_(jobs)).limit(limit)
    )
    return connection.execute(select(func.count()).select_from(some.subquery())).scalar_one()


def keys_with_work(connection: Connection) -> list[str]:
    """Checkpoint keys for which some chunk is claimable."""
    return list(
        connection.execute(
            select(Job.checkpoint_key).where(*_claimable(), _has_queued_chunk()).distinct()
        ).scalars()
    )


def live_slots(connection: Connection, key: str) -> dict[str | None, int]:
    """Slots of live workers that serve a key: by the only job of theirs, None for any job."""
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
    """Whether a job is completed, cancelled, expired or deleted."""
    state = connection.execute(select(Job.state).where(Job.id == job_id)).scalar_one_or_none()
    return state is None or state in ENDED_JOB_STATES
