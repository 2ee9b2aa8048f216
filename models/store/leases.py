"""Workers' leases: register, renew, leave; and what is done about workers that died."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    delete,
    insert,
    select,
    update,
)

from models.base import db_now, one_of
from models.job import Chunk
from models.store.jobs import lock_jobs, returned_chunk
from models.store.poison import bisect_after_death
from models.worker import LIVE_WORKER_STATES, ServedCheckpoint, Sweep, Worker


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
    """A worker stops of its own accord; what it still holds is returned, and is no death."""
    # The worker's row before any job's: so does the reaper.
    connection.execute(
        update(Worker)
        .where(Worker.id == worker_id, Worker.state.in_(LIVE_WORKER_STATES))
        .values(state="stopped", lease_until=db_now(), speed=0.0)
    )
    return _return_chunks(connection, Chunk.worker_id == worker_id)


def return_chunk(connection: Connection, worker_id: str, chunk_id: int, job_id: str) -> None:
    """Returns a chunk that its holder does not know of (the answer to its claim was lost)."""
    _return_chunks(connection, (Chunk.id == chunk_id) & (Chunk.worker_id == worker_id))


def _return_chunks(
    connection: Connection,
    which: ColumnElement[bool],
    *,
    dead: Collection[str] = (),
    poison_deaths: int = 0,
) -> int:
    """Returns running chunks to the queue; those of `dead` workers count one more death."""
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
            bisect_after_death(connection, row.id, poison_deaths)
    return returned


def workers_to_reap(connection: Connection) -> list[str]:
    """Ids of live workers whose lease lapsed, and of ended ones that still hold a chunk.

    (An ended worker holds a chunk if its claim was committed after it had ended.)
    """
    lapsed = select(Worker.id).where(
        one_of(Worker.state, *LIVE_WORKER_STATES), Worker.lease_until < db_now()
    )
    stranded = select(Chunk.worker_id).where(
        one_of(Chunk.state, "running"), Chunk.worker_id.not_in(_live())
    )
    return sorted(connection.execute(lapsed.union(stranded)).scalars())


def _live() -> Select[str]:
    return select(Worker.id).where(one_of(Worker.state, *LIVE_WORKER_STATES))


def reap(connection: Connection, worker_ids: Sequence[str], *, poison_deaths: int) -> list[str]:
    """Declares those of `worker_ids` dead whose lease has lapsed, and returns their chunks.

    Returns the ids of the dead. What ran on them counts one more death, and is bisected (see
    `bisect_after_death`). A chunk that a worker claimed after it had ended counts none: nothing
    has computed it.
    """
    dead = list(
        connection.execute(
            select(Worker.id)
            .where(
                Worker.id.in_(worker_ids),
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
        Chunk.worker_id.in_(worker_ids) & Chunk.worker_id.not_in(_live()),
        dead=dead,
        poison_deaths=poison_deaths,
    )
    return dead


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
