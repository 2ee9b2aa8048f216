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

from migrations import runner
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
    owed,
    reap,
    result_row,
    results,
    try_claim,
)

CODES = ("engine_error", "out_of_memory")
OUTCOMES = (None, None, *CODES)


@dataclass
class Held:
    """A chunk in a worker's hands, alive or not."""

    worker: str
    claim: Claim
    owed: list[tuple[int, int]]
    saved: list[dict[str, Any]]
    lost: bool = False


class ChunkLife(RuleBasedStateMachine):
    """Two workers, one job. The oracle knows what was saved under a fence that held."""

    database: ClassVar[Database]

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[tuple[int, int], str] = {}
        self.held: list[Held] = []
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
            part = one.owed if end == "done" else one.owed[: len(one.owed) // 2]
            self.save(one, [result_row(*place, code=code) for place in part], end)

    def state(self) -> str:
        return str(job(self.database, self.job).state)

    def live(self) -> list[Held]:
        return [one for one in self.held if not one.lost]

    @rule(which=st.integers(0, 1))
    def claims(self, which: int) -> None:
        worker = self.workers[which]
        outcome = try_claim(self.database, worker, only_job=self.job)
        if not isinstance(outcome, Claim):
            assert outcome == "nothing"
            return
        assert self.state() == "running"
        mine = owed(self.database, outcome)
        for place in mine:
            if outcome.pass_ == 1:
                assert place not in self.stored, "a stored result is never owed again"
            else:
                assert self.stored[place] in CODES if not outcome.only_code else [outcome.only_code]
        others = {place for one in self.live() for place in one.owed}
        assert not others & set(mine), "no sample is owed by two that hold a chunk"
        self.held.append(Held(worker, outcome, mine, []))

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        end=st.sampled_from([None, "return", "done"]),
        repeat=st.booleans(),
    )
    def saves(self, data: st.DataObject, end: str | None, repeat: bool) -> None:
        """A part, or all, of a chunk; also of one that was lost long ago."""
        one = data.draw(st.sampled_from(self.held), label="held")
        count = len(one.owed) if end == "done" else data.draw(st.integers(0, len(one.owed)))
        codes = data.draw(st.lists(st.sampled_from(OUTCOMES), min_size=count, max_size=count))
        rows = [result_row(*place, code=code) for place, code in zip(one.owed, codes, strict=False)]
        self.save(one, rows, end, repeat=repeat)

    def save(
        self, one: Held, rows: list[dict[str, Any]], end: str | None, *, repeat: bool = False
    ) -> None:
        save = as_save(one.claim, one.saved + rows, end=end)
        save.results = rows
        self.commit(one, save)
        if repeat and (end is None or one.lost):
            self.commit(one, save)
        if not one.lost:
            one.saved += rows
            one.owed = one.owed[len(rows) :]
            self.stored |= {
                (row["index"], row["sample"]): row["error_code"] or "ok" for row in rows
            }
            if end is not None:
                self.held.remove(one)

    def commit(self, one: Held, save: ChunkSave) -> None:
        with self.database.write() as connection:
            outcome = results.save(connection, one.worker, [save])
        assert (one.claim.chunk_id in outcome.lost) == one.lost, "the fence alone decides"

    @precondition(lambda self: self.live())
    @rule(data=st.data(), dies=st.booleans())
    def ends(self, data: st.DataObject, dies: bool) -> None:
        """A worker with a chunk in hand dies or drains; another starts."""
        worker = data.draw(st.sampled_from([one.worker for one in self.live()]), label="worker")
        mine = [one for one in self.live() if one.worker == worker]
        if dies:
            lapse(self.database, worker)
            assert reap(self.database) == [worker]
            # A verdict of poison is the store's own.
            now = job_results(self.database, self.job)
            self.stored |= {place: code for place, code in now.items() if code == "poison"}
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
        self.check_debts(chunks, passes)
        is_open = any(row.state in ("queued", "running") for row in chunks)
        if state == "cancelled":
            assert not any(row.state == "queued" for row in chunks)
        else:
            assert (state == "completed") == (not is_open)
        if state == "completed":
            assert codes.keys() == self.all
        running = {(row.id, row.fence, row.worker_id) for row in chunks if row.state == "running"}
        assert running == {(one.claim.chunk_id, one.claim.fence, one.worker) for one in self.live()}

    def check_debts(self, chunks: Sequence[Any], passes: dict[tuple[int, int], int]) -> None:
        """The counters sum to the job's totals, and each open chunk owes what they leave."""
        good = [place for place, code in self.stored.items() if code == "ok"]
        again = 0
        for row in chunks:
            if row.state in ("queued", "running"):
                debts = self.debts(row, passes)
                assert row.samples - row.done - row.failed == len(debts)
                again += len(debts) if row.pass_ > 1 else 0
        assert sum(row.samples for row in chunks) == len(self.all)
        assert sum(row.done for row in chunks) == len(good)
        assert sum(row.failed for row in chunks) == len(self.stored) - len(good) - again
        assert sum(row.completion_tokens for row in chunks) == 5 * len(good)
        assert sum(row.prompt_tokens for row in chunks) == 3 * sum(not one for _, one in good)

    def debts(self, row: Any, passes: dict[tuple[int, int], int]) -> set[tuple[int, int]]:
        inside = range(row.first_position, row.first_position + row.size)
        places = {place for place in self.all if place[0] in inside}
        if row.pass_ == 1:
            return places - self.stored.keys()
        return {
            place
            for place in places
            if self.stored.get(place, "ok") != "ok"
            and passes[place] < row.pass_
            and row.only_code in (None, self.stored[place])
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
            rows = [result_row(*place) for place in owed(self.database, held)]
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
    runner.upgrade(database)
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
