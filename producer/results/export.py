"""Results out of SQL, in input order, in key-set pages: no long transaction, any size of job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, tuple_

from models.database import Database
from models.job import Job, ParameterSet, Provenance, Request, Result
from nightherd.engine_kinds import stored_kind
from nightherd.errors import NotFoundError

PAGE = 2_000


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Which rows, and which fields beyond the usual ones."""

    limit: int | None = None
    failed: bool = False
    """Only failed samples."""
    code: str | None = None
    """Only failures of this code."""
    with_input: bool = False
    with_metadata: bool = False
    with_provenance: bool = False
    with_logprobs: bool = False


def iterate_results(
    database: Database, job_id: str, options: ExportOptions | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of results as they stand now, by index, then sample; each page its own transaction."""
    options = options or ExportOptions()
    after: tuple[int, int] = (-1, -1)
    left = options.limit
    provenance: dict[str, dict[str, Any]] = {}
    while left is None or left > 0:
        page = PAGE if left is None else min(PAGE, left)
        query = _page(job_id, after, page, options)

        def fetch(connection: Connection, query: Any = query) -> Sequence[Any]:
            rows = connection.execute(query).all()
            if options.with_provenance:
                wanted = {row.provenance_id for row in rows if row.provenance_id} - set(provenance)
                provenance.update(load_provenance(connection, wanted))
            return rows

        rows = database.retrying(fetch, reading=True)
        for row in rows:
            yield _as_row(row, options, provenance)
        if len(rows) < page:
            return
        after = (rows[-1].number, rows[-1].sample)
        if left is not None:
            left -= len(rows)


def _page(job_id: str, after: tuple[int, int], size: int, options: ExportOptions) -> Any:
    def of_request(column: Any) -> Any:
        # A subquery a row, not a join: it takes the same way whatever PostgreSQL's statistics say.
        request = select(column).where(
            Request.job_id == Result.job_id, Request.index == Result.index
        )
        return request.scalar_subquery().label(column.key)

    columns: list[Any] = [
        Result.index.label("number"),
        Result.sample,
        of_request(Request.custom_id),
        Result.text,
        Result.finish_reason,
        Result.stop_reason,
        Result.prompt_tokens,
        Result.completion_tokens,
        Result.error_code,
        Result.error_message,
        Result.provenance_id,
    ]
    if options.with_input or options.with_metadata:
        columns.append(of_request(Request.body))
    if options.with_logprobs:
        columns.append(Result.logprobs)
    query = (
        select(*columns)
        .where(
            Result.job_id == job_id,
            # As one comparison of rows: an OR of two would read the job from its start each time.
            tuple_(Result.index, Result.sample) > tuple_(*after),
        )
        .order_by(Result.index, Result.sample)
        .limit(size)
    )
    if options.failed or options.code is not None:
        query = query.where(Result.error_code.is_not(None))
    if options.code is not None:
        query = query.where(Result.error_code == options.code)
    return query


def _as_row(
    row: Any, options: ExportOptions, provenance: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    error = None
    if row.error_code is not None:
        error = {"code": row.error_code, "message": row.error_message}
    out: dict[str, Any] = {
        "index": row.number,
        "sample": row.sample,
        "custom_id": row.custom_id,
        "text": row.text,
        "finish_reason": row.finish_reason,
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "error": error,
    }
    if options.with_logprobs:
        out["stop_reason"] = row.stop_reason
        out["logprobs"] = row.logprobs
    if options.with_input:
        out["input"] = {name: v for name, v in row.body.items() if name != "metadata"}
    if options.with_metadata:
        out["metadata"] = row.body.get("metadata")
    if options.with_provenance:
        out["provenance"] = provenance.get(row.provenance_id)
    return out


def load_provenance(connection: Connection, ids: set[str]) -> dict[str, dict[str, Any]]:
    """Provenance rows by id, as JSON values; engines have today's names."""
    if not ids:
        return {}
    rows = connection.execute(select(Provenance).where(Provenance.id.in_(ids)))
    return {
        row.id: {name: value for name, value in row._mapping.items() if name != "id"}
        | {"engine": stored_kind(row.engine)}
        for row in rows
    }


def show_request(database: Database, job_id: str, index: int) -> dict[str, Any]:
    """Everything about one request: input, effective parameters, each sample's result."""
    return database.retrying(
        lambda connection: _request_detail(connection, job_id, index), reading=True
    )


def _request_detail(connection: Connection, job_id: str, index: int) -> dict[str, Any]:
    job = connection.execute(
        select(Job.params, Job.seed, Job.template, Job.total_requests).where(Job.id == job_id)
    ).one()
    if not 0 <= index < job.total_requests:
        raise NotFoundError(
            f"job {job_id} has no row {index}; its rows are 0 to {job.total_requests - 1}"
        )
    request = connection.execute(
        select(Request.custom_id, Request.body, Request.params, Request.samples).where(
            Request.job_id == job_id, Request.index == index
        )
    ).one()
    rows = connection.execute(
        select(Result, ParameterSet.params.label("effective"))
        .outerjoin(ParameterSet, ParameterSet.id == Result.parameter_set_id)
        .where(Result.job_id == job_id, Result.index == index)
        .order_by(Result.sample)
    ).all()
    provenance = load_provenance(
        connection, {row.provenance_id for row in rows if row.provenance_id}
    )
    return {
        "job": job_id,
        "index": index,
        "custom_id": request.custom_id,
        "request": request.body,
        "params": {"request": request.params, "job": job.params},
        "job_seed": job.seed,
        "template": job.template,
        "samples_asked": request.samples,
        "samples": [_sample(row, provenance) for row in rows],
    }


def _sample(row: Any, provenance: dict[str, dict[str, Any]]) -> dict[str, Any]:
    error = None
    if row.error_code is not None:
        error = {"code": row.error_code, "message": row.error_message}
    return {
        "sample": row.sample,
        "text": row.text,
        "finish_reason": row.finish_reason,
        "stop_reason": row.stop_reason,
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "logprobs": row.logprobs,
        "error": error,
        "pass": row.pass_,
        "seed": row.seed,
        "worker": row.worker_id,
        "started_at": row.started_at.isoformat() if row.started_at else None,
        "finished_at": row.finished_at.isoformat() if row.finished_at else None,
        "seconds": row.seconds,
        "effective_params": row.effective,
        "provenance": provenance.get(row.provenance_id),
    }
