"""Which request kills workers: a chunk is halved death by death, and what is left alone fails.

At its second death, and at each further one, what is left of a chunk is cut in half, and each half
is isolated: claimed with nothing beside it. A single request that goes on killing workers is stored
as failed with the code `poison`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, insert, select, update

from models.job import Chunk, Request, Result
from models.store.chunks import CHUNK_COLUMNS, ISOLATE_AFTER_DEATHS, PendingRequest, load_pending
from models.store.results import ChunkSave, save
from nightherd.errors import RowErrorCode

ChunkRow = Row[*tuple[Any, ...]]
"""A row of `CHUNK_COLUMNS`."""


def bisect_after_death(connection: Connection, chunk_id: int, poison_deaths: int) -> None:
    """Narrows down what kills workers: halves a chunk at its second death and at each further.

    The halves are claimed isolated (see `chunks.claim`), so no request fails for what another one
    did. A chunk of a single request with `poison_deaths` further deaths fails as `poison`.
    """
    chunk = connection.execute(select(*CHUNK_COLUMNS).where(Chunk.id == chunk_id)).one()
    if chunk.deaths < ISOLATE_AFTER_DEATHS or chunk.state != "queued":
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
    elif len(pending) == 1 and chunk.deaths >= ISOLATE_AFTER_DEATHS + poison_deaths:
        _fail_as_poison(connection, chunk, pending[0])
    elif not pending:
        _end_finished(connection, chunk)


def _split(connection: Connection, chunk: ChunkRow, pending: Sequence[PendingRequest]) -> None:
    """Cuts a chunk in two: it keeps the first half of `pending`, a new chunk gets the rest."""
    cut = pending[len(pending) // 2].position
    end = chunk.first_position + chunk.size
    upper = _counters(connection, chunk, cut, end)
    pending_samples = sum(len(p.samples) for p in pending if p.position >= cut)
    upper_half = {**upper, "samples": pending_samples + upper["done"] + upper["failed"]}
    connection.execute(
        update(Chunk)
        .where(Chunk.id == chunk.id)
        .values(
            count=cut - chunk.first_position,
            deaths=ISOLATE_AFTER_DEATHS,
            samples=chunk.samples - upper_half["samples"],
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
            deaths=ISOLATE_AFTER_DEATHS,
            **upper_half,
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

    def total(value: ColumnElement[int], *where: ColumnElement[bool]) -> ColumnElement[int]:
        # A subquery a request, not a join: see `load_pending`.
        of_request = select(func.coalesce(value, 0)).where(
            Result.job_id == chunk.job_id,
            Result.index == within.c.index,
            Result.pass_ == chunk.pass_,
            *where,
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


def _fail_as_poison(connection: Connection, chunk: ChunkRow, request: PendingRequest) -> None:
    """Fails the request that every worker died with that ran it."""
    code: RowErrorCode = "poison"
    _end_queued(
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
                "error_code": code,
                "error_message": f"{chunk.deaths} workers died while they ran this request, the "
                f"last {chunk.deaths - ISOLATE_AFTER_DEATHS} with nothing else in hand; see the "
                "workers' logs",
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


def _end_finished(connection: Connection, chunk: ChunkRow) -> None:
    """Ends a chunk whose worker died after its last save and before it could end it itself."""
    _end_queued(connection, chunk, [])


def _end_queued(connection: Connection, chunk: ChunkRow, rows: list[dict[str, object]]) -> None:
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
