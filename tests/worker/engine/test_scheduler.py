"""The scheduler and the block manager against a slow, obvious oracle; no torch in sight."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightherd.params import SamplingParams
from tests.engines import admit_freely
from worker.engine.block_manager import BlockManager
from worker.engine.interface import EngineRequest
from worker.engine.scheduler import Scheduler, StepPlan
from worker.engine.sequence import Sequence


def make(order: int, prompt: Iterable[int], priority: int = 0, max_new_tokens: int = 8) -> Sequence:
    request = EngineRequest(
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(),
        seeds=(0,),
        max_new_tokens=max_new_tokens,
        priority=priority,
    )
    return Sequence(request, 0, order)


class Cache:
    """A KV cache that remembers, position by position, the tokens it was computed from."""

    def __init__(self, blocks: BlockManager) -> None:
        self.size = blocks.block_size
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}

    def run(self, plan: StepPlan) -> None:
        """Writes all rows, then reads what each of them attends to, as a step does."""
        for span in plan.spans:
            for position in range(span.start, span.start + span.count):
                history = tuple(span.sequence.token_ids[: position + 1])
                self.content[self._key(span.sequence, position)] = history
        for span in plan.spans:
            tokens = span.sequence.token_ids
            for position in range(span.start + span.count):
                stored = self.content.get(self._key(span.sequence, position))
                assert stored == tuple(tokens[: position + 1]), (span, position)

    def _key(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_ids[position // self.size], position % self.size


def next_token(token_ids: Iterable[int]) -> int:
    """What the 'model' says: a pure function of the tokens."""
    return hash(tuple(token_ids)) % 5


def alone(sequence: Sequence) -> list[int]:
    """The oracle: what the sequence generates with nothing beside it."""
    tokens = list(sequence.request.prompt_token_ids)
    for _ in range(sequence.request.max_new_tokens):
        tokens.append(next_token(tokens))
    return tokens


def drive(scheduler: Scheduler, cache: Cache, *, steps: int) -> list[Sequence]:
    """Runs steps until nothing is left; returns those that ended, in that order."""
    ended: list[Sequence] = []
    for _ in range(steps):
        plan = scheduler.plan()
        if not plan.spans:
            break
        assert plan.rows <= scheduler.budget
        cache.run(plan)
        scheduler.advance(plan)
        done = []
        for span in plan.spans:
            if span.sequence.pending == 0:
                span.sequence.token_ids.append(next_token(span.sequence.token_ids))
                if span.sequence.generated >= span.sequence.request.max_new_tokens:
                    done.append(span.sequence)
        scheduler.remove(done)
        ended += done
        scheduler.check()
    return ended


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(prompts, st.integers(-1, 1), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(8, 40),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 12),
    st.booleans(),
    st.booleans(),
)
def test_any_mix_generates_what_each_would_alone(
    mix: list[tuple[list[int], int, int]],
    blocks: int,
    block_size: int,
    max_sequences: int,
    more_budget: int,
    prefix_cache: bool,
    forecasts: bool,
) -> None:
    manager = BlockManager(blocks, block_size, prefix_cache=prefix_cache)
    scheduler = Scheduler(manager, max_sequences=max_sequences, budget=max_sequences + more_budget)
    if not forecasts:
        admit_freely(scheduler)
    all_of_them = [
        make(order, prompt, priority, count) for order, (prompt, priority, count) in enumerate(mix)
    ]
    fitting = [
        sequence
        for sequence in all_of_them
        if manager.blocks_for(sequence.length + sequence.request.max_new_tokens) <= blocks
    ]
    for sequence in fitting:
        scheduler.add(sequence)
    ended = drive(scheduler, Cache(manager), steps=5000)
    assert {id(sequence) for sequence in ended} == {id(sequence) for sequence in fitting}
    for sequence in fitting:
        assert sequence.token_ids == alone(sequence)
    assert manager.available == blocks


def test_decoding_rows_come_first_and_prefill_takes_the_rest() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_sequences=4, budget=10)
    first, second = make(0, range(7)), make(1, range(100, 120))
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.plan()
    assert [(s.start, s.count, s.chooses) for s in plan.spans] == [(0, 7, True), (0, 3, False)]
    scheduler.advance(plan)
    first.token_ids.append(1)
    plan = scheduler.plan()
    assert [(s.start, s.count, s.chooses) for s in plan.spans] == [(7, 1, True), (3, 9, False)]


def test_priority_goes_before_arrival() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_sequences=2, budget=2)
    low, high = make(0, [1], priority=0), make(1, [2], priority=5)
    scheduler.add(low)
    scheduler.add(high)
    assert [span.sequence for span in scheduler.plan().spans] == [high, low]


def test_a_common_beginning_is_computed_once_even_within_one_step() -> None:
    manager = BlockManager(100, 4)
    scheduler = Scheduler(manager, max_sequences=8, budget=64)
    common = list(range(10, 26))
    for order in range(3):
        scheduler.add(make(order, [*common, order]))
    plan = scheduler.plan()
    assert [span.count for span in plan.spans] == [17, 1, 1]
    Cache(manager).run(plan)
    assert manager.hit_tokens == 32


def test_the_newest_is_preempted_and_keeps_what_it_generated() -> None:
    manager = BlockManager(4, 2)
    scheduler = Scheduler(manager, max_sequences=2, budget=8)
    admit_freely(scheduler)
    old, new = make(0, [1, 2, 3]), make(1, [4])
    scheduler.add(old)
    scheduler.add(new)
    cache = Cache(manager)
    for _ in range(3):
        plan = scheduler.plan()
        cache.run(plan)
        scheduler.advance(plan)
        for span in plan.spans:
            span.sequence.token_ids.append(next_token(span.sequence.token_ids))
    generated = new.generated
    plan = scheduler.plan()
    assert scheduler.preemptions == 1
    assert [span.sequence for span in plan.spans] == [old]
    assert scheduler.first_waiting() is new
    assert new.generated == generated > 0
    assert new.computed == 0
    scheduler.check()


def test_a_sequence_that_can_never_fit_leaves_an_empty_plan() -> None:
    scheduler = Scheduler(BlockManager(2, 2), max_sequences=1, budget=8)
    scheduler.add(make(0, range(9)))
    assert scheduler.plan().spans == []
    assert scheduler.first_waiting() is not None


def test_after_a_failed_step_everything_is_computed_again() -> None:
    manager = BlockManager(50, 2)
    scheduler = Scheduler(manager, max_sequences=4, budget=32)
    sequences = [make(order, [7, 7, 7, 7, order]) for order in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.plan()  # and its step fails
    scheduler.start_over()
    scheduler.check()
    assert manager.available == 50
    cache = Cache(manager)
    ended = drive(scheduler, cache, steps=100)
    assert len(ended) == 3
    assert all(sequence.token_ids == alone(sequence) for sequence in sequences)


def test_removal_frees_blocks_wherever_the_sequence_is() -> None:
    manager = BlockManager(20, 2)
    scheduler = Scheduler(manager, max_sequences=2, budget=16)
    sequences = [make(order, [order] * 5) for order in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.advance(scheduler.plan())
    random.Random(1).shuffle(sequences)
    for sequence in sequences:
        scheduler.remove([sequence])
        scheduler.check()
    assert scheduler.idle
    assert manager.available == 20


def test_a_leak_is_reported_with_the_whole_sum() -> None:
    manager = BlockManager(8, 2)
    sequence = make(0, [1, 2, 3])
    manager.admit(sequence)
    manager.extend(sequence, 3)
    with pytest.raises(AssertionError, match="2 blocks counted, 0 held"):
        manager.check([])
    manager.held = 0
    with pytest.raises(AssertionError, match=r"free 6 \+ used 2 \+ idle 0"):
        manager.check([])


def test_a_budget_too_small_for_decoding_is_refused() -> None:
    with pytest.raises(ValueError, match="token budget"):
        Scheduler(BlockManager(8, 2), max_sequences=9, budget=8)


def test_no_torch_is_imported() -> None:
    program = (
        "import sys, worker.engine.scheduler, worker.engine.block_manager, worker.engine.sequence; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
