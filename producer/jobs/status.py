"""How far jobs are and who works on them, in a few statements however many requests there are.

Progress is a sum over chunk rows; requests and results are never counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, case, func, select

from models.base import db_now, one_of
from models.job import OPEN_JOB_STATES, Chunk, Job, Result
from models.worker import LIVE_WORKER_STATES, ServedCheckpoint, Worker
from nightherd.errors import NotFoundError, UsageError


def find_job(connection: Connection, prefix: str) -> str:
    """The id that begins so. Raises `NotFoundError`, or `UsageError` if several do."""
    prefix = prefix.strip().lower()
    if not (prefix.isascii() and prefix.isalnum()):
        # Nothing that could be an id, nor that every database takes as text.
        raise NotFoundError(f"no job {prefix!r}; `nightherd jobs` lists them")
    ids = list(
        connection.execute(
            select(Job.id)
            .where(Job.id.startswith(prefix), Job.state != "storing")
            .order_by(Job.id)
            .limit(4)
        ).scalars()
    )
    if not ids:
        raise NotFoundError(f"no job {prefix!r}; `nightherd jobs` lists them")
    if len(ids) > 1 and prefix not in ids:
        shown = ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")
        raise UsageError(f"{prefix!r} is the beginning of several jobs ({shown}); give more of it")
    return prefix if prefix in ids else ids[0]


def latest_job(connection: Connection) -> str | None:
    """The id of the job submitted last."""
    return connection.execute(
        select(Job.id)
        .where(Job.state != "storing")
        .order_by(Job.created_at.desc(), Job.id.desc())
        .limit(1)
    ).scalar_one_or_none()


@dataclass(slots=True)
class JobView:
    """A job as `jobs` and `status` show it; times are UTC, rates per second."""

    id: str
    name: str | None
    state: str
    checkpoint: str
    priority: int
    seed: int
    requests: int
    samples: int
    done: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    chunks_queued: int
    chunks_running: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    not_before: datetime | None
    deadline: datetime | None
    database_now: datetime
    tokens_per_second: float = 0.0
    """Recent output tokens per second of the workers that hold its chunks."""
    workers: int = 0
    """Workers that hold its chunks."""
    workers_serving: int = 0
    """Live workers that take its chunks."""

    @property
    def open(self) -> bool:
        return self.state in OPEN_JOB_STATES

    @property
    def pending(self) -> int:
        return self.samples - self.done - self.failed

    @property
    def seconds_left(self) -> float | None:
        """By the present speed and the mean length so far; None where either is unknown."""
        if not self.open or self.tokens_per_second <= 0 or not self.done:
            return None
        return self.pending * (self.completion_tokens / self.done) / self.tokens_per_second

    def as_json(self) -> dict[str, Any]:
        out = asdict(self)
        del out["database_now"]
        for name, value in out.items():
            if isinstance(value, datetime):
                out[name] = value.isoformat()
        left = self.seconds_left
        out["tokens_per_second"] = round(self.tokens_per_second, 2)
        out["pending"] = self.pending
        out["seconds_left"] = None if left is None else round(left, 1)
        return out


def job_views(
    connection: Connection,
    job_ids: Sequence[str] | None = None,
    *,
    open_only: bool = False,
    limit: int | None = None,
) -> list[JobView]:
    """Views of these jobs, or of the latest ones: three statements in all, newest first."""
    wanted = (
        select(Job, db_now().label("database_now"))
        .where(Job.state != "storing")
        .order_by(Job.created_at.desc(), Job.id.desc())
    )
    if job_ids is not None:
        wanted = wanted.where(Job.id.in_(job_ids))
    if open_only:
        wanted = wanted.where(Job.state.in_(OPEN_JOB_STATES))
    if limit is not None:
        wanted = wanted.limit(limit)
    jobs = connection.execute(wanted).all()
    sums = _chunk_sums(connection, [job.id for job in jobs])
    views = []
    for job in jobs:
        totals = sums.get(job.id, {})
        views.append(
            JobView(
                id=job.id,
                name=job.name,
                state=job.state,
                checkpoint=job.checkpoint_key,
                priority=job.priority,
                seed=job.seed,
                requests=job.total_requests,
                samples=job.total_samples,
                done=totals.get("done", 0),
                failed=totals.get("failed", 0),
                prompt_tokens=totals.get("prompt_tokens", 0),
                completion_tokens=totals.get("completion_tokens", 0),
                chunks_queued=totals.get("queued", 0),
                chunks_running=totals.get("running", 0),
                created_at=job.created_at,
                started_at=job.started_at,
                finished_at=job.finished_at,
                not_before=job.not_before,
                deadline=job.deadline,
                database_now=job.database_now,
            )
        )
    _add_workers(connection, views)
    return views


def job_view(connection: Connection, job_id: str) -> JobView:
    views = job_views(connection, [job_id])
    if not views:
        raise NotFoundError(f"no job {job_id!r}; `nightherd jobs` lists them")
    return views[0]


def _chunk_sums(connection: Connection, job_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    def total(column: Any) -> Any:
        return func.coalesce(func.sum(column), 0)

    rows = connection.execute(
        select(
            Chunk.job_id,
            total(Chunk.done).label("done"),
            total(Chunk.failed).label("failed"),
            total(Chunk.prompt_tokens).label("prompt_tokens"),
            total(Chunk.completion_tokens).label("completion_tokens"),
            total(case((Chunk.state == "queued", 1), else_=0)).label("queued"),
            total(case((Chunk.state == "running", 1), else_=0)).label("running"),
        )
        .where(Chunk.job_id.in_(job_ids))
        .group_by(Chunk.job_id)
    )
    return {
        row.job_id: {name: int(value) for name, value in row._mapping.items() if name != "job_id"}
        for row in rows
    }


def _add_workers(connection: Connection, views: Sequence[JobView]) -> None:
    """Speeds and worker counts; a worker's speed is shared out by the chunks that it holds."""
    open_views = [view for view in views if view.open]
    if not open_views:
        return
    rows = connection.execute(
        select(
            Worker.id,
            Worker.speed,
            Worker.only_job,
            ServedCheckpoint.checkpoint_key,
            Chunk.job_id,
            func.count(Chunk.id).label("held"),
        )
        .join(ServedCheckpoint, ServedCheckpoint.worker_id == Worker.id)
        .outerjoin(Chunk, (Chunk.worker_id == Worker.id) & one_of(Chunk.state, "running"))
        .where(Worker.state.in_(LIVE_WORKER_STATES), Worker.lease_until > db_now())
        .group_by(
            Worker.id,
            Worker.speed,
            Worker.only_job,
            ServedCheckpoint.checkpoint_key,
            Chunk.job_id,
        )
    ).all()
    held: dict[str, dict[str, int]] = {}
    speeds: dict[str, float] = {}
    serving: dict[tuple[str, str | None], set[str]] = {}
    for row in rows:
        speeds[row.id] = row.speed
        serving.setdefault((row.checkpoint_key, row.only_job), set()).add(row.id)
        if row.job_id is not None:
            held.setdefault(row.id, {})[row.job_id] = row.held
    for view in open_views:
        # A worker that serves one job alone does not count for others.
        takers = (serving.get((view.checkpoint, only), set()) for only in (None, view.id))
        view.workers_serving = sum(map(len, takers))
        for worker_id, chunks in held.items():
            if view.id in chunks:
                view.workers += 1
                share = chunks[view.id] / sum(chunks.values())
                view.tokens_per_second += speeds[worker_id] * share


def failures_by_code(connection: Connection, job_id: str) -> dict[str, int]:
    """Failed samples by error code; reads the index of failures alone."""
    rows = connection.execute(
        select(Result.error_code, func.count())
        .where(Result.job_id == job_id, Result.error_code.is_not(None))
        .group_by(Result.error_code)
        .order_by(Result.error_code)
    )
    return {str(code): int(count) for code, count in rows}


@dataclass(slots=True)
class WorkerView:
    """A worker as `workers` shows it."""

    id: str
    state: str
    phase: str | None
    checkpoint: str
    serves: list[str]
    host: str
    pid: int
    device: str
    slots: int
    chunks: int
    tokens_per_second: float
    only_job: str | None
    version: str
    started_at: datetime
    lease_seconds_left: float

    def as_json(self) -> dict[str, Any]:
        out = asdict(self)
        out["started_at"] = self.started_at.isoformat()
        out["lease_seconds_left"] = round(self.lease_seconds_left, 1)
        out["tokens_per_second"] = round(self.tokens_per_second, 2)
        return out


def worker_views(connection: Connection, *, include_ended: bool = False) -> list[WorkerView]:
    """Live workers (and those that ended recently), oldest first: two statements."""
    wanted = (
        select(
            Worker,
            db_now().label("database_now"),
            func.count(Chunk.id).label("chunks"),
        )
        .outerjoin(Chunk, (Chunk.worker_id == Worker.id) & one_of(Chunk.state, "running"))
        .group_by(Worker.id)
        .order_by(Worker.started_at, Worker.id)
    )
    if not include_ended:
        wanted = wanted.where(Worker.state.in_(LIVE_WORKER_STATES))
    serves: dict[str, list[str]] = {}
    for worker_id, key in connection.execute(
        select(ServedCheckpoint.worker_id, ServedCheckpoint.checkpoint_key)
    ):
        serves.setdefault(worker_id, []).append(key)
    views = []
    for row in connection.execute(wanted):
        left = (row.lease_until - row.database_now).total_seconds()
        live = row.state in LIVE_WORKER_STATES
        views.append(
            WorkerView(
                id=row.id,
                state="lapsed" if live and left < 0 else row.state,
                phase=row.phase,
                checkpoint=row.checkpoint_key,
                serves=sorted(serves.get(row.id, [])),
                host=row.host,
                pid=row.pid,
                device=row.device,
                slots=row.slots,
                chunks=row.chunks,
                tokens_per_second=row.speed,
                only_job=row.only_job,
                version=row.version,
                started_at=row.started_at,
                lease_seconds_left=max(0.0, left),
            )
        )
    return views


def serving_workers(connection: Connection, key: str) -> list[str]:
    """Ids of live workers that take any job of this checkpoint, those that still load included."""
    return list(
        connection.execute(
            select(Worker.id)
            .join(ServedCheckpoint, ServedCheckpoint.worker_id == Worker.id)
            .where(
                ServedCheckpoint.checkpoint_key == key,
                Worker.only_job.is_(None),
                Worker.state.in_(("starting", "ready")),
                Worker.lease_until > db_now(),
            )
            .order_by(Worker.id)
        ).scalars()
    )
