"""The life of chunks, in any order of events, against a simple oracle."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event, select

from migrations import schema
from models.database import Database
from models.job import Chunk, Job, Result
from models.store import jobs, leases
from models.store.chunks import Claim
from models.store.results import ChunkSave
from nightherd.errors import ConflictError
from tests.seeding import (
    as_save,
    job,
    job_results,
    lapse,
    make_job,
    make_worker,
    pending_samples,
    reap,
    result_row,
    results,
    try_claim,
)

CODES = ("engine_error", "out_of_memory")
OUTCOMES = (None, None, *CODES)


@dataclass
class HeldChunk:
    """A chunk that a worker has claimed; `lost`: the worker has ended, but may still save."""

    worker: str
    claim: Claim
    pending: list[tuple[int, int]]
    """Samples, as (index, sample)."""
    saved: list[dict[str, Any]]
    lost: bool = False


class ChunkLife(RuleBasedStateMachine):
    """Two workers, one job. The oracle knows what was saved under a fence that held."""

    database: ClassVar[Database]

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[tuple[int, int], str] = {}
        self.held: list[HeldChunk] = []
        self.steps = 0

    @initialize(
        n=st.integers(1, 9),
        size=st.integers(1, 9),
        samples=st.integers(1, 2),
        begun=st.lists(
            st.tuples(st.sampled_from(["done", "return", None]), st.sampled_from(OUTCOMES)),
            max_size=9,
        ),
    )
    def submit(
        self, n: int, size: int, samples: int, begun: list[tuple[str | None, str | None]]
    ) -> None:
        """A job of which some chunks were claimed: ended, half done and returned, or still held."""
        self.workers = [make_worker(self.database) for _ in range(2)]
        self.job = make_job(self.database, n, chunk_size=size, samples=samples)
        self.all = set(itertools.product(range(n), range(samples)))
        for _ in begun:
            self.claims(0)
        for one, (end, code) in zip(list(self.held), begun, strict=False):
            part = one.pending if end == "done" else one.pending[: len(one.pending) // 2]
            self.save(one, [result_row(*key, code=code) for key in part], end)

    def state(self) -> str:
        return str(job(self.database, self.job).state)

    def live(self) -> list[HeldChunk]:
        return [one for one in self.held if not one.lost]

    @rule(which=st.integers(0, 1))
    def claims(self, which: int) -> None:
        worker = self.workers[which]
        outcome = try_claim(self.database, worker, only_job=self.job)
        if not isinstance(outcome, Claim):
            assert outcome == "nothing"
            return
        assert self.state() == "running"
        mine = pending_samples(self.database, outcome)
        for key in mine:
            if outcome.pass_ == 1:
                assert key not in self.stored, "a stored result is never computed again"
            else:
                assert self.stored[key] in CODES if not outcome.only_code else [outcome.only_code]
        others = {key for one in self.live() for key in one.pending}
        assert not others & set(mine), "no sample is pending in two chunks that are held"
        self.held.append(HeldChunk(worker, outcome, mine, []))

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        end=st.sampled_from([None, "return", "done"]),
        repeat=st.booleans(),
    )
    def saves(self, data: st.DataObject, end: str | None, repeat: bool) -> None:
        """A part, or all, of a chunk; also of one that was lost long ago."""
        one = data.draw(st.sampled_from(self.held), label="held")
        count = len(one.pending) if end == "done" else data.draw(st.integers(0, len(one.pending)))
        codes = data.draw(st.lists(st.sampled_from(OUTCOMES), min_size=count, max_size=count))
        rows = [result_row(*key, code=code) for key, code in zip(one.pending, codes, strict=False)]
        self.save(one, rows, end, repeat=repeat)

    def save(
        self, one: HeldChunk, rows: list[dict[str, Any]], end: str | None, *, repeat: bool = False
    ) -> None:
        save = as_save(one.claim, one.saved + rows, end=end)
        save.results = rows
        self.commit(one, save)
        if repeat and (end is None or one.lost):
            self.commit(one, save)
        if not one.lost:
            one.saved += rows
            one.pending = one.pending[len(rows) :]
            self.stored |= {
                (row["index"], row["sample"]): row["error_code"] or "ok" for row in rows
            }
            if end is not None:
                self.held.remove(one)

    def commit(self, one: HeldChunk, save: ChunkSave) -> None:
        with self.database.write() as connection:
            outcome = results.save(connection, one.worker, [save])
        assert (one.claim.chunk_id in outcome.lost) == one.lost, "the fence alone decides"

    @precondition(lambda self: self.live())
    @rule(data=st.data(), dies=st.booleans())
    def ends(self, data: st.DataObject, dies: bool) -> None:
        """A worker that holds a chunk dies or drains; another starts."""
        worker = data.draw(st.sampled_from([one.worker for one in self.live()]), label="worker")
        mine = [one for one in self.live() if one.worker == worker]
        if dies:
            lapse(self.database, worker)
            assert reap(self.database) == [worker]
            # Failures as poison come from the store itself.
            now = job_results(self.database, self.job)
            self.stored |= {key: code for key, code in now.items() if code == "poison"}
        else:
            with self.database.write() as connection:
                assert leases.leave(connection, worker) == len(mine)
        for one in mine:
            one.lost = True
        self.workers[self.workers.index(worker)] = make_worker(self.database)

    @rule(act=st.sampled_from([jobs.pause, jobs.resume]))
    def pauses_or_resumes(self, act: Any) -> None:
        self.attempt(lambda connection: act(connection, self.job))

    @precondition(lambda self: self.steps > 10)
    @rule()
    def cancels(self) -> None:
        self.attempt(lambda connection: jobs.cancel(connection, self.job))

    @rule(code=st.sampled_from([None, *CODES]), size=st.integers(1, 4))
    def retries(self, code: str | None, size: int) -> None:
        self.attempt(
            lambda connection: jobs.retry(connection, self.job, only_code=code, chunk_size=size)
        )

    def attempt(self, work: Any) -> None:
        try:
            with self.database.write() as connection:
                work(connection)
        except ConflictError:
            pass

    @rule()
    def ticks(self) -> None:
        with self.database.write() as connection:
            assert jobs.complete_all(connection) == [], "whoever ends the last chunk completes"

    @invariant()
    def agrees_with_the_oracle(self) -> None:
        self.steps += 1
        with self.database.read() as connection:
            state = connection.execute(select(Job.state).where(Job.id == self.job)).scalar_one()
            chunks = connection.execute(
                select(Chunk, Chunk.count.label("size")).where(Chunk.job_id == self.job)
            ).all()
            rows = connection.execute(
                select(Result.index, Result.sample, Result.error_code, Result.pass_).where(
                    Result.job_id == self.job
                )
            ).all()
        codes = {(index, sample): code or "ok" for index, sample, code, _ in rows}
        passes = {(index, sample): pass_ for index, sample, _, pass_ in rows}
        assert codes == self.stored
        self.check_counters(chunks, passes)
        is_open = any(row.state in ("queued", "running") for row in chunks)
        if state == "cancelled":
            assert not any(row.state == "queued" for row in chunks)
        else:
            assert (state == "completed") == (not is_open)
        if state == "completed":
            assert codes.keys() == self.all
        running = {(row.id, row.fence, row.worker_id) for row in chunks if row.state == "running"}
        assert running == {(one.claim.chunk_id, one.claim.fence, one.worker) for one in self.live()}

    def check_counters(self, chunks: Sequence[Any], passes: dict[tuple[int, int], int]) -> None:
        """The counters sum to the job's totals, and leave what each open chunk has pending."""
        good = [key for key, code in self.stored.items() if code == "ok"]
        again = 0
        for row in chunks:
            if row.state in ("queued", "running"):
                pending = self.pending_of(row, passes)
                assert row.samples - row.done - row.failed == len(pending)
                again += len(pending) if row.pass_ > 1 else 0
        assert sum(row.samples for row in chunks) == len(self.all)
        assert sum(row.done for row in chunks) == len(good)
        assert sum(row.failed for row in chunks) == len(self.stored) - len(good) - again
        assert sum(row.completion_tokens for row in chunks) == 5 * len(good)
        assert sum(row.prompt_tokens for row in chunks) == 3 * sum(not one for _, one in good)

    def pending_of(self, row: Any, passes: dict[tuple[int, int], int]) -> set[tuple[int, int]]:
        inside = range(row.first_position, row.first_position + row.size)
        keys = {key for key in self.all if key[0] in inside}
        if row.pass_ == 1:
            return keys - self.stored.keys()
        return {
            key
            for key in keys
            if self.stored.get(key, "ok") != "ok"
            and passes[key] < row.pass_
            and row.only_code in (None, self.stored[key])
        }

    def teardown(self) -> None:
        """Left alone, the job ends."""
        if not hasattr(self, "job"):
            return
        for worker in self.workers:
            with self.database.write() as connection:
                leases.leave(connection, worker)
        self.held.clear()
        self.attempt(lambda connection: jobs.resume(connection, self.job))
        last = make_worker(self.database)
        while isinstance(held := try_claim(self.database, last, only_job=self.job), Claim):
            rows = [result_row(*key) for key in pending_samples(self.database, held)]
            with self.database.write() as connection:
                results.save(connection, last, [as_save(held, rows, end="done")])
            self.stored |= {(row["index"], row["sample"]): "ok" for row in rows}
        self.agrees_with_the_oracle()
        assert self.state() in ("completed", "cancelled")


def test_any_life_of_a_chunk_agrees_with_the_oracle() -> None:
    folder = Path(tempfile.mkdtemp(prefix="nightherd-life-"))
    database = Database(f"sqlite:///{folder / 'nightherd.db'}")
    event.listen(
        database.engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous = OFF").close()
    )
    schema.upgrade(database)
    ChunkLife.database = database
    try:
        run_state_machine_as_test(
            ChunkLife,
            settings=settings(
                max_examples=50,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        database.close()
        shutil.rmtree(folder)
