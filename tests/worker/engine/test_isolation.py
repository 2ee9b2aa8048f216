"""Isolation: a request that is wrong, or makes a step fail, fails alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engines import ask, check, tokens, wait
from worker.engine.cpu.level import levels_here
from worker.engine.engine import BatchEngine
from worker.engine.interface import EngineRequest, RequestHandle
from worker.engine.runner import Choices, ModelRunner
from worker.engine.scheduler import StepPlan
from worker.engine.sequence import Sequence

Make = Callable[..., BatchEngine]


class FaultyRunner:
    """A runner that fails, or holds, when a step has what the test says."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.fail: Callable[[StepPlan], Exception | None] = lambda plan: None
        self.poison: int | None = None
        self.gone = False
        self.steps: list[int] = []
        self.hold_at: int | None = None
        self.reached, self.release = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, plan: StepPlan) -> Choices:
        self.steps.append(len(plan.spans))
        if len(self.steps) == self.hold_at:
            self.reached.set()
            assert self.release.wait(20)
        error = self.fail(plan)
        if error is not None:
            raise error
        choices = self._runner.execute(plan)
        chosen = [span.sequence for span in plan.spans if span.chooses]
        for index, sequence in enumerate(chosen):
            if self.poison is not None and self.poison in sequence.token_ids:
                choices.best[index] = math.nan
        return choices

    def forget(self, sequence: Sequence) -> None:
        self._runner.forget(sequence)

    def lost(self) -> bool:
        return self.gone

    def close(self) -> None:
        self._runner.close()


@pytest.fixture
def faulty(batch_engines: Make) -> Callable[..., tuple[BatchEngine, FaultyRunner]]:
    """Makes engines on a runner with faults."""

    def make(**given: Any) -> tuple[BatchEngine, FaultyRunner]:
        made: list[FaultyRunner] = []

        def wrap(runner: ModelRunner) -> ModelRunner:
            made.append(FaultyRunner(runner))
            return made[0]

        return batch_engines(wrap=wrap, **given), made[0]

    return make


def has(token: int) -> Callable[[StepPlan], bool]:
    return lambda plan: any(token in span.sequence.token_ids for span in plan.spans)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("a kernel\nbroke"), "engine_error"), (MemoryError(), "out_of_memory")],
)
def test_one_poisonous_request_fails_alone(
    batch_engines: Make,
    faulty: Callable[..., tuple[BatchEngine, FaultyRunner]],
    error: Exception,
    code: str,
) -> None:
    requests = [ask((3, 10 + index), temperature=1.0) for index in range(8)]
    wanted = tokens(batch_engines(), *requests)
    engine, runner = faulty(start=False)
    poisoned = has(499)
    runner.fail = lambda plan: error if poisoned(plan) else None
    bad = engine.add(ask((499, 3)))
    good = [engine.add(request) for request in requests]
    engine.start()
    output = wait(bad)
    assert (output.finish_reason, output.error_code) == ("error", code)
    assert "\n" not in (output.error_message or "")
    assert [wait(handle).token_ids for handle in good] == wanted
    # All nine, half of them, and the half with it one by one.
    assert list(dict.fromkeys(runner.steps))[:3] == [9, 5, 1]
    check(engine)
    assert tokens(engine, requests[0]) == wanted[:1]


def test_a_failure_in_the_middle_costs_no_sequence_a_token(
    batch_engines: Make, faulty: Callable[..., tuple[BatchEngine, FaultyRunner]]
) -> None:
    requests = [
        ask((3, 10 + index), temperature=1.0, max_new_tokens=20, logprobs=1) for index in range(6)
    ]
    wanted = tokens(batch_engines(), *requests)
    engine, runner = faulty()
    runner.fail = lambda plan: RuntimeError("once") if len(runner.steps) in (7, 12) else None
    handles = [engine.add(request) for request in requests]
    outputs = [wait(handle) for handle in handles]
    assert [output.token_ids for output in outputs] == wanted
    assert all(output.logprobs and len(output.logprobs) == 20 for output in outputs)
    assert len(runner.steps) > 12
    check(engine)


def test_memory_that_is_enough_for_half_is_enough(
    batch_engines: Make, faulty: Callable[..., tuple[BatchEngine, FaultyRunner]]
) -> None:
    requests = [ask((3, 10 + index)) for index in range(8)]
    wanted = tokens(batch_engines(), *requests)
    engine, runner = faulty(start=False)
    runner.fail = lambda plan: (
        torch.OutOfMemoryError("x") if len(runner.steps) == 1 and len(plan.spans) > 4 else None
    )
    handles = [engine.add(request) for request in requests]
    engine.start()
    assert [wait(handle).token_ids for handle in handles] == wanted
    check(engine)


def test_logits_that_are_not_finite_fail_their_row_alone(
    faulty: Callable[..., tuple[BatchEngine, FaultyRunner]],
) -> None:
    engine, runner = faulty()
    good = ask((3, 4), temperature=0.8, top_p=0.9)
    wanted = tokens(engine, good)
    runner.poison = 77
    bad, fine = engine.add(ask((77, 4))), engine.add(good)
    assert "not finite" in (wait(bad).error_message or "")
    assert [wait(fine).token_ids] == wanted


@pytest.mark.parametrize("kind", [*levels_here(), "torch"])
def test_a_weight_that_is_nan_fails_the_samples_that_read_it(
    kind: str, model: Any, batch_engines: Make
) -> None:
    """Not by a stand-in: NaN comes out of the real kernels, for one token's embedding."""
    import copy

    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight.data[77] = math.nan
    good = [ask((3, 10 + index), temperature=1.0, max_new_tokens=30) for index in range(6)]
    wanted = tokens(batch_engines(kind=kind), *good)
    # So few blocks that those of the bad one are used again by the others.
    engine = batch_engines(model=broken, kind=kind, blocks=9, max_batch=4)
    for _ in range(3):
        bad = [engine.add(ask((5, 77, 4))), engine.add(ask((77,) * 40))]
        handles = [engine.add(request) for request in good]
        assert {wait(each).error_code for each in bad} == {"engine_error"}
        assert [wait(handle).token_ids for handle in handles] == wanted


def test_a_lost_device_aborts_and_says_so(
    faulty: Callable[..., tuple[BatchEngine, FaultyRunner]],
) -> None:
    engine, runner = faulty(start=False)
    runner.fail = lambda plan: RuntimeError("CUDA error: an illegal memory access")
    runner.gone = True
    handles = [engine.add(ask()) for _ in range(5)]
    engine.start()
    assert {wait(handle).finish_reason for handle in handles} == {"aborted"}
    assert engine.broken is not None
    assert wait(engine.add(ask())).finish_reason == "aborted"


def test_what_never_fits_fails_alone(batch_engines: Make) -> None:
    engine = batch_engines(blocks=2)
    large, grows, fine = (
        engine.add(ask(tuple(range(3, 103)))),
        engine.add(ask((3,), max_new_tokens=100)),
        engine.add(ask()),
    )
    for handle in (large, grows):
        output = wait(handle)
        assert (output.finish_reason, output.error_code) == ("error", "out_of_memory")
        assert "--kv-memory" in (output.error_message or "")
    assert wait(fine).finish_reason == "length"
    check(engine)


def test_abort_resolves_at_once_and_frees_its_blocks(
    batch_engines: Make, faulty: Callable[..., tuple[BatchEngine, FaultyRunner]]
) -> None:
    requests = [ask((3, index), temperature=1.0, max_new_tokens=40) for index in (10, 11, 12)]
    wanted = tokens(batch_engines(), *requests)
    engine, runner = faulty(start=False)
    runner.hold_at = 6
    handles = [engine.add(request) for request in requests]
    engine.start()
    assert runner.reached.wait(20)
    waiting = engine.add(ask())
    engine.abort([handles[1], waiting])
    for aborted in (handles[1], waiting):
        assert aborted.futures[0].result(0).finish_reason == "aborted"
    assert not handles[0].futures[0].done()
    runner.release.set()
    assert [wait(handles[index]).token_ids for index in (0, 2)] == [wanted[0], wanted[2]]
    check(engine)


def test_stop_aborts_everything(faulty: Callable[..., tuple[BatchEngine, FaultyRunner]]) -> None:
    engine, runner = faulty(max_batch=2)
    runner.hold_at = 3
    handles = [engine.add(ask(max_new_tokens=100)) for _ in range(5)]
    assert runner.reached.wait(20)
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    for handle in handles:
        assert wait(handle).finish_reason == "aborted"
    runner.release.set()
    stopper.join(20)
    assert not stopper.is_alive()
    assert wait(engine.add(ask())).finish_reason == "aborted"


def test_stop_before_start_aborts_too(batch_engines: Make) -> None:
    engine = batch_engines(start=False)
    handle = engine.add(ask())
    engine.stop()
    assert wait(handle).finish_reason == "aborted"


def test_a_factory_that_raises_fails_its_row_alone(batch_engines: Make) -> None:
    def bad_factory() -> Any:
        raise RuntimeError("no check")

    def bad_check(token: int) -> bool:
        raise RuntimeError("no answer")

    engine = batch_engines()
    (wanted,) = tokens(engine, ask())
    requests = [
        ask(make_stop_check=bad_factory),
        ask(make_grammar=bad_factory),
        ask(make_stop_check=lambda: bad_check),
        ask(),
    ]
    first, second, third, fine = [engine.add(request) for request in requests]
    assert wait(first).error_message == "RuntimeError: no check"
    assert wait(second).error_message == "RuntimeError: no check"
    assert wait(third).error_message == "RuntimeError: no answer"
    assert wait(fine).token_ids == wanted


def test_many_threads_add_and_abort(batch_engines: Make) -> None:
    """Every future is resolved exactly once, whatever the order."""
    engine = batch_engines(max_batch=7)
    handles: list[RequestHandle] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        for index in range(30):
            request = ask((3, number, index), temperature=1.0, max_new_tokens=1 + index % 5)
            handle = engine.add(request)
            with lock:
                handles.append(handle)
            if index % 3 == 0:
                engine.abort([handle])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reasons = [wait(handle).finish_reason for handle in handles]
    assert set(reasons) <= {"length", "aborted"}
    assert reasons.count("length") >= 80
    check(engine)


# Requests that break transformers' continuous batching; the docstrings say what happens there.


def test_an_id_beyond_the_vocabulary(batch_engines: Make) -> None:
    """There: the thread dies, and with it all that runs."""
    engine = batch_engines()
    fine = [engine.add(ask((3, index), max_new_tokens=100)) for index in (10, 11, 12)]
    bad = wait(engine.add(ask((3, 10**6))))
    assert (bad.finish_reason, bad.error_code) == ("error", "invalid_request")
    assert "1000000" in (bad.error_message or "")
    assert [len(wait(handle).token_ids) for handle in fine] == [100] * 3
    assert wait(engine.add(ask())).finish_reason == "length"
    check(engine)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (ask(()), "invalid_request"),
        (ask((5,) * 300), "context_length_exceeded"),
        (ask(max_new_tokens=0), "invalid_request"),
    ],
    ids=["empty", "longer-than-the-cache", "nothing-to-generate"],
)
def test_requests_that_cannot_run(request_: EngineRequest, code: str, batch_engines: Make) -> None:
    """There: they block the queue, or their futures stay unresolved."""
    engine = batch_engines(blocks=5)
    fine = engine.add(ask(max_new_tokens=80))
    assert wait(engine.add(request_)).error_code == code
    assert len(wait(fine).token_ids) == 80
    check(engine)


def test_a_cancelled_request_is_resolved(batch_engines: Make) -> None:
    """There: it is not."""
    engine = batch_engines()
    handle = engine.add(ask(max_new_tokens=240))
    engine.abort([handle])
    assert wait(handle).finish_reason == "aborted"
    check(engine)


def test_parameters_of_one_request_are_its_own(batch_engines: Make) -> None:
    """There: a temperature of 0 is divided by, and penalties and stops are ignored."""
    mixed = [
        ask(temperature=0.5, top_k=5),
        ask(temperature=0.0, max_new_tokens=60),
        ask(temperature=0.9, top_k=50, top_p=0.95, logprobs=2),
        ask(repetition_penalty=1.3, max_new_tokens=60),
        ask(temperature=0.8, seeds=(5, 6, 7)),
    ]
    together = batch_engines()
    handles = [together.add(request) for request in mixed]
    outputs = [[f.result(20).token_ids for f in handle.futures] for handle in handles]
    assert [len(of_one) for of_one in outputs] == [1, 1, 1, 1, 3]
    alone = batch_engines(max_batch=1)
    for request, of_one in zip(mixed, outputs, strict=True):
        assert [f.result(20).token_ids for f in alone.add(request).futures] == of_one
    assert len({tokens_ for of_one in outputs for tokens_ in of_one}) == 7


def test_the_same_request_twice(batch_engines: Make) -> None:
    """There: a second request with the same id replaces the first."""
    engine = batch_engines()
    request = ask(max_new_tokens=50)
    first, second = engine.add(request), engine.add(request)
    assert len(wait(first).token_ids) == len(wait(second).token_ids) == 50
    check(engine)
