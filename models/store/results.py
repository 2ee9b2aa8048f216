"""Saving what finished: results, counters and a chunk's end in one transaction, under its fence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, update
from sqlalchemy.dialects import postgresql, sqlite

from models.base import db_now
from models.job import Chunk, ParameterSet, Provenance, Result
from models.store.jobs import complete_ended, lock_jobs, returned_chunk

ResultRow = Mapping[str, Any]
"""The columns of `results`, by attribute name, but for `job_id` and `pass_`."""


@dataclass(slots=True)
class ChunkSave:
    """What a holder saves of one chunk. The counters are absolute: repeating a save is safe."""

    chunk_id: int
    job_id: str
    fence: int
    pass_: int
    done: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    results: Sequence[ResultRow] = field(default_factory=list)
    end: Literal["done", "return"] | None = None
    """`done`: all samples have results; `return`: the rest is queued again; None: it runs on."""


@dataclass(frozen=True, slots=True)
class SaveOutcome:
    lost: frozenset[int]
    """Chunks that were not the worker's any more: nothing of them was written."""
    completed: tuple[str, ...]
    """Jobs that this save completed."""


def _insert(connection: Connection, table: Any) -> Any:
    # Both dialects have ON CONFLICT, each in its own insert().
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table)


def save(connection: Connection, worker_id: str, chunks: Sequence[ChunkSave]) -> SaveOutcome:
    """Writes results of any number of chunks, each guarded by its fence.

    Jobs whose chunk ends are locked first, so that of two workers that end the last two chunks at
    once the second sees that it is the last.
    """
    ordered = sorted(chunks, key=lambda chunk: chunk.chunk_id)
    ending = [chunk.job_id for chunk in ordered if chunk.end is not None]
    states = lock_jobs(connection, ending) if ending else {}
    lost = frozenset(
        chunk.chunk_id
        for chunk in ordered
        if not _guarded_update(connection, worker_id, chunk, states.get(chunk.job_id))
    )
    rows = [
        {**row, "job_id": chunk.job_id, "pass_": chunk.pass_}
        for chunk in ordered
        if chunk.chunk_id not in lost
        for row in chunk.results
    ]
    if rows:
        connection.execute(_upsert_results(connection), rows)
    done = [chunk.job_id for chunk in ordered if chunk.end == "done" and chunk.chunk_id not in lost]
    return SaveOutcome(lost, tuple(complete_ended(connection, done)))


def _guarded_update(
    connection: Connection, worker_id: str, chunk: ChunkSave, job_state: str | None
) -> bool:
    values: dict[str, Any] = {
        "done": chunk.done,
        "failed": chunk.failed,
        "prompt_tokens": chunk.prompt_tokens,
        "completion_tokens": chunk.completion_tokens,
    }
    if chunk.end == "done":
        values |= {"state": "done", "finished_at": db_now()}
    elif chunk.end == "return":
        values |= returned_chunk(job_state, done=chunk.done, failed=chunk.failed)
    hit = connection.execute(
        update(Chunk)
        .where(
            Chunk.id == chunk.chunk_id,
            Chunk.fence == chunk.fence,
            Chunk.worker_id == worker_id,
            Chunk.state == "running",
        )
        .values(**values)
    )
    return hit.rowcount == 1


def _upsert_results(connection: Connection) -> Any:
    """A result is written once; only a later pass may replace it, and only a failure."""
    statement = _insert(connection, Result)
    new = statement.excluded
    return statement.on_conflict_do_update(
        index_elements=[Result.job_id, Result.index, Result.sample],
        set_={
            column: new[column.key] for column in Result.__table__.columns if not column.primary_key
        },
        where=Result.error_code.is_not(None) & (Result.pass_ < new["pass_"]),
    )


def store_parameter_set(connection: Connection, set_id: str, params: Mapping[str, Any]) -> None:
    connection.execute(
        _insert(connection, ParameterSet)
        .values(id=set_id, params=dict(params))
        .on_conflict_do_nothing()
    )


def store_provenance(connection: Connection, facts: Mapping[str, Any]) -> None:
    """`facts` are the columns of `provenance`, the id (a hash of the rest) included."""
    connection.execute(_insert(connection, Provenance).values(**facts).on_conflict_do_nothing())
