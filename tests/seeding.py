"""Jobs, workers and results made straight in the database, for tests that need no worker process.

A worker is played by the test: `claim` takes a chunk, `save` stores its pending samples, `lapse`
lets its lease run out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Row, event, func, select, update

from models.base import db_now, new_id
from models.database import Database
from models.job import Chunk, Job, Result
from models.store import chunks, leases, results
from models.store import storing as store
from models.store.chunks import Claim, ClaimOutcome, PendingRequest
from models.store.results import ChunkSave, SaveOutcome
from models.worker import Worker
from nightherd.errors import RowErrorCode

KEY = "demo"
SEED = 7


def make_job(
    database: Database,
    n: int = 8,
    *,
    chunk_size: int = 4,
    samples: int = 1,
    key: str = KEY,
    storing: bool = False,
    **changes: Any,
) -> str:
    """Stores a job of `n` prompts, each with `samples` outputs; `storing` leaves it half done."""
    new = store.NewJob(
        id=new_id(), checkpoint_key=key, seed=SEED, **{"params": {"n": samples}, **changes}
    )
    rows = [store.NewRequest(i, {"prompt": f"prompt {i}"}, None, None, samples) for i in range(n)]
    ranges = [
        store.ChunkRange(first, count, count * samples)
        for first in range(0, n, chunk_size)
        for count in [min(chunk_size, n - first)]
    ]
    with database.write() as connection:
        store.begin_storing(connection, new)
        store.store_requests(connection, new.id, rows)
        if not storing:
            store.finish_storing(connection, new.id, ranges)
    return new.id


def make_worker(
    database: Database,
    *,
    key: str = KEY,
    serves: tuple[str, ...] = (),
    slots: int = 4,
    only_job: str | None = None,
    state: str = "ready",
    lease_seconds: float = 3_600.0,
) -> str:
    worker = leases.NewWorker(
        id=new_id(),
        host="testhost",
        pid=1,
        device="cpu",
        checkpoint_key=key,
        serves=(key, *serves),
        slots=slots,
        only_job=only_job,
        version="0",
        state=state,
    )
    with database.write() as connection:
        leases.register(connection, worker, lease_seconds=lease_seconds)
    return worker.id


def try_claim(
    database: Database,
    worker_id: str,
    *,
    key: str = KEY,
    only_job: str | None = None,
    idle: bool = True,
) -> ClaimOutcome:
    with database.write() as connection:
        return chunks.claim(connection, worker_id, keys=[key], only_job=only_job, idle=idle)


def claim(database: Database, worker_id: str, **options: Any) -> Claim:
    outcome = try_claim(database, worker_id, **options)
    assert isinstance(outcome, Claim), outcome
    return outcome


def pending_requests(database: Database, held: Claim) -> list[PendingRequest]:
    """The requests of a claimed chunk that still have samples to run."""
    with database.read() as connection:
        return chunks.load_pending(
            connection,
            job_id=held.job_id,
            first_position=held.first_position,
            count=held.count,
            pass_=held.pass_,
            only_code=held.only_code,
        )


def pending_samples(database: Database, held: Claim) -> list[tuple[int, int]]:
    """The samples of a claimed chunk that are still to run, as (index, sample)."""
    return [
        (request.index, sample)
        for request in pending_requests(database, held)
        for sample in request.samples
    ]


def result_row(index: int, sample: int = 0, *, code: RowErrorCode | None = None) -> dict[str, Any]:
    """A result: 3 prompt tokens and 5 new ones, or a failure."""
    return {
        "index": index,
        "sample": sample,
        "text": None if code else f"text {index}.{sample}",
        "finish_reason": "error" if code else "stop",
        "stop_reason": None,
        "prompt_tokens": 3,
        "completion_tokens": 0 if code else 5,
        "logprobs": None,
        "error_code": code,
        "error_message": f"it failed: {code}" if code else None,
        "seed": 1,
        "worker_id": None,
        "parameter_set_id": None,
        "provenance_id": None,
        "started_at": None,
        "finished_at": None,
        "seconds": 0.5,
    }


def as_save(
    held: Claim, rows: Collection[Mapping[str, Any]], *, end: str | None = None
) -> ChunkSave:
    """The save of a holder that had saved nothing of the chunk before under this claim."""
    good = [row for row in rows if row["error_code"] is None]
    return ChunkSave(
        chunk_id=held.chunk_id,
        job_id=held.job_id,
        fence=held.fence,
        pass_=held.pass_,
        done=held.done + len(good),
        failed=held.failed + len(rows) - len(good),
        prompt_tokens=held.prompt_tokens + 3 * sum(row["sample"] == 0 for row in good),
        completion_tokens=held.completion_tokens + 5 * len(good),
        results=list(rows),
        end=end,  # type: ignore[arg-type]
    )


def save(
    database: Database,
    worker_id: str,
    held: Claim,
    *,
    only: Collection[int] | None = None,
    failing: Mapping[int, RowErrorCode] | None = None,
    end: str | None = "done",
) -> SaveOutcome:
    """Saves the chunk's pending samples (of the indices `only`); those in `failing` fail."""
    rows = [
        result_row(index, sample, code=(failing or {}).get(index))
        for index, sample in pending_samples(database, held)
        if only is None or index in only
    ]
    with database.write() as connection:
        return results.save(connection, worker_id, [as_save(held, rows, end=end)])


def work_off(
    database: Database,
    worker_id: str,
    *,
    only_job: str | None = None,
    failing: Mapping[int, RowErrorCode] | None = None,
) -> list[Claim]:
    """Claims and finishes chunks until there are none."""
    done = []
    while True:
        outcome = try_claim(database, worker_id, only_job=only_job)
        if not isinstance(outcome, Claim):
            assert outcome == "nothing", outcome
            return done
        save(database, worker_id, outcome, failing=failing)
        done.append(outcome)


def lapse(database: Database, *worker_ids: str) -> None:
    """Lets leases run out."""
    with database.write() as connection:
        connection.execute(
            update(Worker).where(Worker.id.in_(worker_ids)).values(lease_until=db_now(-1))
        )


POISON_DEATHS = 3


def reap(database: Database) -> list[str]:
    with database.write() as connection:
        expired = leases.workers_to_reap(connection)
        return leases.reap(connection, expired, poison_deaths=POISON_DEATHS)


def die(database: Database, worker_id: str) -> None:
    """A worker's end by kill -9, as the fleet sees it."""
    lapse(database, worker_id)
    assert worker_id in reap(database)


def job(database: Database, job_id: str) -> Row[Any]:
    with database.read() as connection:
        return connection.execute(select(Job).where(Job.id == job_id)).one()


def job_chunks(database: Database, job_id: str) -> list[Row[Any]]:
    """Its chunks by pass and position; a row's `count` is `size`."""
    with database.read() as connection:
        query = (
            select(Chunk, Chunk.count.label("size"))
            .where(Chunk.job_id == job_id)
            .order_by(Chunk.pass_, Chunk.first_position)
        )
        return list(connection.execute(query))


def job_results(database: Database, job_id: str) -> dict[tuple[int, int], str]:
    """(index, sample) → `ok` or the error's code."""
    with database.read() as connection:
        rows = connection.execute(
            select(Result.index, Result.sample, Result.error_code).where(Result.job_id == job_id)
        )
        return {(index, sample): code or "ok" for index, sample, code in rows}


def check_sums(database: Database, job_id: str) -> dict[str, int]:
    """The chunks' counters sum to the job's totals and agree with its results; returns them."""
    names = ("samples", "done", "failed", "prompt_tokens", "completion_tokens")
    with database.read() as connection:
        row = connection.execute(
            select(*(func.sum(getattr(Chunk, name)).label(name) for name in names)).where(
                Chunk.job_id == job_id
            )
        ).one()
        total = connection.execute(select(Job.total_samples).where(Job.id == job_id)).scalar_one()
    sums = {name: int(row._mapping[name]) for name in names}
    assert sums["samples"] == total, f"the chunks have {sums['samples']} samples, the job {total}"
    stored = job_results(database, job_id)
    good = [sample for sample, code in stored.items() if code == "ok"]
    assert sums["done"] == len(good)
    assert sums["prompt_tokens"] == 3 * sum(sample == 0 for _, sample in good)
    assert sums["completion_tokens"] == 5 * len(good)
    waiting = sum(
        chunk.samples - chunk.done - chunk.failed
        for chunk in job_chunks(database, job_id)
        if chunk.pass_ > 1
    )
    assert sums["failed"] + waiting == len(stored) - len(good), "failures, less those to run again"
    return sums


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """What is executed meanwhile, in order; BEGIN is among them on SQLite."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(database.engine, "before_cursor_execute", note)
