"""Workers' leases: register, renew, leave, and what is done about those that died."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from models.base import db_now
from models.job import Chunk, Request, Result
from models.store.chunks import CHUNK_COLUMNS, SOLO_DEATHS, PendingRequest, load_pending
from models.store.jobs import complete_ended, lock_jobs
from models.store.results import ChunkSave, returned_state, save
from models.worker import LIVE_WORKER_STATES, ServedCheckpoint, Sweep, Worker

ChunkRow = Row[*tuple[Any, ...]]
"""A row of `CHUNK_COLUMNS`."""

POISON_DEATHS = SOLO_DEATHS + 2
"""A single request that was alone at two deaths is the cause."""


@dataclass(frozen=True, slots=True)
class NewWorker:
    id: str
    host: str
    pid: int
    device: str
    checkpoint_key: str
    serves: tuple[str, ...]
    """All keys that it answers to, its own included."""
    slots: int
    only_job: str | None
    version: str
    state: str = "starting"
    phase: str | None = None


def register(connection: Connection, worker: NewWorker, *, lease_seconds: float) -> None:
    connection.execute(
        insert(Worker).values(
            id=worker.id,
            host=worker.host,
            pid=worker.pid,
            device=worker.device,
            checkpoint_key=worker.checkpoint_key,
            slots=worker.slots,
            only_job=worker.only_job,
            version=worker.version,
            state=worker.state,
            phase=worker.phase,
            lease_until=db_now(lease_seconds),
        )
    )
    connection.execute(
        insert(ServedCheckpoint),
        [{"worker_id": worker.id, "checkpoint_key": key} for key in sorted(set(worker.serves))],
    )


def renew(
    connection: Connection,
    worker_id: str,
    *,
    lease_seconds: float,
    state: str,
    phase: str | None = None,
    speed: float = 0.0,
) -> bool:
    """Prolongs the lease; False if the worker was declared dead: it must register anew."""
    hit = connection.execute(
        update(Worker)
        .where(Worker.id == worker_id, Worker.state.in_(LIVE_WORKER_STATES))
        .values(
            lease_until=db_now(lease_seconds),
            renewed_at=db_now(),
            state=state,
            phase=phase,
            speed=speed,
        )
    )
    return hit.rowcount == 1


def leave(connection: Connection, worker_id: str) -> int:
    """A worker goes in good order; what it still holds is returned, and is no death."""
    returned = _return_chunks(connection, worker_id, deaths=0)
    connection.execute(
        update(Worker)
        .where(Worker.id == worker_id, Worker.state.in_(LIVE_WORKER_STATES))
        .values(state="stopped", lease_until=db_now(), speed=0.0)
    )
    return returned


def return_chunk(connection: Connection, worker_id: str, chunk_id: int, job_id: str) -> None:
    """Hands back a chunk of which its holder knows nothing (the answer to a claim was lost)."""
    lock_jobs(connection, [job_id])
    connection.execute(
        update(Chunk)
        .where(Chunk.id == chunk_id, Chunk.worker_id == worker_id, Chunk.state == "running")
        .values(state=returned_state(), worker_id=None)
    )


def _return_chunks(connection: Connection, worker_id: str, *, deaths: int) -> int:
    held = connection.execute(
        select(Chunk.id, Chunk.job_id)
        .where(Chunk.worker_id == worker_id, Chunk.state == "running")
        .order_by(Chunk.id)
    ).all()
    if not held:
        return 0
    lock_jobs(connection, [row.job_id for row in held])
    returned = 0
    for row in held:
        returned += connection.execute(
            update(Chunk)
            .where(Chunk.id == row.id, Chunk.worker_id == worker_id, Chunk.state == "running")
            .values(state=returned_state(), worker_id=None, deaths=Chunk.deaths + deaths)
        ).rowcount
        if deaths:
            _contain(connection, row.id)
    return returned


def reap(connection: Connection) -> list[str]:
    """Declares workers dead whose lease lapsed and returns their chunks, in one transaction.

    Also returns chunks that run on a worker that was dead already (a claim that raced with the
    reaper). Returns the ids of the dead.
    """
    dead = list(
        connection.execute(
            select(Worker.id)
            .where(Worker.state.in_(LIVE_WORKER_STATES), Worker.lease_until < db_now())
            .order_by(Worker.id)
            .with_for_update(skip_locked=True)
        ).scalars()
    )
    for worker_id in dead:
        connection.execute(
            update(Worker).where(Worker.id == worker_id).values(state="dead", speed=0.0)
        )
    gone = select(Worker.id).where(Worker.state.in_(LIVE_WORKER_STATES))
    stranded = connection.execute(
        select(Chunk.worker_id)
        .where(Chunk.state == "running", Chunk.worker_id.not_in(gone))
        .distinct()
    ).scalars()
    for holder in sorted({holder for holder in stranded if holder} | set(dead)):
        _return_chunks(connection, holder, deaths=1)
    return dead


def _contain(connection: Connection, chunk_id: int) -> None:
    """Narrows down what kills workers: halves a chunk at its second death and at each further.

    Parts are claimed solo, so a bystander is never condemned. A single request left alone that
    dies twice more fails as `poison`.
    """
    chunk = connection.execute(select(*CHUNK_COLUMNS).where(Chunk.id == chunk_id)).one()
    if chunk.deaths < SOLO_DEATHS or chunk.state != "queued":
        return
    pending = load_pending(
        connection,
        job_id=chunk.job_id,
        first_position=chunk.first_position,
        count=chunk.size,
        pass_=chunk.pass_,
        only_code=chunk.only_code,
    )
    if len(pending) > 1:
        _split(connection, chunk, pending)
    elif len(pending) == 1 and chunk.deaths >= POISON_DEATHS:
        _condemn(connection, chunk, pending[0])
    elif not pending:
        _close_empty(connection, chunk)


def _split(connection: Connection, chunk: ChunkRow, pending: Sequence[PendingRequest]) -> None:
    """The parent shrinks to the first half of what it owes, the rest becomes a new chunk."""
    cut = pending[len(pending) // 2].position
    end = chunk.first_position + chunk.size
    upper = _counters(connection, chunk, cut, end)
    owed = sum(len(p.samples) for p in pending if p.position >= cut)
    moved = {**upper, "samples": owed + upper["done"] + upper["failed"]}
    connection.execute(
        update(Chunk)
        .where(Chunk.id == chunk.id)
        .values(
            count=cut - chunk.first_position,
            deaths=SOLO_DEATHS,
            samples=chunk.samples - moved["samples"],
            **_counters(connection, chunk, chunk.first_position, cut),
        )
    )
    connection.execute(
        insert(Chunk).values(
            job_id=chunk.job_id,
            first_position=cut,
            count=end - cut,
            pass_=chunk.pass_,
            only_code=chunk.only_code,
            state="queued",
            fence=chunk.fence,
            deaths=SOLO_DEATHS,
            **moved,
        )
    )


def _counters(connection: Connection, chunk: ChunkRow, first: int, end: int) -> dict[str, int]:
    """A chunk's counters over positions [first, end), taken from the results themselves."""
    ok = Result.error_code.is_(None)
    row = connection.execute(
        select(
            func.count().filter(ok),
            func.count().filter(~ok),
            func.coalesce(func.sum(Result.prompt_tokens).filter(ok & (Result.sample == 0)), 0),
            func.coalesce(func.sum(Result.completion_tokens).filter(ok), 0),
        )
        .join_from(
            Request, Result, (Result.job_id == Request.job_id) & (Result.index == Request.index)
        )
        .where(
            Request.job_id == chunk.job_id,
            Request.position >= first,
            Request.position < end,
            Result.pass_ == chunk.pass_,
        )
    ).one()
    return dict(
        zip(("done", "failed", "prompt_tokens", "completion_tokens"), map(int, row), strict=True)
    )


def _condemn(connection: Connection, chunk: ChunkRow, request: PendingRequest) -> None:
    """Fails the request that killed each worker it ran on."""
    _take_over(
        connection,
        chunk,
        [
            {
                "index": request.index,
                "sample": sample,
                "text": None,
                "finish_reason": "error",
                "stop_reason": None,
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "logprobs": None,
                "error_code": "poison",
                "error_message": f"{chunk.deaths} workers died while they ran this request, the "
                "last two with nothing else in hand; see the workers' logs",
                "seed": None,
                "worker_id": None,
                "parameter_set_id": None,
                "provenance_id": None,
                "started_at": None,
                "finished_at": None,
                "seconds": None,
            }
            for sample in request.samples
        ],
    )


def _close_empty(connection: Connection, chunk: ChunkRow) -> None:
    """The worker died after its last save and before it could end the chunk."""
    _take_over(connection, chunk, [])


def _take_over(connection: Connection, chunk: ChunkRow, rows: list[dict[str, object]]) -> None:
    """Ends a queued chunk as its holder would, by the same guarded save."""
    holder = "housekeeping"
    connection.execute(
        update(Chunk)
        .where(Chunk.id == chunk.id, Chunk.state == "queued")
        .values(state="running", worker_id=holder, fence=chunk.fence + 1)
    )
    save(
        connection,
        holder,
        [
            ChunkSave(
                chunk_id=chunk.id,
                job_id=chunk.job_id,
                fence=chunk.fence + 1,
                pass_=chunk.pass_,
                done=chunk.done,
                failed=chunk.failed + len(rows),
                prompt_tokens=chunk.prompt_tokens,
                completion_tokens=chunk.completion_tokens,
                results=rows,
                end="done",
            )
        ],
    )
    complete_ended(connection, [chunk.job_id])


def forget_old_workers(connection: Connection, *, keep_seconds: float) -> int:
    """Removes rows of workers that ended long ago."""
    return connection.execute(
        delete(Worker).where(
            Worker.state.not_in(LIVE_WORKER_STATES), Worker.renewed_at < db_now(-keep_seconds)
        )
    ).rowcount


def elect(connection: Connection, sweep: str, *, period_seconds: float) -> bool:
    """Whether the caller is the one in the fleet that runs this sweep now, once a period."""
    hit = connection.execute(
        update(Sweep)
        .where(Sweep.name == sweep, Sweep.last_at <= db_now(-period_seconds))
        .values(last_at=db_now())
    )
    return hit.rowcount == 1
