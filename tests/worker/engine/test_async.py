"""Steps that overlap: the next is started before the last one's tokens are known; a fake device."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from tests.engines import admit_freely, ask
from worker.engine.block_manager import BlockManager
from worker.engine.engine import BatchEngine
from worker.engine.interface import EngineRequest, RequestHandle
from worker.engine.runner import AsyncRunner, Choices, PendingStep
from worker.engine.scheduler import Scheduler, StepPlan
from worker.engine.sequence import Sequence

VOCAB = 50


def following(tokens: list[int]) -> int:
    """The next token by a fake model: it depends on all tokens before."""
    return (sum(index * token for index, token in enumerate(tokens, 1)) * 7 + 3) % VOCAB


class FakeDevice:
    """Computes a step at its launch, and returns its choices when the pending step is called."""

    name = "fake"
    block_size = 4
    vocab_size = VOCAB

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.cache: dict[tuple[int, int], int] = {}
        """The token at each position of each block: it stands for keys and values here."""
        self.chosen: dict[int, int] = {}
        self.num_pending = 0
        self.max_pending = 0
        self.fail_at: set[int] = set()
        self.launches = 0
        self.no_overlap = lambda sequence: False

    def supports_overlap(self, sequence: Sequence) -> bool:
        return not self.no_overlap(sequence)

    def execute(self, plan: StepPlan) -> Choices:
        return self.launch(plan)()

    def launch(self, plan: StepPlan) -> PendingStep:
        self.launches += 1
        if self.launches in self.fail_at:
            raise RuntimeError("the launch failed")
        chosen: dict[int, int] = {}
        # All keys and values first: sequences may share the blocks of this very step.
        for span in plan.spans:
            for position in range(span.start, span.start + span.count):
                sequence = span.sequence
                if position < sequence.num_known_tokens:
                    token = sequence.token_ids[position]
                else:
                    token = self.chosen[id(sequence)]
                self.cache[self._cache_key(sequence, position)] = token
        for span in plan.spans:
            if span.chooses:
                end = span.start + span.count
                tokens = [self.cache[self._cache_key(span.sequence, p)] for p in range(end)]
                chosen[id(span.sequence)] = following(tokens)
        self.chosen = chosen
        tokens = list(chosen.values())
        number = self.launches
        self.num_pending += 1
        self.max_pending = max(self.max_pending, self.num_pending)

        def pending() -> Choices:
            self.num_pending -= 1
            if -number in self.fail_at:
                raise RuntimeError("the pending step failed")
            return Choices(tokens, [1.0] * len(tokens))

        return pending

    def _cache_key(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_ids[position // self.block_size], position % self.block_size

    def forget(self, sequence: Sequence) -> None:
        pass

    def lost(self) -> bool:
        self.num_pending = 0
        return False

    def close(self) -> None:
        pass


def engine_on(
    device: FakeDevice, *, budget: int = 32, max_sequences: int = 8, separate_prefill: bool = True
) -> BatchEngine:
    scheduler = Scheduler(
        BlockManager(device.num_blocks, device.block_size),
        max_sequences=max_sequences,
        budget=budget,
        separate_prefill=separate_prefill,
    )
    return BatchEngine(device, scheduler, 200)


def expected(request: EngineRequest) -> tuple[int, ...]:
    tokens = list(request.prompt_token_ids)
    for _ in range(request.max_new_tokens):
        token = following(tokens)
        if token in request.eos_token_ids:
            break
        tokens.append(token)
    return tuple(tokens[len(request.prompt_token_ids) :])


def run(engine: BatchEngine, requests: list[EngineRequest]) -> list[RequestHandle]:
    """Runs steps in this thread, with checks between them."""
    handles = [engine.add(request) for request in requests]
    for _ in range(10_000):
        engine._process_inbox()
        engine._step_or_recover()
        engine.scheduler.check()
        if all(future.done() for each in handles for future in each.futures):
            return handles
    raise AssertionError("it never ends")


def requests_of(rng: random.Random, count: int) -> list[EngineRequest]:
    prefix = tuple(rng.choices(range(VOCAB), k=9))
    return [
        ask(
            (
                *(prefix if rng.random() < 0.5 else ()),
                *rng.choices(range(VOCAB), k=1 + number % 23),
            ),
            max_new_tokens=rng.choice([1, 2, 5, 17, 40]),
            eos_token_ids=frozenset(rng.sample(range(VOCAB), rng.choice([0, 1, 3]))),
            seeds=tuple(range(rng.choice([1, 1, 3]))),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("separate_prefill", [True, False])
@pytest.mark.parametrize("blocks", [20, 200])
@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_the_same_when_steps_overlap(
    seed: int, blocks: int, separate_prefill: bool
) -> None:
    """With unforeseen ends, shared blocks, chunked prefills; preemption where blocks are few."""
    device = FakeDevice(blocks)
    assert isinstance(device, AsyncRunner)
    engine = engine_on(device, separate_prefill=separate_prefill, budget=11)
    admit_freely(engine.scheduler)
    requests = requests_of(random.Random(seed), 30)
    for request, handle in zip(requests, run(engine, requests), strict=True):
        for future in handle.futures:
            assert future.result().token_ids == expected(request)
    assert device.max_pending == 2
    assert blocks > 20 or engine.scheduler.preemptions
    assert engine.scheduler.idle
    engine._process_choices(max_pending=0)
    assert engine.scheduler.blocks.available == blocks


def test_no_overlap_while_a_sequence_does_not_support_it() -> None:
    device = FakeDevice(200)
    device.no_overlap = lambda sequence: len(sequence.request.prompt_token_ids) == 5
    engine = engine_on(device)
    run(engine, [ask((1, 2, 3, 4, 5), max_new_tokens=9)])
    assert device.max_pending == 1
    run(engine, [ask((1, 2, 3), max_new_tokens=9), ask((1, 2), max_new_tokens=20)])
    assert device.max_pending == 2


@pytest.mark.parametrize("kind", ["launch", "pending"])
def test_a_failed_step_costs_no_sequence_a_token(kind: str) -> None:
    """Whether it fails at its start, or later, when the next step is pending."""
    for number in range(2, 12):
        device = FakeDevice(200)
        device.fail_at = {number if kind == "launch" else -number}
        engine = engine_on(device)
        requests = requests_of(random.Random(number), 10)
        for request, handle in zip(requests, run(engine, requests), strict=True):
            for future in handle.futures:
                assert future.result().token_ids == expected(request)


def test_aborted_samples_leave_the_others_alone() -> None:
    device = FakeDevice(60)
    engine = engine_on(device)
    requests = requests_of(random.Random(9), 20)
    handles = [engine.add(request) for request in requests]
    for step in itertools.count():
        engine._process_inbox()
        engine._step_or_recover()
        engine.scheduler.check()
        if step in (3, 7, 8):
            engine.abort(handles[step - 3 :: 5])
        if all(future.done() for each in handles for future in each.futures):
            break
    for request, handle in zip(requests, handles, strict=True):
        for future in handle.futures:
            output = future.result()
            if output.finish_reason != "aborted":
                assert output.token_ids == expected(request)


def test_separate_prefill() -> None:
    """A step decodes or prefills; while many decode, none prefills for one free sequence alone."""
    device = FakeDevice(600)
    seen: list[Any] = []
    launch = device.launch

    def watched(plan: StepPlan) -> PendingStep:
        seen.append({span.count == 1 and span.chooses and span.start > 2 for span in plan.spans})
        return launch(plan)

    device.launch = watched  # type: ignore[method-assign]
    engine = engine_on(device, max_sequences=32, budget=64)
    rng = random.Random(2)
    requests = [ask((1, 2, 3), max_new_tokens=rng.randint(20, 60)) for _ in range(80)]
    run(engine, requests)
    assert all(len(kinds) == 1 for kinds in seen)
    prefills = sum(kinds == {False} for kinds in seen)
    assert prefills <= 2 + 48 / 2


def test_the_thread_works_too() -> None:
    engine = engine_on(FakeDevice(100))
    engine.start()
    try:
        requests = requests_of(random.Random(1), 12)
        for request, handle in zip(requests, map(engine.add, requests), strict=True):
            for future in handle.futures:
                assert future.result(20).token_ids == expected(request)
    finally:
        engine.stop(timeout=20)
