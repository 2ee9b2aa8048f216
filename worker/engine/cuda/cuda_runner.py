"""The model runner for CUDA: fused kernels, graphs for decoding, the CPU one step behind the card.

A step that only decodes is one CUDA graph, sampling included; a step that prefills runs eagerly.
The sampled tokens stay on the card, where the next step reads them; the CPU gets them while that
step runs. All that a step needs from the CPU is in one array, which is copied once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nightherd.params import SamplingParams
from worker.engine.cuda import step
from worker.engine.cuda.graphs import Capture, GraphCache
from worker.engine.cuda.groups import Groups, PrefixIndex, padded_tiles
from worker.engine.cuda.kernel_selection import BLOCK, GROUPS, SAMPLE, CudaKernels
from worker.engine.cuda.kernels.reference import (
    PARTS_BYTES,
    SPLIT_BLOCKS,
    Prefixes,
    Splits,
    passes_of,
    split_count,
    splits_of,
)
from worker.engine.cuda.model import Attend, CudaModel, PrefillAttention, Rows, varlen_attention
from worker.engine.cuda.step import Layout, padded_splits
from worker.engine.interface import EngineRequest
from worker.engine.runner import Choices, PendingStep
from worker.engine.scheduler import Span, StepPlan
from worker.engine.sequence import Sequence
from worker.engine.torch.sampler import Sampler

_HOST_BUFFERS = 2
"""Two, as a step is packed while the copy of the one before may not have ended."""

ROWS_PER_SAMPLER = 128
"""Rows that torch's sampler samples at a time: 66 MB of float32 logits at 128k tokens, and up to
ten times that where it sorts."""


class HostBuffer:
    """Memory of the CPU, pinned where there is a card: a step is packed in it, and what the step
    sampled is copied back to it."""

    def __init__(self, size: int, choices: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.packed = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self.array: step.Ints = self.packed.numpy()
        self.tokens = torch.zeros(choices, dtype=torch.int32, pin_memory=pinned)
        self.best = torch.zeros(choices, dtype=torch.float32, pin_memory=pinned)
        self.uploaded: Any = None
        """On a card, the event that the packed step has been copied there."""
        self.downloaded: Any = None
        """On a card, the event that `tokens` and `best` have been copied back."""
        if pinned:
            self.uploaded, self.downloaded = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]


class _GrammarSampler(Sampler):
    """Torch's sampler, which honours all parameters, with a kernel for grammars' masks."""

    def __init__(self, vocab_size: int, device: torch.device, kernels: CudaKernels) -> None:
        super().__init__(vocab_size, device)
        self._kernels = kernels

    def forbid(self, logits: torch.Tensor, rows: list[int], masks: Any) -> None:
        row_indices = self.tensor(np.array(rows, np.int32))
        self._kernels.mask_logits(logits, row_indices, self.tensor(masks))


class CudaRunner:
    """`worker.engine.runner.AsyncRunner` on a CUDA device; on a CPU for tests."""

    name = "cuda"
    block_size = BLOCK

    @torch.inference_mode()
    def __init__(
        self,
        model: Any,
        *,
        kernels: CudaKernels,
        vocab_size: int,
        max_sequences: int,
        max_rows: int,
        context: int,
        capture: Capture | None = None,
    ) -> None:
        """Takes the weights out of a transformers model. `make_cache` must follow.

        `max_rows` is the most rows that a step computes. Raises `UnsupportedModelError` for a model
        that the engine does not cover.
        """
        self._model = CudaModel(model, kernels)
        self._kernels = kernels
        self.vocab_size = vocab_size
        self.num_blocks = 0
        self._max_sequences, self._max_rows = max_sequences, max_rows
        self._context = context
        self._device = device = self._model.device
        self._on_card = device.type == "cuda"
        self._varlen = varlen_attention(self._model.shape, self._model.dtype, device)
        self._graphs = GraphCache(capture)
        self._prefixes = _prefix_index(self._model)
        layout = Layout(
            max_rows,
            max_sequences,
            self._prefixes.max_tiles(max_sequences),
            padded_splits(max_sequences * split_count(context, BLOCK)),
        )
        size = layout.size + max_sequences * -(-context // BLOCK)
        self._host_buffers = [HostBuffer(size, max_sequences, device) for _ in range(_HOST_BUFFERS)]
        self._next_buffer = 0
        self._input = torch.zeros(size, dtype=torch.int32, device=device)
        # What the last step sampled, and what this one samples: two tensors, so that a step can run
        # twice, as for the capture of its graph.
        self._prev_tokens = torch.zeros(max_sequences, dtype=torch.int32, device=device)
        self._tokens = torch.zeros_like(self._prev_tokens)
        self._best = torch.zeros(max_sequences, dtype=torch.float32, device=device)
        # Allocated here, so that the KV cache leaves room for it.
        self._logits = torch.empty(
            max_sequences, self._model.shape.vocab_rows, dtype=self._model.dtype, device=device
        )
        self._prev_index: dict[int, int] = {}
        """The index in `_prev_tokens` of each sequence of the last step, by its identity."""
        self._gpu_samplable: dict[int, bool] = {}
        """What `supports_overlap` found of a sequence, by its identity."""
        self._parameters: dict[int, step.Ints] = {}
        """A sequence's `step.parameters_of`, by its identity."""
        # One for each `ROWS_PER_SAMPLER`: a sampler keeps what stays the same from step to step.
        self._samplers = [
            _GrammarSampler(vocab_size, device, kernels)
            for _ in range(0, max_sequences, ROWS_PER_SAMPLER)
        ]

    @torch.inference_mode()
    def make_cache(self, blocks: int) -> None:
        """Allocates the KV cache, in place of one that there was."""
        self._graphs.clear()
        self._model.make_cache(blocks)
        self.num_blocks = blocks

    def largest_prefill(self) -> None:
        """Runs a step that prefills as much as one may, of dummy sequences in whatever blocks there
        are: `memory.py` measures it."""
        # The most spans have the most logits; the longest ones take the most for attention.
        self._run_eagerly(self._prefill_spans(self._max_rows, self._dummy_sequence))
        longest = min(self._context - 1, self._max_rows)
        most = min(self._max_rows // longest, self._max_sequences)
        self._run_eagerly(
            [Span(sequence, 0, longest) for sequence in [self._dummy_sequence(longest)] * most]
        )

    def largest_decode(self) -> None:
        """Runs a step that decodes as many dummy sequences as may run, whose contexts have as many
        splits as one pass computes: longer ones take no more memory."""
        shape, rows = self._model.shape, self._max_sequences
        most = PARTS_BYTES // (4 * shape.heads * (shape.head_dim + 1))
        each, more = divmod(max(most, rows), rows)
        long, short = (
            self._dummy_sequence(min(self._context, splits * SPLIT_BLOCKS * BLOCK))
            for splits in (each + 1, each)
        )
        sequences = [long] * more + [short] * (rows - more)
        self._run_eagerly([Span(sequence, sequence.length - 1, 1) for sequence in sequences])

    def largest_sampling(self) -> None:
        """Runs a step that samples as many tokens as one may, with the parameters that take the
        most memory: torch's sampler must sort the whole vocabulary."""
        params = SamplingParams(
            temperature=100.0,
            top_p=0.95,
            repetition_penalty=1.1,
            frequency_penalty=0.1,
            logit_bias={0: 1.0},
            logprobs=20,
        )
        rows = min(self._max_rows, 2 * self._max_sequences)
        self._run_eagerly(
            self._prefill_spans(rows, lambda length: self._dummy_sequence(length, params))
        )

    def _prefill_spans(self, rows: int, make_sequence: Callable[[int], Sequence]) -> list[Span]:
        """The spans of a step that prefills about `rows` rows, as many spans as there may be."""
        count = min(self._max_sequences, rows)
        rows = min(rows, count * (self._context - 1))
        if 1 < count == rows and self._context > 2:
            count -= 1  # single rows alone would decode
        length, more = divmod(rows, count)
        short = make_sequence(length)
        spans = [Span(short, 0, length) for _ in range(count - more)]
        if more:
            long = make_sequence(length + 1)
            spans += [Span(long, 0, length + 1) for _ in range(more)]
        return spans

    def _dummy_sequence(self, length: int, params: SamplingParams | None = None) -> Sequence:
        """A sequence of no request, whose blocks may be others' too: for measuring."""
        params = params or SamplingParams(temperature=1.0, top_p=0.9)
        sequence = Sequence(EngineRequest((0,) * length, params, (0,), 1), 0, 0)
        sequence.block_ids = [block % self.num_blocks for block in range(-(-length // BLOCK))]
        return sequence

    def _run_eagerly(self, spans: list[Span]) -> None:
        """Runs a step of dummy sequences without capturing a graph: its own memory is measured."""
        graphs, self._graphs = self._graphs, GraphCache(None)
        try:
            self.execute(StepPlan(spans))
        finally:
            self._graphs = graphs
            for span in spans:
                self.forget(span.sequence)
            self._prev_index = {}

    def execute(self, plan: StepPlan) -> Choices:
        """Computes all positions of the plan into the KV cache, and chooses the next tokens."""
        return self.launch(plan)()

    def supports_overlap(self, sequence: Sequence) -> bool:
        found = self._gpu_samplable.get(id(sequence))
        if found is None:
            found = SAMPLE not in self._kernels.missing and step.gpu_samplable(sequence)
            self._gpu_samplable[id(sequence)] = found
        return found

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts a step; see `AsyncRunner`."""
        # Kernels run on the thread's current device.
        with torch.cuda.device(self._device) if self._on_card else contextlib.nullcontext():
            return self._start_step(plan)

    def _start_step(self, plan: StepPlan) -> PendingStep:
        spans, num_long = step.long_spans_first(plan)
        choosing = [span.sequence for span in spans if span.chooses]
        if not spans:
            return lambda: Choices([], [])
        indices = _choice_indices(plan, spans)
        by_kernel = all(map(self.supports_overlap, choosing))
        rows = step.bucket(len(spans), self._max_sequences)
        buffer = self._host_buffers[self._next_buffer]
        self._next_buffer = (self._next_buffer + 1) % _HOST_BUFFERS
        if rows is not None and step.only_decodes(plan):
            groups = None
            if GROUPS not in self._kernels.missing:
                groups = self._prefixes.groups([span.sequence for span in spans])
            tiles = 0 if groups is None else padded_tiles(len(groups.tiles))
            split_counts = np.array([span.start for span in spans]) // (SPLIT_BLOCKS * BLOCK) + 1
            several = groups is not None or split_counts.max() > 1
            splits = padded_splits(int(split_counts.sum())) if several else 0
            layout = Layout(rows, rows, tiles, splits)
            self._upload(buffer, layout, spans, groups, split_counts)
            logits = self._decode(layout, groups, split_counts, sampled=by_kernel)
        else:
            layout = Layout(plan.rows, max(1, len(choosing)))
            self._upload(buffer, layout, spans)
            logits = self._forward_eagerly(layout, spans, num_long)
            if by_kernel and choosing:
                self._sample_by_kernel(layout, logits)
        self._prev_index = {id(sequence): index for index, sequence in enumerate(choosing)}
        if not choosing:
            return lambda: Choices([], [])
        if not by_kernel:
            choices = _reordered(self._sample_by_torch(logits, choosing), indices)
            return lambda: choices
        return self._copy_to_host(buffer, len(choosing), indices)

    def _upload(
        self,
        buffer: HostBuffer,
        layout: Layout,
        spans: list[Span],
        groups: Groups | None = None,
        split_counts: step.Counts | None = None,
    ) -> None:
        """Packs a step and copies it to the card.

        The buffer's last copy, two steps ago, may not have ended: the engine does not wait for a
        step that samples nothing, or that failed.
        """
        if buffer.uploaded is not None:
            buffer.uploaded.synchronize()
        parameters = [self._parameters_of(span.sequence) for span in spans if span.chooses]
        used = step.pack(
            buffer.array, layout, spans, parameters, self._prev_index, groups, split_counts
        )
        self._input[:used].copy_(buffer.packed[:used], non_blocking=True)
        if buffer.uploaded is not None:
            buffer.uploaded.record()

    def _parameters_of(self, sequence: Sequence) -> step.Ints:
        found = self._parameters.get(id(sequence))
        if found is None:
            found = step.parameters_of(sequence, self.vocab_size)
            self._parameters[id(sequence)] = found
        return found

    def _rows(
        self, layout: Layout, prefix_splits: int = 0, passes: tuple[tuple[int, int], ...] = ()
    ) -> tuple[Rows, dict[str, torch.Tensor]]:
        """The step's rows as views of its array on the card, and all its views. Tokens that only
        the card has yet are filled in from the last step. Common prefixes have up to
        `prefix_splits` splits; `passes` are those of the splits."""
        views = layout.views(self._input)
        packed = views["tokens"]
        prev_tokens = self._prev_tokens[(-1 - packed).clamp_(0, len(self._prev_tokens) - 1)]
        tokens = torch.where(packed < 0, prev_tokens, packed)
        prefixes = splits = None
        if layout.tiles:
            prefixes = Prefixes(views["tiles"], views["members"], views["shared"], prefix_splits)
        if layout.splits:
            splits = Splits(views["split_rows"], views["first_splits"], passes)
        rows = Rows(tokens, views["positions"], views["first"], views["blocks"], prefixes, splits)
        return rows, views

    def _decode(
        self, layout: Layout, groups: Groups | None, split_counts: step.Counts, *, sampled: bool
    ) -> torch.Tensor:
        """Runs a step of one row a sequence, as a graph where that is possible. Returns logits
        [rows, vocab_rows], or with `sampled` the tokens that the kernel has sampled of them."""
        shape = self._model.shape
        passes = passes_of(split_counts, shape.heads, shape.head_dim, layout.splits)
        # The last pass takes the padding too.
        passes = (*passes[:-1], (layout.rows, layout.splits if len(passes) == 1 else passes[-1][1]))
        prefix_splits = 0
        if groups is not None:
            prefix_splits = _power_of_two(split_count(int(groups.tiles[:, 3].max()), 1))

        def step() -> torch.Tensor:
            rows, views = self._rows(layout, prefix_splits, passes)
            attend = self._model.decode_attention(rows)
            logits = self._model.forward(rows, views["ends"], attend)
            if sampled:
                self._sample_by_kernel(layout, logits)
                # A graph keeps its result: it must not be the logits, of each size.
                return self._tokens
            return self._copy_logits(logits)

        if len(passes) > 1:
            # Where passes end depends on the rows, and a graph would keep these ends.
            return step()
        return self._graphs.run((layout, prefix_splits, sampled), step)

    def _sample_by_torch(self, logits: torch.Tensor, sequences: list[Sequence]) -> Choices:
        """Samples by torch's sampler, which honours all parameters; some rows at a time, as float32
        logits and the sampler's tensors take many times the memory of the logits."""
        found = Choices([], [])
        for first in range(0, len(sequences), ROWS_PER_SAMPLER):
            part = sequences[first : first + ROWS_PER_SAMPLER]
            wide = logits[first : first + len(part), : self.vocab_size].float()
            some = self._samplers[first // ROWS_PER_SAMPLER].choose(wide, part)
            found.token_ids += some.token_ids
            found.best += some.best
            found.logprobs |= {first + index: each for index, each in some.logprobs.items()}
        return found

    def _copy_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy of a graph's logits, in memory that all sizes share."""
        shared = self._logits[: len(logits)]
        shared.copy_(logits)
        return shared

    def _forward_eagerly(self, layout: Layout, spans: list[Span], num_long: int) -> torch.Tensor:
        """Runs a step of any spans, the first `num_long` of several rows; returns logits
        [choices, vocab_rows]."""
        rows, views = self._rows(layout)
        attend = self._mixed_attention(rows, spans, num_long)
        return self._model.forward(rows, views["ends"], attend)

    def _mixed_attention(self, rows: Rows, spans: list[Span], num_long: int) -> Attend:
        """Prefill attention of the first `num_long` spans, decode attention of the single rows."""
        model, shape = self._model, self._model.shape
        long = [(span.start, span.count) for span in spans[:num_long]]
        prefill = PrefillAttention(shape, long, rows, self._kernels, self._varlen, model.dtype)
        if num_long == len(spans):
            return prefill
        single = slice(prefill.rows, None)
        splits = splits_of(
            [span.start + 1 for span in spans[num_long:]],
            BLOCK,
            self._device,
            heads=shape.heads,
            head_dim=shape.head_dim,
        )
        tokens, positions, first = (
            each[single] for each in (rows.tokens, rows.positions, rows.first)
        )
        part = Rows(tokens, positions, first, rows.blocks, splits=splits)
        decode = model.decode_attention(part)
        if num_long == 0:
            return decode

        def attend(qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            return torch.cat([prefill(qkv, cache), decode(qkv[single], cache)])

        return attend

    def _sample_by_kernel(self, layout: Layout, logits: torch.Tensor) -> None:
        """Samples into `_tokens` and `_best`, by the kernel."""
        views = layout.views(self._input)
        count = layout.choices
        parameters = views["parameters"]
        floats = parameters.view(torch.float32)
        streams = parameters[:2].T.contiguous().view(torch.int64)[:, 0]
        self._kernels.sample(
            logits,
            self.vocab_size,
            floats[2],
            parameters[3],
            floats[4],
            floats[5],
            streams,
            views["indices"],
            self._tokens[:count],
            self._best[:count],
        )

    def _copy_to_host(self, buffer: HostBuffer, count: int, indices: list[int]) -> PendingStep:
        """Keeps the tokens for the next step, and starts copying them to the CPU. The function that
        is returned waits for the copy."""
        self._prev_tokens.copy_(self._tokens)
        buffer.tokens[:count].copy_(self._tokens[:count], non_blocking=True)
        buffer.best[:count].copy_(self._best[:count], non_blocking=True)
        if buffer.downloaded is not None:
            buffer.downloaded.record()

        def wait() -> Choices:
            if buffer.downloaded is not None:
                buffer.downloaded.synchronize()
            choices = Choices(buffer.tokens[:count].tolist(), buffer.best[:count].tolist())
            return _reordered(choices, indices)

        return wait

    def forget(self, sequence: Sequence) -> None:
        for sampler in self._samplers:
            sampler.forget(sequence)
        self._parameters.pop(id(sequence), None)
        self._prefixes.forget(sequence)
        self._gpu_samplable.pop(id(sequence), None)

    def lost(self) -> bool:
        """Whether a CUDA error has made the context unusable for good."""
        if not self._on_card:
            return False
        try:
            torch.cuda.synchronize(self._device)
        except Exception:  # whatever driver and runtime raise
            return True
        return False

    def close(self) -> None:
        """Frees the weights, the graphs and the KV cache."""
        if self._on_card and not self.lost():
            torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._model.close()


def _prefix_index(model: CudaModel) -> PrefixIndex:
    shape = model.shape
    return PrefixIndex(
        block=BLOCK,
        heads_per_kv_head=shape.heads // shape.kv_heads,
        block_bytes=2 * shape.kv_width * BLOCK * model.dtype.itemsize,
    )


def _choice_indices(plan: StepPlan, spans: list[Span]) -> list[int]:
    """For each choice, in the plan's order, its index in the step's order."""
    at = {id(span): index for index, span in enumerate(s for s in spans if s.chooses)}
    return [at[id(span)] for span in plan.spans if span.chooses]


def _reordered(choices: Choices, indices: list[int]) -> Choices:
    if indices == list(range(len(indices))):
        return choices
    return Choices(
        [choices.token_ids[index] for index in indices],
        [choices.best[index] for index in indices],
        {
            new: choices.logprobs[index]
            for new, index in enumerate(indices)
            if index in choices.logprobs
        },
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
