"""The largest steps there may be, and the share of a card that the KV cache gets beside them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nightherd.errors import CheckpointError
from tests.checkpoints import tiny_llama
from tests.engines import PROMPTS, VOCAB, ask, tokens
from tests.worker.engine.cuda.test_cuda_runner import fake_capture, runner_of, started
from tests.worker.engine.torch.test_torch_runner import generated
from worker.engine.cuda import graphs, memory, step
from worker.engine.cuda.cuda_runner import CudaRunner
from worker.engine.cuda.kernel_selection import BLOCK
from worker.engine.cuda.kernels import reference
from worker.engine.cuda.memory import GPU_MEMORY_UTILIZATION, MemoryProfile, measure
from worker.engine.scheduler import Span, StepPlan
from worker.engine.sequence import Sequence

__all__ = ["started"]

CPU = torch.device("cpu")
LARGEST = ("largest_prefill", "largest_decode", "largest_sampling")


def made(
    *, sequences: int = 16, rows: int = 64, context: int = 256, vocab: int = VOCAB, **given: Any
) -> CudaRunner:
    runner = CudaRunner(
        tiny_llama(**given),
        kernels=reference,
        vocab_size=vocab,
        max_sequences=sequences,
        max_rows=rows,
        context=context,
        capture=fake_capture,
    )
    runner.make_cache(3)
    return runner


def plans_of(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """The steps that a runner computes from now on."""
    plans: list[StepPlan] = []
    launch = runner.launch

    def watched(plan: StepPlan) -> Any:
        plans.append(plan)
        return launch(plan)

    monkeypatch.setattr(runner, "launch", watched)
    return plans


# The largest steps.


@pytest.mark.parametrize(
    ("sequences", "rows", "context"),
    [(8, 600, 64), (8, 600, 16), (16, 64, 256), (16, 16, 64), (5, 7, 3), (6, 40, 2), (1, 1, 9)],
)
def test_the_largest_steps_are_possible_steps(
    sequences: int, rows: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = made(sequences=sequences, rows=rows, context=context)
    plans = plans_of(runner, monkeypatch)
    runner.largest_prefill()
    prefills = len(plans)
    runner.largest_decode()
    decodes = len(plans)
    runner.largest_sampling()
    for plan in plans:
        assert 1 <= len(plan.spans) <= sequences
        assert plan.rows <= rows
        for span in plan.spans:
            assert 1 <= span.count < context
            assert span.start + span.count == span.sequence.length <= context
            assert span.chooses
    # No step has more rows, and none with as many has more choices, but for one that decodes.
    widest = plans[0]
    assert widest.rows == min(rows, sequences * (context - 1))
    counts = {span.count for span in widest.spans}
    assert len(widest.spans) >= sequences - (rows == sequences)
    assert max(counts) - min(counts) <= 1
    assert min(counts) > 1 or rows < 2 * sequences or context == 2
    longest = max(span.count for plan in plans[:prefills] for span in plan.spans)
    assert longest == min(rows, context - 1)
    assert [len(plan.spans) for plan in plans[prefills:decodes]] == [sequences]
    assert all(map(step.only_decodes, plans[prefills:decodes]))
    assert max(len(plan.spans) for plan in plans[decodes:]) >= sequences - (rows == sequences)
    assert not any(
        runner.supports_overlap(s.sequence) for plan in plans[decodes:] for s in plan.spans
    )


@pytest.mark.parametrize(
    ("sequences", "splits", "wanted"),
    # 4 blocks each, as far as the context goes, and at least one.
    [(2, 61, [31, 30]), (3, 6, [2, 2, 2]), (3, 2, [1, 1, 1]), (2, 1000, [40, 40])],
)
def test_the_largest_decode_has_as_many_splits_as_are_computed_at_a_time(
    sequences: int, splits: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows of long contexts take as much memory as many of short ones."""
    split = reference.SPLIT_BLOCKS * BLOCK
    context = 40 * split
    runner = made(sequences=sequences, context=context, max_position_embeddings=context)
    shape = runner._model.shape
    size = 4 * shape.heads * (shape.head_dim + 1)
    monkeypatch.setattr("worker.engine.cuda.cuda_runner.PARTS_BYTES", splits * size)
    plans = plans_of(runner, monkeypatch)
    runner.largest_decode()
    (plan,) = plans
    assert [span.sequence.length for span in plan.spans] == [each * split for each in wanted]


def test_measuring_leaves_nothing_behind(started: Any) -> None:
    """It needs few blocks, captures no graph, and tokens are what they were."""
    runner = runner_of(tiny_llama(), blocks=3)
    for _ in range(graphs.EAGER_USES + 2):
        for name in LARGEST:
            getattr(runner, name)()
    assert not runner._parameters
    assert not runner._gpu_samplable
    assert not runner._prev_index
    assert not len(runner._graphs)
    assert not any(sampler._batch.sequences for sampler in runner._samplers)
    runner.make_cache(40)
    wanted = generated(tiny_llama(), PROMPTS, 8)
    got = tokens(started(runner), *(ask(prompt, max_new_tokens=8) for prompt in PROMPTS))
    assert got == [tuple(row) for row in wanted]


# What is left of the card.


def test_the_cache_gets_what_is_left() -> None:
    gib = 1 << 30
    profile = MemoryProfile(
        total=140 * gib, used=16 * gib, prefill=4 * gib, decode=2 * gib, sampling=gib
    )
    assert profile.cache == int(0.92 * 140 * gib) - 16 * gib - int(1.1 * 6 * gib) - gib // 2
    profile = MemoryProfile(
        total=140 * gib, used=16 * gib, prefill=gib, decode=2 * gib, sampling=5 * gib
    )
    assert profile.cache == int(0.92 * 140 * gib) - 16 * gib - int(1.1 * 7 * gib) - gib // 2
    assert (
        MemoryProfile(total=10 * gib, used=9 * gib, prefill=gib, decode=gib, sampling=0).cache == 0
    )


class Card(TorchDispatchMode):
    """A card's memory: what the tensors take that are made while it is entered."""

    def __init__(self, total: int, weights: int = 0) -> None:
        super().__init__()
        self.total = total
        self.now = self.peak = weights
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self._take(each.untyped_storage())
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.add(storage.nbytes())
        weakref.finalize(storage, self._give, storage._cdata, storage.nbytes())

    def _give(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.now -= size

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def reset(device: torch.device) -> None:
            self.peak = self.now

        for name, fake in {
            "empty_cache": lambda: None,
            "synchronize": lambda device: None,
            "mem_get_info": lambda device: (self.total - self.now, self.total),
            "reset_peak_memory_stats": reset,
            "memory_allocated": lambda device: self.now,
            "max_memory_allocated": lambda device: self.peak,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set aside for what a test has none of."""
    monkeypatch.setattr(memory, "_GRAPHS_BYTES", 0)
    monkeypatch.setattr(memory, "_FRAGMENTATION", 1.0)


class Steps:
    """A runner whose steps take so much while they run, and leave so much behind when first run."""

    def __init__(self, card: Card, takes: dict[str, int], leaves: dict[str, int]) -> None:
        self._card, self._takes, self._leaves = card, takes, leaves
        self.ran: list[str] = []

    def __getattr__(self, name: str) -> Callable[[], None]:
        def step() -> None:
            if name not in self.ran:
                self._card.add(self._leaves.get(name, 0))
            self.ran.append(name)
            self._card.add(self._takes[name])
            self._card.now -= self._takes[name]

        return step


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("largest", LARGEST)
def test_the_largest_steps_are_measured(largest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(total=10_000, weights=1000)
    card.patch(monkeypatch)
    takes = {"largest_prefill": 300, "largest_decode": 200, "largest_sampling": 100}
    takes[largest] += 500
    # Libraries' workspaces, kernels' code: there from the first step on.
    leaves = {"largest_prefill": 30, "largest_decode": 20, "largest_sampling": 10}
    profile = measure(Steps(card, takes, leaves), CPU)
    assert profile == MemoryProfile(
        total=10_000,
        used=1060,
        prefill=takes["largest_prefill"],
        decode=takes["largest_decode"],
        sampling=takes["largest_sampling"],
    )
    assert profile.cache == 9200 - 1060 - max(takes.values()) - takes["largest_decode"]


def steps_of(runner: CudaRunner, rows: int, by_torch: bool) -> Iterator[StepPlan]:
    """A prefill of many sequences, and a step in which they decode."""
    given: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9}
    if by_torch:
        given |= {"temperature": 50.0, "repetition_penalty": 1.2, "logprobs": 5}
    count = runner._max_sequences
    sequences = [Sequence(ask((3, 4, 5)[:rows], **given), 0, index) for index in range(count)]
    for index, sequence in enumerate(sequences):
        sequence.block_ids = [index % runner.num_blocks]
    yield StepPlan([Span(sequence, 0, rows) for sequence in sequences])
    for sequence in sequences:
        sequence.token_ids.append(7)
    yield StepPlan([Span(sequence, rows, 1) for sequence in sequences])
    for sequence in sequences:
        runner.forget(sequence)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("sequences", [24, 136])
def test_cache_graphs_and_steps_fit_together(
    sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of torch's sampler too, which takes many times the memory of its logits."""
    with Card(total=160 << 20) as card:
        card.patch(monkeypatch)
        runner = made(sequences=sequences, rows=3 * sequences, vocab=6000, vocab_size=6000)
        profile = measure(runner, CPU)
        assert profile.total == card.total
        shape = runner._model.shape
        block = 2 * shape.layers * shape.kv_width * BLOCK * runner._model.dtype.itemsize
        blocks = profile.cache // block
        assert blocks > sequences
        runner.make_cache(blocks)
        taken = torch.empty(profile.decode, dtype=torch.uint8)
        for by_torch in (False, True):
            for plan in steps_of(runner, 3, by_torch):
                card.peak = card.now
                runner.execute(plan)
                assert card.peak <= GPU_MEMORY_UTILIZATION * card.total
        # And not for want of a use for it.
        assert card.now + taken.nbytes > 0.5 * card.total


def test_no_memory_for_the_largest_step_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(total=100)
    card.patch(monkeypatch)
    error: Exception = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    class Runner:
        def largest_prefill(self) -> None:
            raise error

        largest_decode = largest_sampling = largest_prefill

    with pytest.raises(CheckpointError, match="less with NIGHTHERD_TOKEN_BUDGET") as caught:
        measure(Runner(), CPU)
    assert "\n" not in str(caught.value)
    error = RuntimeError("an illegal instruction")
    with pytest.raises(RuntimeError, match="illegal instruction"):
        measure(Runner(), CPU)
