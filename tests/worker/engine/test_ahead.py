"""The engine a step ahead of the tokens it knows, with a device that is a few lines of Python."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from tests.engines import ask, careless
from worker.engine.block_manager import BlockManager
from worker.engine.engine import BatchEngine
from worker.engine.interface import EngineRequest, Generation
from worker.engine.runner import AheadRunner, Choices, Flight
from worker.engine.scheduler import Plan, Scheduler
from worker.engine.sequence import Sequence

VOCAB = 50


def following(tokens: list[int]) -> int:
    """What the model says comes next: it depends on all that came before."""
    return (sum(place * token for place, token in enumerate(tokens, 1)) * 7 + 3) % VOCAB


class FakeDevice:
    """Computes a step when it is launched, and keeps its choices to itself until they are asked."""

    name = "fake"
    block_size = 4
    vocab_size = VOCAB

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.cache: dict[tuple[int, int], int] = {}
        """The token at each place of each block, for that is what keys and values say here."""
        self.left: dict[int, int] = {}
        self.aloft = 0
        self.most_aloft = 0
        self.fail_at: set[int] = set()
        self.launches = 0
        self.wait_for = lambda sequence: False

    def runs_ahead(self, sequence: Sequence) -> bool:
        return not self.wait_for(sequence)

    def execute(self, plan: Plan) -> Choices:
        return self.launch(plan)()

    def launch(self, plan: Plan) -> Flight:
        self.launches += 1
        if self.launches in self.fail_at:
            raise RuntimeError("the launch failed")
        chosen: dict[int, int] = {}
        # All keys and values first: sequences may share the blocks of this very step.
        for span in plan.spans:
            for position in range(span.start, span.start + span.count):
                sequence = span.sequence
                if position < sequence.known:
                    token = sequence.token_ids[position]
                else:
                    token = self.left[id(sequence)]
                self.cache[self._place(sequence, position)] = token
        for span in plan.spans:
            if span.chooses:
                end = span.start + span.count
                tokens = [self.cache[self._place(span.sequence, p)] for p in range(end)]
                chosen[id(span.sequence)] = following(tokens)
        self.left = chosen
        tokens = list(chosen.values())
        number = self.launches
        self.aloft += 1
        self.most_aloft = max(self.most_aloft, self.aloft)

        def flight() -> Choices:
            self.aloft -= 1
            if -number in self.fail_at:
                raise RuntimeError("the flight failed")
            return Choices(tokens, [1.0] * len(tokens))

        return flight

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_ids[position // self.block_size], position % self.block_size

    def forget(self, sequence: Sequence) -> None:
        pass

    def lost(self) -> bool:
        self.aloft = 0
        return False

    def close(self) -> None:
        pass


def engine_on(
    device: FakeDevice, *, budget: int = 32, max_sequences: int = 8, apart: bool = True
) -> BatchEngine:
    scheduler = Scheduler(
        BlockManager(device.num_blocks, device.block_size),
        max_sequences=max_sequences,
        budget=budget,
        apart=apart,
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


def run(engine: BatchEngine, requests: list[EngineRequest]) -> list[Generation]:
    """Steps by hand, so that everything can be checked between them."""
    generations = [engine.add(request) for request in requests]
    for _ in range(10_000):
        engine._take_in()
        engine._advance()
        engine.scheduler.check()
        if all(future.done() for each in generations for future in each.futures):
            return generations
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


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("blocks", [20, 200])
@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_the_same_a_step_behind(seed: int, blocks: int, apart: bool) -> None:
    """With ends that come as a surprise, shared blocks, chunks; preemption where blocks lack."""
    device = FakeDevice(blocks)
    assert isinstance(device, AheadRunner)
    engine = engine_on(device, apart=apart, budget=11)
    careless(engine.scheduler)
    requests = requests_of(random.Random(seed), 30)
    for request, generation in zip(requests, run(engine, requests), strict=True):
        for future in generation.futures:
            assert future.result().token_ids == expected(request)
    assert device.most_aloft == 2
    assert blocks > 20 or engine.scheduler.preemptions
    assert engine.scheduler.idle
    engine._take_choices(0)
    assert engine.scheduler.blocks.available == blocks


def test_who_must_know_its_tokens_waits_for_them() -> None:
    device = FakeDevice(200)
    device.wait_for = lambda sequence: len(sequence.request.prompt_token_ids) == 5
    engine = engine_on(device)
    run(engine, [ask((1, 2, 3, 4, 5), max_new_tokens=9)])
    assert device.most_aloft == 1
    run(engine, [ask((1, 2, 3), max_new_tokens=9), ask((1, 2), max_new_tokens=20)])
    assert device.most_aloft == 2


@pytest.mark.parametrize("kind", ["launch", "flight"])
def test_a_step_that_fails_costs_nobody_a_token(kind: str) -> None:
    """Whether it fails at its start, or later, when the next is under way."""
    for number in range(2, 12):
        device = FakeDevice(200)
        device.fail_at = {number if kind == "launch" else -number}
        engine = engine_on(device)
        requests = requests_of(random.Random(number), 10)
        for request, generation in zip(requests, run(engine, requests), strict=True):
            for future in generation.futures:
                assert future.result().token_ids == expected(request)


def test_aborted_samples_leave_the_others_alone() -> None:
    device = FakeDevice(60)
    engine = engine_on(device)
    requests = requests_of(random.Random(9), 20)
    generations = [engine.add(request) for request in requests]
    for step in itertools.count():
        engine._take_in()
        engine._advance()
        engine.scheduler.check()
        if step in (3, 7, 8):
            engine.abort(generations[step - 3 :: 5])
        if all(future.done() for each in generations for future in each.futures):
            break
    for request, generation in zip(requests, generations, strict=True):
        for future in generation.futures:
            output = future.result()
            if output.finish_reason != "aborted":
                assert output.token_ids == expected(request)


def test_decoding_and_prefilling_apart() -> None:
    """A step decodes or prefills, and does not prefill for a single free seat while many decode."""
    device = FakeDevice(600)
    seen: list[Any] = []
    launch = device.launch

    def watched(plan: Plan) -> Flight:
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
        for request, generation in zip(requests, map(engine.add, requests), strict=True):
            for future in generation.futures:
                assert future.result(20).token_ids == expected(request)
    finally:
        engine.stop(timeout=20)
