"""Measures how fast an engine is on this machine, and the machine's own limit.

The limit counts matrix products alone (2 FLOP a weight and token), at the rate of the fastest
product of the same shapes; a step of few rows is limited by reading the weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nightherd.errors import CheckpointError
from nightherd.params import SamplingParams
from worker.engine.cuda.graphs import EAGER_USES
from worker.engine.engine import BatchEngine
from worker.engine.interface import Engine, EngineRequest, StopCheck
from worker.engine.model.weights import Shape
from worker.engine.scheduler import Scheduler

_ROWS = (64, 128, 256)
"""Of the matrix products whose rate is the limit."""
_MAX_PROMPTS = 1024
_PROMPT, _SHORT_PROMPT = 512, 64
_MIN_TOKENS = 16
_TIMEOUT = 600.0
"""Seconds for one measurement."""
_GOOD_ENOUGH = 0.97
"""Of the best rate: the smallest batch or budget that reaches it is recommended, as smaller steps
have less latency."""


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """What the machine can do."""

    flops: float
    """FLOP a second of matrix products."""
    bandwidth: float
    """Bytes read a second, from a memory as large as the weights."""
    weights: int
    """Weights that a token is multiplied with, the output layer included."""
    output_weights: int
    weight_bytes: int

    def decode(self, batch: int) -> float:
        """Tokens a second when `batch` sequences decode."""
        by_rate = self.flops / (2 * self.weights)
        by_memory = batch * self.bandwidth / self.weight_bytes
        return min(by_rate, by_memory)

    @property
    def prefill(self) -> float:
        """Prompt tokens a second; only the last of a prompt needs the output layer."""
        return self.flops / (2 * (self.weights - self.output_weights))


@dataclass(slots=True)
class SpeedReport:
    """What `nightherd bench` measured, in tokens a second."""

    limits: MachineLimits
    prefill: dict[int, float] = field(default_factory=dict)
    """By token budget."""
    decode: dict[int, float] = field(default_factory=dict)
    """By batch."""

    @property
    def best_budget(self) -> int:
        return _smallest_of_the_best(self.prefill)

    @property
    def best_batch(self) -> int:
        return _smallest_of_the_best(self.decode)


def _smallest_of_the_best(rates: dict[int, float]) -> int:
    most = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= _GOOD_ENOUGH * most)


# The machine.


def machine_limits(shape: Shape, dtype: torch.dtype, device: torch.device) -> MachineLimits:
    """Measures the machine's limits for a model's shape, in about two seconds."""
    weight_bytes = shape.linear_weights * dtype.itemsize
    matrices = (
        (shape.hidden, shape.query_width + 2 * shape.kv_width),
        (shape.query_width, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
    )
    return MachineLimits(
        flops=max(matrix_rate(matrices, each, device) for each in _types(dtype, device)),
        bandwidth=_bandwidth(weight_bytes, device),
        weights=shape.linear_weights,
        output_weights=shape.hidden * shape.vocab_rows,
        weight_bytes=weight_bytes,
    )


def _types(dtype: torch.dtype, device: torch.device) -> set[torch.dtype]:
    """Number types whose products may be the fastest that suit one: a CPU without instructions for
    bfloat16 multiplies it in float32, many times faster than torch does."""
    return {dtype, torch.float32} if device.type == "cpu" else {dtype}


@torch.inference_mode()
def matrix_rate(
    matrices: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = 0.04,
) -> float:
    """FLOP a second of the fastest product with a matrix of these [inputs, outputs], at 64 to 256
    rows; each is tried for so many seconds."""
    best = 0.0
    for inputs, outputs in matrices:
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        for rows in _ROWS:
            x = torch.randn(rows, inputs, device=device).to(dtype)
            for product in _products(x, weight):
                best = max(best, 2 * rows * inputs * outputs / _time(product, device, seconds))
    return best


@torch.inference_mode()
def sustained_rate(
    matrices: Iterable[tuple[int, int]], dtype: torch.dtype, device: torch.device, seconds: float
) -> float:
    """FLOP a second of all these matrices in turn, each by its fastest product, over so many
    seconds: what is left of `matrix_rate` when the clock and the load of other users vary."""
    chosen = []
    for inputs, outputs in matrices:
        x = torch.randn(_ROWS[-1], inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        product = min(_products(x, weight), key=lambda product: _time(product, device, 0.02))
        chosen.append((2 * len(x) * inputs * outputs, product))
    done, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        for flop, product in chosen:
            product()
            done += flop
    return done / (time.perf_counter() - started)


def _products(x: torch.Tensor, weight: torch.Tensor) -> Iterator[Callable[[], object]]:
    """Candidates for the fastest product of rows with a matrix [outputs, inputs]."""
    yield lambda: torch.mm(x, weight.t())
    transposed = weight.t().contiguous()
    yield lambda: torch.mm(x, transposed)
    if x.device.type == "cpu":
        # Weights packed for oneDNN; the operations are private and may be missing.
        try:
            ops: Any = torch.ops.mkldnn
            packed = ops._reorder_linear_weight(weight.to_mkldnn(), x.shape[0])
            ops._linear_pointwise(x, packed, None, "none", [], "")
        except (RuntimeError, AttributeError, TypeError, NotImplementedError):
            return
        yield lambda: ops._linear_pointwise(x, packed, None, "none", [], "")


def _bandwidth(size: int, device: torch.device) -> float:
    """Bytes read a second from memory of about this size."""
    size = min(max(size, 1 << 20), 1 << 28)
    memory = torch.ones(size // 4, device=device)
    return memory.numel() * 4 / _time(memory.sum, device, 0.3)


def _time(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The least time of `work`, in seconds, repeated for about `seconds`."""

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return best


# The engine.


class SpeedTest:
    """Measures a started engine that has no other user."""

    def __init__(self, engine: Engine, vocab_size: int, context: int) -> None:
        """Raises `CheckpointError` for an engine that has no steps to measure."""
        if not isinstance(engine, BatchEngine):
            raise CheckpointError(
                "this checkpoint runs by transformers' generate, which has no batch or budget to "
                "choose; nightherd bench measures the engine"
            )
        self._engine = engine
        self.scheduler: Scheduler = engine.scheduler
        self._vocab_size = vocab_size
        self._context = min(context, self._positions(1))
        self._random = random.Random(0)  # noqa: S311 - token ids to measure with

    def fits(self, batch: int) -> bool:
        """Whether the KV cache has room for so many sequences, long enough to measure."""
        least = min(self._context, _SHORT_PROMPT + _MIN_TOKENS)
        return batch <= self.scheduler.max_sequences and self._positions(batch) >= least

    def warm_up(self) -> None:
        """Runs the first steps, of one row and of many, which are slow."""
        length = min(_SHORT_PROMPT, self._context // 2)
        self._generate(4, length, min(4, self._context - length), None)

    def prefill(self, budget: int, seconds: float) -> float:
        """Prompt tokens a second in steps of `budget` rows."""
        self.scheduler.budget = budget
        length = min(_PROMPT, self._context - 1)
        taken = self._generate(1, length, 1, None)
        # At least one whole step.
        count = max(1, budget // length, min(int(seconds / taken), _MAX_PROMPTS))
        taken = self._generate(count, length, 1, None)
        return count * length / taken

    def decode(self, batch: int, seconds: float) -> float:
        """Tokens a second when `batch` sequences decode."""
        length = min(_SHORT_PROMPT, self._context // 2)
        most = min(self._context, self._positions(batch)) - length
        # On CUDA the first steps of a size run without a graph, and the next captures it.
        meter = _Meter(batch, seconds, EAGER_USES + 1 if self._engine.name == "cuda" else 0)
        self._generate(batch, length, max(2, most), meter.make_stop_check)
        return meter.rate

    def _positions(self, batch: int) -> int:
        """Positions that the KV cache has for each of `batch` sequences."""
        blocks = self.scheduler.blocks
        return blocks.num_blocks // batch * blocks.block_size

    def _generate(
        self,
        count: int,
        prompt: int,
        max_new_tokens: int,
        make_stop_check: Callable[[], StopCheck] | None,
    ) -> float:
        """Runs requests of random tokens; returns the seconds from the first step to the end."""
        greedy = SamplingParams(temperature=0)
        handles = [
            self._engine.add(
                EngineRequest(
                    prompt_token_ids=self._tokens(prompt),
                    params=greedy,
                    seeds=(0,),
                    max_new_tokens=max_new_tokens,
                    make_stop_check=make_stop_check,
                )
            )
            for _ in range(count)
        ]
        try:
            outputs = [handle.futures[0].result(_TIMEOUT) for handle in handles]
        except TimeoutError:
            self._engine.abort(handles)
            raise CheckpointError(
                f"no measurement within {_TIMEOUT:.0f} s: this machine is too slow for it"
            ) from None
        for output in outputs:
            if output.finish_reason not in ("stop", "length"):
                reason = output.error_message or self._engine.broken or output.finish_reason
                raise CheckpointError(f"the engine failed: {reason}")
        started = min(output.started for output in outputs)
        return max(output.finished for output in outputs) - started

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.choices(range(self._vocab_size), k=count))


class _Meter:
    """Counts tokens, from the step in which the last sequence begins until the time is over.

    Its stop checks are called in the engine's thread, in each step, so its times are the steps'.
    """

    def __init__(self, sequences: int, seconds: float, skipped: int = 0) -> None:
        """`skipped`: further steps that are not counted, because they are slow."""
        self._missing = sequences
        self._skipped = sequences * skipped
        self._seconds = seconds
        self._begin = 0.0
        self._last = 0.0
        self._tokens = 0

    @property
    def rate(self) -> float:
        return self._tokens / (self._last - self._begin) if self._last > self._begin else 0.0

    def make_stop_check(self) -> StopCheck:
        """Makes the stop check of one sequence, which counts its tokens."""
        begun = False

        def count(token_id: int) -> bool:
            nonlocal begun
            now = time.perf_counter()
            if not begun:
                begun = True
                self._missing -= 1
                self._begin = now
                return False
            if self._missing:
                return False
            if self._skipped:
                self._skipped -= 1
                self._begin = now
                return False
            self._tokens += 1
            self._last = now
            return now - self._begin > self._seconds

        return count


def measure(
    test: SpeedTest,
    limits: MachineLimits,
    batches: Sequence[int],
    budgets: Sequence[int],
    seconds: float,
    progress: Callable[[str], None],
) -> SpeedReport:
    """Measures the budgets, and the batches that fit, in about so many seconds; `progress` is told
    what is measured next."""
    report = SpeedReport(limits)
    batches = [batch for batch in batches if test.fits(batch)]
    each = seconds / (len(budgets) + len(batches) + 1)
    progress("warming up")
    test.warm_up()
    for budget in budgets:
        progress(f"prefill, {budget} tokens a step")
        report.prefill[budget] = test.prefill(budget, each)
    for batch in batches:
        progress(f"decode, {batch} at once")
        report.decode[batch] = test.decode(batch, each)
    return report
