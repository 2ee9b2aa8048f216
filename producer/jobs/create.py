"""From checked rows to a queued job: nothing is stored if any row is bad."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from models.base import new_id
from models.database import Database
from models.store import storing as store
from nightherd.errors import InputError, NightherdError, ParameterError, UsageError
from nightherd.params import SamplingParams, effective_params
from nightherd.settings import Settings
from nightherd.structured import check_structure
from producer.inputs.reader import Row, RowProblem
from producer.jobs.limits import CheckpointLimits, cached_limits
from producer.jobs.spool import Spool
from producer.jobs.status import serving_workers
from producer.prompts.template import unstorable

log = logging.getLogger("nightherd.submit")

SHOWN_PROBLEMS = 20
_CHECK_BATCH = 128
"""Rows, which are tokenised together where they may be too long."""
_SMALL_JOB = 1_000
"""Rows that are stored in the last transaction itself."""
_ID_ATTEMPTS = 5
_DISCARD_SECONDS = 5.0
_SQLITE_YIELD_SECONDS = 0.12
"""Longer than SQLite lets pass between two looks at a lock."""
_SMALLEST_CHUNK, _LARGEST_CHUNK, _CHUNKS_OF_SMALL_JOB = 16, 256, 8

Progress = Callable[[str, int, int | None], None]
"""Called with a phase ("checking", "storing"), rows so far, and their number where known."""
BeforeCommit = Callable[[Connection, str], None]
"""Called with a job's id in the transaction that makes it live; what it raises undoes that."""
Limits = dict[str, CheckpointLimits | None]
"""By checkpoint key: for callers that submit many jobs at once."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """Everything of a job but its rows."""

    checkpoint_key: str
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    name: str | None = None
    template: dict[str, Any] | None = None
    priority: int = 0
    not_before: datetime | None = None
    deadline: datetime | None = None
    metadata: dict[str, Any] | None = None
    submitted_by: str | None = None
    firing_id: int | None = None


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    id: str
    seed: int
    requests: int
    samples: int


def submit(
    database: Database,
    settings: Settings,
    rows: Iterable[Row | RowProblem],
    options: JobOptions,
    *,
    source: str = "the input",
    progress: Progress | None = None,
    before_commit: BeforeCommit | None = None,
    known_limits: Limits | None = None,
) -> SubmittedJob:
    """Checks every row, then stores the job and makes it `queued`.

    Raises `InputError` with one line a bad row (the first `SHOWN_PROBLEMS`); nothing is stored
    then. Redis is not needed here. Killed at any moment, it leaves either no visible job or the
    whole one.
    """
    report = progress or (lambda phase, count, total: None)
    _check_options(options)
    limits = _checkpoint_limits(
        database, settings, options, {} if known_limits is None else known_limits
    )
    spool = Spool()
    try:
        _check_rows(rows, options, limits, spool, source, report)
        return _store_job(database, settings, spool, options, report, before_commit)
    finally:
        spool.close()


def _check_options(options: JobOptions) -> None:
    _effective_params(None, options.params)  # contradictions within the job's own layer
    for name, value in (
        ("name", options.name),
        ("checkpoint", options.checkpoint_key),
        ("parameters", options.params),
        ("template", options.template),
        ("metadata", options.metadata),
        ("submitter", options.submitted_by),
    ):
        for text in _strings(value):
            reason = unstorable(text)
            if reason:
                raise UsageError(f"the job's {name} holds {reason}")


def _checkpoint_limits(
    database: Database, settings: Settings, options: JobOptions, known: Limits
) -> CheckpointLimits | None:
    """What the job's checkpoint can take, where that is known here."""
    key = options.checkpoint_key
    if key not in known:
        serving = database.retrying(
            lambda connection: serving_workers(connection, key), reading=True
        )
        known[key] = cached_limits(key, settings.home, serving)
    limits = known[key]
    if limits is not None:
        limits.check_params(options.params)
    return limits


def _effective_params(row: Mapping[str, Any] | None, job: Mapping[str, Any]) -> SamplingParams:
    """A row's effective parameters; raises `ParameterError` for what no worker could do."""
    params = effective_params(row, job)
    check_structure(params)
    return params


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _check_rows(
    rows: Iterable[Row | RowProblem],
    options: JobOptions,
    limits: CheckpointLimits | None,
    spool: Spool,
    source: str,
    report: Progress,
) -> None:
    problems: list[str] = []
    bad = 0
    for row, params in _checked_rows(rows, options, limits):
        if isinstance(row, RowProblem):
            bad += 1
            if len(problems) < SHOWN_PROBLEMS:
                problems.append(str(row))
        elif not bad:
            spool.add(row, params.n)
        report("checking", len(spool.samples) + bad, None)
    if bad:
        more = f" (and {bad - len(problems)} more)" if bad > len(problems) else ""
        rows_are = "row is" if bad == 1 else "rows are"
        raise InputError(
            f"{source}: {bad} {rows_are} bad, nothing was stored: {problems[0]}{more}"
            if bad == 1
            else f"{source}: {bad} {rows_are} bad, nothing was stored{more}:",
            problems if bad > 1 else (),
        )
    if not spool.samples:
        raise InputError(f"{source} is empty: it must hold at least one prompt")


def _checked_rows(
    rows: Iterable[Row | RowProblem], options: JobOptions, limits: CheckpointLimits | None
) -> Iterator[tuple[Row | RowProblem, SamplingParams]]:
    """Every row in its order with its parameters, or what is wrong with it."""
    job_params = _effective_params(None, options.params)
    waiting = iter(rows)
    while block := list(islice(waiting, _CHECK_BATCH)):
        params = [job_params] * len(block)
        for index, row in enumerate(block):
            if isinstance(row, Row) and row.params:
                try:
                    params[index] = _effective_params(row.params, options.params)
                    if limits is not None:
                        limits.check_params(row.params)
                except ParameterError as error:
                    block[index] = RowProblem(row.line, str(error), row.unit)
        if limits is not None:
            good = [(i, row) for i, row in enumerate(block) if isinstance(row, Row)]
            found = limits.problems([(row.body, params[i]) for i, row in good])
            for (i, row), problem in zip(good, found, strict=True):
                if problem is not None:
                    block[i] = RowProblem(row.line, problem, row.unit)
        yield from zip(block, params, strict=True)


def _store_job(
    database: Database,
    settings: Settings,
    spool: Spool,
    options: JobOptions,
    report: Progress,
    before_commit: BeforeCommit | None,
) -> SubmittedJob:
    seed = options.seed if options.seed is not None else secrets.randbits(63)
    total = len(spool.samples)
    ranges = list(_chunk_ranges(spool.samples, settings.chunk_size or chunk_size(total)))
    if total <= min(_SMALL_JOB, settings.store_batch):
        job_id = _store_small_job(database, options, seed, list(spool), ranges, before_commit)
        report("storing", total, total)
        return SubmittedJob(job_id, seed, total, sum(spool.samples))
    job_id = _begin_storing(database, options, seed)
    try:
        batch: list[store.NewRequest] = []
        stored = 0
        for request in spool:
            batch.append(request)
            if len(batch) == settings.store_batch or stored + len(batch) == total:
                ready, began = batch, time.monotonic()
                database.retrying(
                    lambda connection, ready=ready: store.store_requests(  # type: ignore[misc]
                        connection, job_id, ready
                    )
                )
                stored += len(batch)
                batch = []
                report("storing", stored, total)
                if stored < total:
                    _let_others_write(database, time.monotonic() - began)
        database.retrying(lambda connection: _make_live(connection, job_id, ranges, before_commit))
    except BaseException:
        _discard(database, job_id)
        raise
    return SubmittedJob(job_id, seed, total, sum(spool.samples))


def _store_small_job(
    database: Database,
    options: JobOptions,
    seed: int,
    rows: list[store.NewRequest],
    ranges: list[store.ChunkRange],
    before_commit: BeforeCommit | None,
) -> str:
    """All of a small job in one transaction: ten thousand schedules may be due at once."""

    def work(connection: Connection, new: store.NewJob, repeated: bool) -> None:
        if repeated and store.job_exists(connection, new.id):
            return  # committed before, and only the answer was lost
        store.insert_live_job(connection, new, ranges)
        if before_commit is not None:
            before_commit(connection, new.id)
        store.insert_live_job_rows(connection, new.id, rows, ranges)

    return _with_new_id(database, options, seed, work)


def _make_live(
    connection: Connection,
    job_id: str,
    ranges: list[store.ChunkRange],
    before_commit: BeforeCommit | None,
) -> None:
    if before_commit is not None and store.is_storing(connection, job_id):
        before_commit(connection, job_id)
    store.finish_storing(connection, job_id, ranges)


def _let_others_write(database: Database, held_seconds: float) -> None:
    """Leaves SQLite's lock alone for as long as it was held, if need be for one more look at it.

    Who waits for it looks every 100 ms at most. Between two batches it would be free for less than
    that, and a worker could miss it again and again.
    """
    if database.dialect == "sqlite":
        time.sleep(min(held_seconds, _SQLITE_YIELD_SECONDS))


def _begin_storing(database: Database, options: JobOptions, seed: int) -> str:
    # Where the first commit took place and only its answer was lost, the empty job is left to
    # housekeeping.
    return _with_new_id(
        database, options, seed, lambda connection, new, _: store.begin_storing(connection, new)
    )


def _with_new_id(
    database: Database,
    options: JobOptions,
    seed: int,
    work: Callable[[Connection, store.NewJob, bool], None],
) -> str:
    """Runs `work` in a transaction, with a new job and whether it ran before; the job's id.

    Again with another id where another submit drew this one in the same millisecond.
    """
    attempts = 0
    while True:
        attempts += 1
        new = _new_job(options, seed)
        runs = itertools.count()
        try:
            database.retrying(
                lambda connection, new=new, runs=runs: work(connection, new, next(runs) > 0)  # type: ignore[misc]
            )
        except IntegrityError:
            if attempts == _ID_ATTEMPTS:
                raise
        else:
            return new.id


def _new_job(options: JobOptions, seed: int) -> store.NewJob:
    return store.NewJob(
        id=new_id(),
        checkpoint_key=options.checkpoint_key,
        seed=seed,
        params=dict(options.params),
        name=options.name,
        template=options.template,
        priority=options.priority,
        not_before=options.not_before,
        deadline=options.deadline,
        metadata=options.metadata,
        firing_id=options.firing_id,
        submitted_by=options.submitted_by,
    )


def _discard(database: Database, job_id: str) -> None:
    """Removes what was stored of a job that will not be; housekeeping goes on after a while."""
    began = time.monotonic()
    deadline = began + _DISCARD_SECONDS
    try:
        while database.retrying(
            lambda connection: store.discard_storing(connection, job_id), patience=1.0
        ):
            now = time.monotonic()
            if now > deadline:
                return
            _let_others_write(database, now - began)
            began = time.monotonic()
    except NightherdError as error:
        log.debug("left to housekeeping: %s", error)


def chunk_size(total: int) -> int:
    """Small enough that a small job occupies several workers, large enough to be cheap."""
    even = -(-total // _CHUNKS_OF_SMALL_JOB)
    return max(_SMALLEST_CHUNK, min(_LARGEST_CHUNK, even))


def _chunk_ranges(samples: array[int], size: int) -> Iterator[store.ChunkRange]:
    for first in range(0, len(samples), size):
        part = samples[first : first + size]
        yield store.ChunkRange(first, len(part), sum(part))
