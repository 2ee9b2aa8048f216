"""Workers' leases: register, renew, leave, and what is done about those that died."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    delete,
    func,
    insert,
    select,
    update,
)

from models.base import db_now, one_of
from models.job import Chunk, Request, Result
from models.store.chunks import CHUNK_COLUMNS, SOLO_DEATHS, PendingRequest, load_pending
from models.store.jobs import lock_jobs, returned_chunk
from models.store.results import ChunkSave, save
from models.worker import LIVE_WORKER_STATES, ServedCheckpoint, Sweep, Worker

ChunkRow = Row[*tuple[Any, ...]]
"""A row of `CHUNK_COLUMNS`."""


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
    """Adds a worker; an id that another one has raises IntegrityError."""
    own = select(Worker.id).where(
        Worker.id == worker.id, Worker.host == worker.host, Worker.pid == worker.pid
    )
    if connection.execute(own).first() is not None:
        return  # committed before, and only the answer was lost
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
    device: str | None = None,
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
            **({} if device is None else {"device": device}),
        )
    )
    return hit.rowcount == 1


def leave(connection: Connection, worker_id: str) -> int:
    """A worker goes in good order; what it still holds is returned, and is no death."""
    # The worker's row before any job's: so does the reaper.
    connection.execute(
        update(Worker)
        .where(Worker.id == worker_id, Worker.state.in_(LIVE_WORKER_STATES))
        .values(state="stopped", lease_until=db_now(), speed=0.0)
    )
    return _return_chunks(connection, Chunk.worker_id == worker_id)


def return_chunk(connection: Connection, worker_id: str, chunk_id: int, job_id: str) -> None:
    """Hands back a chunk of which its holder knows nothing (the answer to a claim was lost)."""
    _return_chunks(connection, (Chunk.id == chunk_id) & (Chunk.worker_id == worker_id))


def _return_chunks(
    connection: Connection,
    which: ColumnElement[bool],
    *,
    dead: Collection[str] = (),
    poison_deaths: int = 0,
) -> int:
    """Returns running chunks to the queue; those of `dead` workers have one more death."""
    running = one_of(Chunk.state, "running")
    held = connection.execute(
        select(Chunk.id, Chunk.job_id, Chunk.worker_id).where(running, which).order_by(Chunk.id)
    ).all()
    if not held:
        return 0
    states = lock_jobs(connection, [row.job_id for row in held])
    returned = 0
    for row in held:
        died = row.worker_id in dead
        hit = connection.execute(
            update(Chunk)
            .where(Chunk.id == row.id, Chunk.worker_id == row.worker_id, running)
            .values(deaths=Chunk.deaths + int(died), **returned_chunk(states.get(row.job_id)))
        )
        returned += hit.rowcount
        if hit.rowcount and died:
            _contain(connection, row.id, poison_deaths)
    return returned


def suspects(connection: Connection) -> list[str]:
    """Workers whose lease lapsed, and those that ended but hold a chunk (their claim was late)."""
    lapsed = select(Worker.id).where(
        one_of(Worker.state, *LIVE_WORKER_STATES), Worker.lease_until < db_now()
    )
    stranded = select(Chunk.worker_id).where(
        one_of(Chunk.state, "running"), Chunk.worker_id.not_in(_live())
    )
    return sorted(connection.execute(lapsed.union(stranded)).scalars())


def _live() -> Select[str]:
    return select(Worker.id).where(one_of(Worker.state, *LIVE_WORKER_STATES))


def reap(connection: Connection, of: Sequence[str], *, poison_deaths: int) -> list[str]:
    """Declares those of `of` dead whose lease lapsed and returns their chunks, in one transaction.

    Returns the ids of the dead. A request that was alone at `poison_deaths` deaths fails. Only what
    runs on them now counts as a death, not a chunk that a worker claimed after it had ended:
    nothing has computed it.
    """
    dead = list(
        connection.execute(
            select(Worker.id)
            .where(
                Worker.id.in_(of),
                one_of(Worker.state, *LIVE_WORKER_STATES),
                Worker.lease_until < db_now(),
            )
            .order_by(Worker.id)
            .with_for_update(skip_locked=True)
        ).scalars()
    )
    if dead:
        connection.execute(
            update(Worker).where(Worker.id.in_(dead)).values(state="dead", speed=0.0)
        )
    _return_chunks(
        connection,
        Chunk.worker_id.in_(of) & Chunk.worker_id.not_in(_live()),
        dead=dead,
        poison_deaths=poison_deaths,
    )
    return dead


def _contain(connection: Connection, chunk_id: int, poison_deaths: int) -> None:
    """Narrows down what kills workers: halves a chunk at its second death and at each further.

    Parts are claimed solo, so a bystander is never condemned. A single request left alone that
    dies `poison_deaths` times more fails as `poison`.
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
    elif len(pending) == 1 and chunk.deaths >= SOLO_DEATHS + poison_deaths:
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
    within = (
        select(Request.index)
        .where(Request.job_id == chunk.job_id, Request.position >= first, Request.position < end)
        .order_by(Request.position)
        .subquery()
    )

    def total(value: ColumnElement[int], *which: ColumnElement[bool]) -> ColumnElement[int]:
        # A subquery a request, not a join: see `load_pending`.
        of_request = select(func.coalesce(value, 0)).where(
            Result.job_id == chunk.job_id,
            Result.index == within.c.index,
            Result.pass_ == chunk.pass_,
            *which,
        )
        return func.coalesce(func.sum(of_request.scalar_subquery()), 0)

    ok = Result.error_code.is_(None)
    row = connection.execute(
        select(
            total(func.count(), ok).label("done"),
            total(func.count(), ~ok).label("failed"),
            total(func.sum(Result.prompt_tokens), ok, Result.sample == 0).label("prompt_tokens"),
            total(func.sum(Result.completion_tokens), ok).label("completion_tokens"),
        )
    ).one()
    return {name: int(value) for name, value in row._mapping.items()}


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
                f"last {chunk.deaths - SOLO_DEATHS} with nothing else in hand; see the workers' "
                "logs",
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
