"""Admission when blocks are scarce: as many sequences as a forecast from earlier outputs allows.

`benchmarks/admission.py` drives the real scheduler, and computes nothing.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightherd.params import SamplingParams
from tests.engines import ask, check, wait
from worker.engine import scheduler as scheduler_module
from worker.engine.block_manager import BlockManager
from worker.engine.engine import BatchEngine
from worker.engine.forecast import LONG, UNIT, JobLengths
from worker.engine.interface import EngineRequest
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "admission.py"
H100, H200 = 7065, 14250


@pytest.fixture(scope="module")
def admission() -> Any:
    spec = importlib.util.spec_from_file_location("admission", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["admission"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["admission"]


def test_forced_lengths_are_foreseen_exactly(admission: Any) -> None:
    """512/256 on a card of 80 GB: 12 blocks each at the end, and so many at once as that allows."""
    made = admission.run(admission.Job([512] * 1200, [256] * 1200, 256), H100)
    assert made.preemptions == 0
    assert made.recomputed == 0
    assert made.most == H100 // 12


def test_where_all_fit_max_sequences_run(admission: Any) -> None:
    made = admission.run(admission.Job([512] * 1100, [256] * 1100, 256), H200)
    assert (made.preemptions, made.most) == (0, 1024)


@pytest.mark.parametrize("separate_prefill", [True, False])
def test_a_generous_limit_keeps_few_out(separate_prefill: bool, admission: Any) -> None:
    """The limit of an output says little of its length; earlier outputs say enough."""
    rng = random.Random(2)
    outputs = [max(1, int(rng.lognormvariate(5, 0.8))) for _ in range(1500)]
    job = admission.Job([200] * 1500, outputs, 8192)
    made = admission.run(
        job, H100 // 4, max_sequences=512, budget=2048, separate_prefill=separate_prefill
    )
    assert made.recomputed <= 0.02
    # On average they hold 5.4 blocks, and 327 would be all that fit.
    assert made.most >= 0.8 * H100 // 4 / 5.4


def test_outputs_that_get_longer_are_learned(admission: Any) -> None:
    """Six times as long from one row on, which no history tells: it costs preemptions once."""
    preempted = []
    for more in (800, 1600):
        job = admission.Job([300] * (800 + more), [60] * 800 + [400] * more, 1024)
        made = admission.run(job, H100 // 4, max_sequences=512, budget=4096)
        preempted.append(made.preemptions)
    assert 0 < preempted[1] <= 1.1 * preempted[0]


# The scheduler.


def sequence(order: int, prompt: int, most: int, *, job: str = "", head: int = 0) -> Sequence:
    """The first `head` tokens of the prompt are the same for all."""
    tokens = (*range(head), *range(1000 * order + head, 1000 * order + prompt))
    request = EngineRequest(tokens, SamplingParams(), (0,), most, job=job)
    return Sequence(request, 0, order)


def scheduled(*sequences: Sequence, blocks: int, size: int = 16) -> Scheduler:
    made = Scheduler(BlockManager(blocks, size), max_sequences=64, budget=4096)
    for each in sequences:
        made.add(each)
    return made


def test_admission_stops_at_what_all_may_need() -> None:
    """Three blocks at the end, one now: three of them fit."""
    made = scheduled(*(sequence(order, 16, 32) for order in range(9)), blocks=9)
    assert len(made.plan().spans) == 3
    assert made.blocks.available == 6


def test_the_last_token_needs_no_room() -> None:
    made = scheduled(*(sequence(order, 16, 33) for order in range(9)), blocks=9)
    assert len(made.plan().spans) == 3


def test_what_is_shared_counts_once() -> None:
    """Eight samples of a prompt of ten blocks, two blocks each of their own."""
    made = scheduled(*(sequence(order, 161, 15, head=160) for order in range(8)), blocks=18)
    assert len(made.plan().spans) == 8
    for each in made.running:
        assert made.blocks.num_shared(each) == 10
    unshared = scheduled(*(sequence(order, 161, 15) for order in range(8)), blocks=25)
    assert len(unshared.plan().spans) == 2


def test_ends_at_different_times_are_foreseen() -> None:
    """Sequences that are about to end free blocks before the others have grown."""
    old = [sequence(order, 16, 33) for order in range(4)]
    made = scheduled(*old, blocks=12)
    made.advance(made.plan())
    for each in old:
        each.token_ids += [1] * 31
        each.computed = 46
        made.blocks.extend(each, 47)
    assert made.blocks.available == 0
    made.remove(old[:2])
    assert len(old[2].block_ids) == 3
    # 6 blocks are used, in two steps none; new ones take one until then, three at last.
    for order in range(9):
        made.add(sequence(10 + order, 15, 33))
    assert len(made.plan().spans) == 2 + 4
    assert made.blocks.available == 2


def test_each_job_has_its_own_history() -> None:
    def admitted(job: str) -> int:
        made = scheduled(*(sequence(order, 16, 160, job=job) for order in range(40)), blocks=44)
        for _ in range(200):
            made.length_history.of("short").add(20, stopped=True)
        return len(made.plan().spans)

    assert admitted("long") == 4
    assert admitted("short") >= 3 * admitted("long")


def test_preemption_raises_the_margin_and_ended_sequences_lower_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = scheduled(*(sequence(order, 16, 160) for order in range(40)), blocks=44)
    for _ in range(200):
        made.length_history.of("").add(20, stopped=True)
    careful = len(made.plan().spans)
    monkeypatch.setattr(made.blocks, "extend", lambda sequence, length: False)
    made._allocate_or_preempt(made.running[0], 10_000)
    assert made.preemptions == careful
    monkeypatch.undo()
    made._margin = 0.0
    monkeypatch.setattr(made, "_plan", lambda: made._preempt(made.running[-1]))
    for each in list(made._waiting)[:3]:
        made.running.append(each[1])
    for _ in range(2):
        made.plan()
    assert made._margin == pytest.approx(2 * scheduler_module._MARGIN_GROWTH)
    made.remove(made.running)
    assert 0 < made._margin < 2 * scheduler_module._MARGIN_GROWTH
    # And a margin keeps some out.
    monkeypatch.undo()
    with_margin = scheduled(*(sequence(order, 16, 160) for order in range(40)), blocks=44)
    for _ in range(200):
        with_margin.length_history.of("").add(20, stopped=True)
    with_margin._margin = 0.3
    assert len(with_margin.plan().spans) < careful


def test_where_blocks_are_plenty_nothing_is_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any, **more: Any) -> Any:
        raise AssertionError("a forecast")

    monkeypatch.setattr(scheduler_module, "Forecast", never)
    made = scheduled(*(sequence(order, 16, 33) for order in range(20)), blocks=60)
    assert len(made.plan().spans) == 20


def test_admission_is_retried_only_when_a_sequence_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = scheduled(*(sequence(order, 16, 32) for order in range(9)), blocks=9)
    made.advance(made.plan())
    for each in made.running:
        each.token_ids.append(1)
    tried: list[Sequence] = []
    match = made.blocks.match

    def watched(each: Sequence) -> Any:
        tried.append(each)
        return match(each)

    monkeypatch.setattr(made.blocks, "match", watched)
    assert len(made.plan().spans) == 3
    assert not tried
    made.remove(made.running[:1])
    assert len(made.plan().spans) == 3
    assert tried
    # One of a higher priority is tried at once.
    tried.clear()
    urgent = Sequence(EngineRequest((1,), SamplingParams(), (0,), 1, priority=3), 0, 99)
    made.add(urgent)
    made.plan()
    assert tried[0] is urgent


# The estimate from lengths.


def chances(lengths: JobLengths, *at: int) -> list[float]:
    return [float(chance) for chance in lengths.survival(np.array(at))]


def test_an_unknown_job_is_taken_to_be_long() -> None:
    lengths = JobLengths()
    lengths.update(np.array([], np.int64))
    assert chances(lengths, 0, 100, LONG) == [1, 1, 1]
    assert chances(lengths, 2 * LONG) == [pytest.approx(np.exp(-1))]


def test_running_and_cut_outputs_count_as_censored() -> None:
    lengths = JobLengths()
    for _ in range(10):
        lengths.add(20, stopped=True)
        lengths.add(60, stopped=False)
    lengths.update(np.array([100] * 20))
    # 10 of 40 stopped in the second unit, and none after.
    assert chances(lengths, 0, UNIT, 2 * UNIT, 5 * UNIT) == pytest.approx(
        [1, 1, 0.75, 0.75], abs=0.01
    )
    lengths.update(np.array([3]))
    assert chances(lengths, 2 * UNIT) == pytest.approx([0.5], abs=0.03)


def test_old_outputs_fade() -> None:
    lengths = JobLengths()
    for _ in range(5000):
        lengths.add(20, stopped=True)
    for _ in range(1500):
        lengths.add(300, stopped=True)
    lengths.update(np.array([], np.int64))
    assert chances(lengths, 100)[0] > 0.85
    assert chances(lengths, 400)[0] < 0.01


def test_the_engine_records_lengths_of_whole_outputs_alone(batch_engines: Any) -> None:
    engine: BatchEngine = batch_engines()
    recorded: list[int] = []
    record_length = engine.scheduler.record_length

    def watched(sequence: Sequence) -> None:
        recorded.append(sequence.generated)
        record_length(sequence)

    engine.scheduler.record_length = watched  # type: ignore[method-assign]
    long = engine.add(ask(max_new_tokens=200))
    assert wait(engine.add(ask(max_new_tokens=5))).finish_reason == "length"
    engine.abort([long])
    assert wait(engine.add(ask(max_new_tokens=3))).finish_reason == "length"
    check(engine)
    assert recorded == [5, 3]
