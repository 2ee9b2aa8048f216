"""Fault 23: memory runs out in the engine; a whole worker around the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from models.database import Database
from nightherd.settings import Settings
from tests.fakes import FakeEngine, byte_text, expected_text, fake_tokens
from tests.worker.harness import SEED, WorkerHarness, open_harness, store_job
from worker.engine import engine as engine_module
from worker.engine.block_manager import BlockManager
from worker.engine.engine import BatchEngine
from worker.engine.runner import Choices
from worker.engine.scheduler import Scheduler, StepPlan
from worker.engine.sequence import Sequence

MakeSettings = Callable[..., Settings]
PROMPTS = [f"prompt {number}" for number in range(32)]


class OutOfMemoryError(RuntimeError):
    """As torch's: known by its name alone."""


class SmallDevice:
    """A runner whose memory ends at so many rows of a step, or so long a sequence."""

    name = "small"
    block_size = 16
    num_blocks = 512
    vocab_size = byte_text().vocab_size

    def __init__(self, error: Exception, *, rows: int = 10_000, length: int = 10_000) -> None:
        self.rows, self.length, self._error = rows, length, error
        self.steps: list[int] = []
        """Rows of each step that went well."""
        self.failures = 0

    def execute(self, plan: StepPlan) -> Choices:
        if plan.rows > self.rows or any(s.sequence.length > self.length for s in plan.spans):
            self.failures += 1
            raise self._error
        self.steps.append(plan.rows)
        chosen = [self._next(span.sequence) for span in plan.spans if span.chooses]
        return Choices(chosen, [0.0] * len(chosen))

    def _next(self, sequence: Sequence) -> int:
        request = sequence.request
        tokens = fake_tokens(
            request.prompt_token_ids, request.seeds[sequence.index], request.max_new_tokens
        )
        return tokens[sequence.generated]

    def forget(self, sequence: Sequence) -> None: ...

    def lost(self) -> bool:
        return False

    def close(self) -> None: ...


class Engine(BatchEngine):
    """The real one on a small device."""

    def __init__(self, device: SmallDevice) -> None:
        blocks = BlockManager(device.num_blocks, device.block_size)
        super().__init__(device, Scheduler(blocks, max_sequences=32, budget=256), 1024)

    def go_on(self) -> None:
        """Not needed: it is never held up."""


def _harness(database: Database, settings: Settings, device: SmallDevice) -> Any:
    return open_harness(
        database, settings, cast(FakeEngine, Engine(device)), watching=True, context_length=1024
    )


ERRORS = [MemoryError("no more"), OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]


@pytest.mark.parametrize("error", ERRORS, ids=["MemoryError", "torch"])
def test_out_of_memory_makes_batches_smaller_and_goes_on(
    sqlite_database: Database, make_settings: MakeSettings, error: Exception
) -> None:
    job = store_job(sqlite_database, PROMPTS, chunk_size=8, params={"max_tokens": 40})
    device = SmallDevice(error, rows=5)
    with _harness(sqlite_database, make_settings(), device) as harness:
        wakes = [harness.wake() for _ in range(4)]
        assert [wake.result(30) for wake in wakes] == ["done"] * 4
        harness.check_complete(job, PROMPTS, max_tokens=40)
        _still_works(harness)
    # It fails a few times at the start, not once for each token.
    assert device.failures < 100
    assert max(device.steps) == 4
    assert sum(rows == 4 for rows in device.steps) > 200


def _still_works(harness: WorkerHarness) -> None:
    """The worker takes the next job, under the same name."""
    assert harness.broken == []
    assert harness.engine.broken is None
    name = harness.identity.id
    job = store_job(harness.database, PROMPTS[:4])
    assert harness.wake().result(20) == "done"
    harness.check_complete(job, PROMPTS[:4])
    assert harness.identity.id == name
    assert harness.worker_state() == "ready"


def test_a_long_prompt_is_computed_in_smaller_pieces(
    sqlite_database: Database, make_settings: MakeSettings
) -> None:
    prompts = ["a long prompt " * 20, "short"]
    job = store_job(sqlite_database, prompts)
    device = SmallDevice(MemoryError(), rows=20)
    with _harness(sqlite_database, make_settings(), device) as harness:
        assert harness.wake().result(20) == "done"
        harness.check_complete(job, prompts)
        _still_works(harness)


@pytest.mark.parametrize("error", ERRORS, ids=["MemoryError", "torch"])
def test_a_request_that_alone_does_not_fit_fails_as_out_of_memory(
    sqlite_database: Database, make_settings: MakeSettings, error: Exception
) -> None:
    prompts = list(PROMPTS)
    prompts[11] = "far too long " * 20
    job = store_job(sqlite_database, prompts, chunk_size=8)
    device = SmallDevice(error, length=100)
    with _harness(sqlite_database, make_settings(), device) as harness:
        wakes = [harness.wake() for _ in range(4)]
        assert [wake.result(30) for wake in wakes] == ["done"] * 4
        assert harness.job_state(job) == "completed"
        rows = harness.results(job)
        assert [row.number for row in rows] == list(range(len(prompts)))
        assert [(row.number, row.error_code) for row in rows if row.error_code] == [
            (11, "out_of_memory")
        ]
        for row in rows:
            if row.number != 11:
                assert row.text == expected_text(
                    prompts[row.number], job_seed=SEED, index=row.number, sample=0, max_tokens=8
                )
        assert [(chunk.done, chunk.failed) for chunk in harness.chunks(job)] == [
            (8, 0),
            (7, 1),
            (8, 0),
            (8, 0),
        ]
        _still_works(harness)
        scheduler = cast(Any, harness.engine).scheduler
        assert (scheduler.max_sequences, scheduler.budget) == (32, 256), "the others pay nothing"


def test_batches_grow_again_when_memory_is_there_again(
    sqlite_database: Database, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_OOM_RECOVERY_STEPS", 20)
    job = store_job(sqlite_database, PROMPTS, chunk_size=8, params={"max_tokens": 40})
    device = SmallDevice(MemoryError(), rows=5)
    with _harness(sqlite_database, make_settings(), device) as harness:
        wakes = [harness.wake() for _ in range(2)]
        assert [wake.result(30) for wake in wakes] == ["done"] * 2
        device.rows = 10_000
        assert harness.work_off() == ["done"] * 2
        scheduler = cast(Any, harness.engine).scheduler
        assert not scheduler.limited
        harness.check_complete(job, PROMPTS, max_tokens=40)
