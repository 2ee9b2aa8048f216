"""The runner for CUDA on a CPU, with plain torch for its kernels and plain calls for its graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import tiny_llama
from tests.engines import PROMPTS, VOCAB, ask, tokens, wait
from tests.worker.engine.torch.test_torch_runner import LONG, MODELS, generated
from worker.engine.block_manager import BlockManager
from worker.engine.cuda import cuda_runner
from worker.engine.cuda import step as cuda_step
from worker.engine.cuda.cuda_runner import CudaRunner
from worker.engine.cuda.graphs import GraphCache, Step
from worker.engine.cuda.kernel_selection import fused_kernels
from worker.engine.cuda.kernels import attention, prefix, reference
from worker.engine.cuda.step import Layout, bucket, buckets, pack, parameters_of
from worker.engine.engine import BatchEngine
from worker.engine.runner import AsyncRunner
from worker.engine.scheduler import Scheduler, Span, StepPlan
from worker.engine.sequence import Sequence
from worker.engine.torch.torch_runner import TorchRunner


def fake_capture(step: Step) -> Step:
    """A graph that calls the function again, and keeps its result where it was."""
    result = step()

    def replay() -> torch.Tensor:
        result.copy_(step())
        return result

    return replay


def runner_of(
    model: Any, *, blocks: int = 40, kernels: Any = reference, max_sequences: int = 16
) -> CudaRunner:
    runner = CudaRunner(
        model,
        kernels=kernels,
        vocab_size=VOCAB,
        max_sequences=max_sequences,
        max_rows=64,
        context=256,
        capture=fake_capture,
    )
    runner.make_cache(blocks)
    return runner


@pytest.fixture
def started() -> Iterator[Any]:
    made: list[BatchEngine] = []

    def start(runner: Any, *, max_sequences: int = 16, budget: int = 64) -> BatchEngine:
        manager = BlockManager(runner.num_blocks, runner.block_size)
        scheduler = Scheduler(
            manager, max_sequences=max_sequences, budget=budget, separate_prefill=True
        )
        engine = BatchEngine(runner, scheduler, 256)
        made.append(engine)
        engine.start()
        return engine

    yield start
    for engine in made:
        engine.stop(timeout=20)
        assert engine.broken is None


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_transformers_greedy(name: str, started: Any) -> None:
    model = MODELS[name]()
    prompts = [*PROMPTS, LONG]
    wanted = generated(model, prompts, 32)
    runner = runner_of(model)
    assert isinstance(runner, AsyncRunner)
    engine = started(runner)
    assert tokens(engine, *(ask(prompt, max_new_tokens=32) for prompt in prompts)) == [
        tuple(row) for row in wanted
    ]
    assert len(runner._graphs) >= 1


def test_the_kernels_themselves_give_the_same(started: Any) -> None:
    wanted = generated(tiny_llama(), PROMPTS[:3], 6)
    engine = started(runner_of(tiny_llama(), kernels=fused_kernels()))
    got = tokens(engine, *(ask(prompt, max_new_tokens=6) for prompt in PROMPTS[:3]))
    assert got == [tuple(row) for row in wanted]


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block each, so that contexts of the tiny model have several."""
    for module in (reference, attention, prefix, cuda_runner):
        monkeypatch.setattr(module, "SPLIT_BLOCKS", 1)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("fused", [False, True])
def test_long_contexts_among_short_ones(fused: bool, started: Any) -> None:
    prompts, count = [PROMPTS[1], LONG, PROMPTS[0]], 70
    if fused:  # which is by_torch
        prompts, count = [PROMPTS[0], LONG[:70]], 3
    wanted = generated(tiny_llama(), prompts, count)
    runner = runner_of(tiny_llama(), kernels=fused_kernels() if fused else reference)
    engine = started(runner)
    got = tokens(engine, *(ask(prompt, max_new_tokens=count) for prompt in prompts))
    assert got == [tuple(row) for row in wanted]
    sizes = [size[0] for size in runner._graphs._uses]
    assert 12 in {layout.splits for layout in sizes}


@pytest.mark.usefixtures("short_splits")
def test_parts_that_would_take_too_much_memory_are_made_in_passes(
    started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps are cut depends on their rows: no graph may keep it."""
    prompts = [PROMPTS[1], LONG, PROMPTS[0], LONG[:100]]
    wanted = generated(tiny_llama(), prompts, 8)
    shape = (runner := runner_of(tiny_llama()))._model.shape
    monkeypatch.setattr(reference, "PARTS_BYTES", 3 * 4 * shape.heads * (shape.head_dim + 1))
    engine = started(runner)
    got = tokens(engine, *(ask(prompt, max_new_tokens=8) for prompt in prompts))
    assert got == [tuple(row) for row in wanted]
    assert not runner._graphs._uses


KERNEL_PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 0.7, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
]
TORCH_PARAMS: list[dict[str, Any]] = [
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "frequency_penalty": 0.5},
    {"logprobs": 3},
    {"min_tokens": 10, "temperature": 1.2},
    {"logit_bias": {5: 4.0}, "temperature": 1.0},
    {"allowed_token_ids": [3, 4, 5, 6, 7], "temperature": 1.0},
]


@pytest.mark.parametrize("by_torch", [False, True])
def test_samples_are_those_of_the_torch_runner(by_torch: bool, started: Any) -> None:
    """In other batches, other chunks of prefills, with few blocks: the same seeds give the same
    tokens."""
    rng = random.Random(5)
    prefix = rng.choices(range(VOCAB), k=70)
    kinds = TORCH_PARAMS + KERNEL_PARAMS if by_torch else KERNEL_PARAMS
    requests = [
        ask(
            (*(prefix if index % 3 else ()), *rng.choices(range(VOCAB), k=length)),
            seeds=(index,),
            max_new_tokens=20,
            **kinds[index % len(kinds)],
        )
        for index, length in enumerate([3, 40, 70, 17, 120, 1] * 2)
    ]
    plain = TorchRunner(tiny_llama(), vocab_size=VOCAB, num_blocks=128)
    wanted = tokens(started(plain), *requests)
    engine = started(runner_of(tiny_llama(), blocks=12), max_sequences=7, budget=37)
    assert tokens(engine, *requests) == wanted
    assert engine.scheduler.preemptions or engine.scheduler.blocks.hit_tokens


def test_logits_that_are_not_finite_fail_their_own_sample(started: Any) -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.data[7] = torch.nan
    engine = started(runner_of(model))
    bad, good = engine.add(ask((3, 7, 4))), engine.add(ask((3, 5, 4)))
    assert wait(bad).error_code == "engine_error"
    assert wait(good).finish_reason == "length"
    assert wait(engine.add(ask((3, 5, 4)))).token_ids == wait(good).token_ids


class FakeEvent:
    """Of a copy that has not ended until `synchronize`."""

    def __init__(self) -> None:
        self.waited, self.under_way = 0, False

    def record(self) -> None:
        self.under_way = True

    def synchronize(self) -> None:
        self.waited += self.under_way
        self.under_way = False


def test_a_step_is_not_packed_over_one_that_is_being_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine does not wait for steps that sample nothing, such as those of a long prompt."""
    runner = runner_of(tiny_llama())
    pack_step = cuda_step.pack
    for buffer in runner._host_buffers:
        buffer.uploaded = FakeEvent()

    def watched(array: Any, *given: Any) -> int:
        buffer = next(buffer for buffer in runner._host_buffers if buffer.array is array)
        assert not buffer.uploaded.under_way
        return pack_step(array, *given)

    monkeypatch.setattr(cuda_step, "pack", watched)
    one = sequence(90, blocks=2)
    for start in range(0, 80, 20):
        runner.launch(StepPlan([Span(one, start, 20)]))
    assert [buffer.uploaded.waited for buffer in runner._host_buffers] == [1, 1]


def test_a_graph_keeps_no_logits(started: Any) -> None:
    """Of each size and number of splits they would take gigabytes."""
    kept: list[torch.Tensor] = []

    def capture(step: Step) -> Step:
        kept.append(step())
        return fake_capture(step)

    runner = runner_of(tiny_llama())
    runner._graphs = GraphCache(capture)
    engine = started(runner)
    for by_torch in ({}, {"logprobs": 1}):
        for count in (1, 2, 3):
            prompts = [ask((3, 5, index), max_new_tokens=8, **by_torch) for index in range(count)]
            tokens(engine, *prompts)
    assert len(kept) >= 4
    memory = {result.untyped_storage().data_ptr() for result in kept}
    assert memory == {
        part.untyped_storage().data_ptr()
        for part in (runner._tokens, runner._logits)
        if part is not None
    }


# The parts.


def sequence(length: int, known: int | None = None, blocks: int = 0) -> Sequence:
    made = Sequence(ask(tuple(range(2, 2 + length)), temperature=0.5, top_k=9), 0, 0)
    if known is not None:
        made.num_unresolved = length - known
        del made.token_ids[known:]
    made.block_ids = list(range(blocks))
    return made


def test_a_step_is_packed_into_one_array() -> None:
    first, second, third = sequence(70, blocks=2), sequence(5, known=4, blocks=1), sequence(1)
    third.block_ids = [9]
    spans = [Span(first, 66, 3), Span(second, 4, 1), Span(third, 0, 1)]
    assert [span.chooses for span in spans] == [False, True, True]
    layout = Layout(rows=7, choices=3)
    array = np.full(200, -7, np.int32)
    columns = [parameters_of(each, VOCAB) for each in (second, third)]
    used = pack(array, layout, spans, columns, {id(second): 3})
    views = layout.views(array)
    assert views["tokens"].tolist() == [68, 69, 70, -4, 2, 0, 0]
    assert views["positions"].tolist() == [66, 67, 68, 4, 0, -1, -1]
    assert views["first"].tolist() == [0, 0, 0, 2, 3, 0, 0]
    assert views["ends"].tolist()[:2] == [3, 4]
    # How many were generated before, the unknown one included.
    assert second.generated == 0
    assert views["indices"].tolist() == [0, 0, 0]
    assert views["parameters"][2].view(np.float32).tolist() == [0.5, 0.5, 0.0]
    assert views["parameters"][3].tolist() == [9, 9, 0]
    assert views["blocks"][: used - layout.size].tolist() == [0, 1, 0, 9]


def test_the_parts_of_a_step_do_not_overlap() -> None:
    for rows, choices in ((1, 1), (5, 2), (16, 16)):
        layout = Layout(rows, choices)
        array = np.zeros(layout.size + 3, np.int32)
        for view in layout.views(array).values():
            view += 1
        assert array.max() == 1


def test_buckets() -> None:
    assert buckets(1) == [1]
    assert buckets(7) == [1, 2, 4, 7]
    assert buckets(256)[-2:] == [224, 256]
    assert [bucket(rows, 256) for rows in (1, 3, 33, 200, 256, 257)] == [1, 4, 48, 224, 256, None]
    for most in (1, 5, 64, 100, 256, 1000, 1024, 2000):
        assert buckets(most) == sorted(set(buckets(most)))
        assert buckets(most)[-1] == most


def test_decoding_steps_are_told_from_others() -> None:
    one, two = sequence(5), sequence(9)
    assert cuda_step.only_decodes(StepPlan([Span(one, 4, 1), Span(two, 8, 1)]))
    assert not cuda_step.only_decodes(StepPlan([Span(one, 3, 1)]))
    assert not cuda_step.only_decodes(StepPlan([Span(one, 3, 2)]))
    spans, long = cuda_step.long_spans_first(StepPlan([Span(one, 4, 1), Span(two, 0, 9)]))
    assert ([span.sequence for span in spans], long) == ([two, one], 1)
