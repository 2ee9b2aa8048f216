"""The model runner for CUDA: fused kernels, graphs for decoding, the CPU one step behind the card.

A step that only decodes is one CUDA graph, the choice of tokens included; a step that prefills
runs eagerly. The chosen tokens stay on the card, where the next step finds them; the CPU reads them
while that one runs. What a step needs from the CPU is one array, copied once.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from nightherd.params import SamplingParams
from worker.engine import cuda_step
from worker.engine.cuda_graphs import Capture, GraphCache
from worker.engine.cuda_groups import Groups, PrefixIndex, padded_tiles
from worker.engine.cuda_model import (
    BLOCK,
    Attend,
    CudaModel,
    Kernels,
    PrefillAttention,
    Rows,
    varlen_attention,
)
from worker.engine.cuda_step import Layout
from worker.engine.interface import EngineRequest
from worker.engine.runner import Choices, Flight
from worker.engine.sampler import Sampler
from worker.engine.scheduler import Plan, Span
from worker.engine.sequence import Sequence
from worker.engine.triton_kernels.reference import Prefixes, splits_for

_STAGES = 2
"""A step is packed while the one before may not have been copied yet."""

_LONG = 8192
"""Positions: from there on decoding takes no more memory."""


class _Stage:
    """Memory of the CPU that a step is packed in, and that its choices come back to."""

    def __init__(self, size: int, choices: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.packed = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self.array: cuda_step.Ints = self.packed.numpy()
        self.tokens = torch.zeros(choices, dtype=torch.int32, pin_memory=pinned)
        self.best = torch.zeros(choices, dtype=torch.float32, pin_memory=pinned)
        self.sent: Any = None
        """Events on a card: the packed step has been copied, the choices are here."""
        self.landed: Any = None
        if pinned:
            self.sent, self.landed = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]


class _GrammarSampler(Sampler):
    """For rows of every kind, eagerly; grammars by a kernel."""

    def __init__(self, vocab_size: int, device: torch.device, kernels: Kernels) -> None:
        super().__init__(vocab_size, device)
        self._kernels = kernels

    def forbid(self, logits: torch.Tensor, rows: list[int], masks: Any) -> None:
        places = self.tensor(np.array(rows, np.int32))
        self._kernels.mask_logits(logits, places, self.tensor(masks))


class CudaRunner:
    """`worker.engine.runner.AheadRunner` on a CUDA device; on a CPU for tests."""

    name = "cuda"
    block_size = BLOCK

    @torch.inference_mode()
    def __init__(
        self,
        model: Any,
        *,
        kernels: Kernels,
        vocab_size: int,
        max_sequences: int,
        max_rows: int,
        context: int,
        capture: Capture | None = None,
    ) -> None:
        """Takes the weights out of a transformers model. `make_cache` must follow.

        `max_rows` is the most that a step computes. Raises `UnsupportedModelError` for a model that
        the engine does not cover.
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
        layout = Layout(max_rows, max_sequences, self._prefixes.most_tiles(max_sequences))
        size = layout.size + max_sequences * -(-context // BLOCK)
        self._stages = [_Stage(size, max_sequences, device) for _ in range(_STAGES)]
        self._turn = 0
        self._input = torch.zeros(size, dtype=torch.int32, device=device)
        # A step reads what the one before left, and writes beside it: so it can run twice.
        self._left = torch.zeros(max_sequences, dtype=torch.int32, device=device)
        self._tokens = torch.zeros_like(self._left)
        self._best = torch.zeros(max_sequences, dtype=torch.float32, device=device)
        self._logits: torch.Tensor | None = None
        self._left_by: dict[int, int] = {}
        self._plain: dict[int, bool] = {}
        self._parameters: dict[int, cuda_step.Ints] = {}
        self._sampler = _GrammarSampler(vocab_size, device, kernels)

    @torch.inference_mode()
    def make_cache(self, blocks: int) -> None:
        """The KV cache, anew."""
        self._graphs.clear()
        self._model.make_cache(blocks)
        self.num_blocks = blocks

    def largest_prefill(self) -> None:
        """Computes as much as a step may prefill, into whatever blocks there are, for nobody."""
        count = min(self._context - 1, self._max_rows)
        whole, rest = divmod(self._max_rows, count)
        spans = [Span(sequence, 0, count) for sequence in [self._nobody(count)] * whole]
        if rest:
            spans.append(Span(self._nobody(rest), 0, rest))
        self._try(spans)

    def largest_decode(self) -> None:
        """Likewise, a row of a long context for each of the sequences that may run."""
        count = min(self._context, _LONG)
        sequence = self._nobody(count)
        self._try([Span(sequence, count - 1, 1) for _ in range(self._max_sequences)])

    def _nobody(self, length: int) -> Sequence:
        params = SamplingParams(temperature=1.0, top_p=0.9)
        sequence = Sequence(EngineRequest((0,) * length, params, (0,), 1), 0, 0)
        sequence.block_ids = [block % self.num_blocks for block in range(-(-length // BLOCK))]
        return sequence

    def _try(self, spans: list[Span]) -> None:
        self.execute(Plan(spans))
        for span in spans:
            self.forget(span.sequence)
        self._left_by = {}

    def execute(self, plan: Plan) -> Choices:
        """Computes all positions of the plan into the KV cache, and chooses the next tokens."""
        return self.launch(plan)()

    def runs_ahead(self, sequence: Sequence) -> bool:
        found = self._plain.get(id(sequence))
        if found is None:
            found = self._plain[id(sequence)] = cuda_step.plain(sequence)
        return found

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Flight:
        """Starts a step; see `AheadRunner`."""
        # Kernels run on the thread's current device.
        with torch.cuda.device(self._device) if self._on_card else contextlib.nullcontext():
            return self._start(plan)

    def _start(self, plan: Plan) -> Flight:
        spans, long = cuda_step.ordered(plan)
        choosing = [span.sequence for span in spans if span.chooses]
        if not spans:
            return lambda: Choices([], [])
        places = _places(plan, spans)
        plainly = all(map(self.runs_ahead, choosing))
        rows = cuda_step.bucket(len(spans), self._max_sequences)
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % _STAGES
        if rows is not None and cuda_step.decodes(plan):
            groups = self._prefixes.groups([span.sequence for span in spans])
            tiles = 0 if groups is None else padded_tiles(len(groups.tiles))
            layout = Layout(rows, rows, tiles)
            self._send(stage, layout, spans, groups)
            logits = self._decode(layout, spans, sampled=plainly)
        else:
            layout = Layout(plan.rows, max(1, len(choosing)))
            self._send(stage, layout, spans)
            logits = self._eagerly(layout, spans, long)
            if plainly and choosing:
                self._sample(layout, logits)
        self._left_by = {id(sequence): place for place, sequence in enumerate(choosing)}
        if not choosing:
            return lambda: Choices([], [])
        if not plainly:
            wide = logits[: len(choosing), : self.vocab_size].float()
            choices = _reordered(self._sampler.choose(wide, choosing), places)
            return lambda: choices
        return self._bring_back(stage, len(choosing), places)

    def _send(
        self, stage: _Stage, layout: Layout, spans: list[Span], groups: Groups | None = None
    ) -> None:
        """Packs a step and copies it to the card.

        What the stage held two steps ago may be on its way still: nobody waits for a step that
        chooses nothing, or that failed.
        """
        if stage.sent is not None:
            stage.sent.synchronize()
        parameters = [self._parameters_of(span.sequence) for span in spans if span.chooses]
        used = cuda_step.pack(stage.array, layout, spans, parameters, self._left_by, groups)
        self._input[:used].copy_(stage.packed[:used], non_blocking=True)
        if stage.sent is not None:
            stage.sent.record()

    def _parameters_of(self, sequence: Sequence) -> cuda_step.Ints:
        found = self._parameters.get(id(sequence))
        if found is None:
            found = cuda_step.parameters_of(sequence, self.vocab_size)
            self._parameters[id(sequence)] = found
        return found

    def _rows(self, layout: Layout) -> tuple[Rows, dict[str, torch.Tensor]]:
        """Views of the step's array on the card, with the tokens that only the card knows."""
        views = layout.views(self._input)
        given = views["tokens"]
        left = self._left[(-1 - given).clamp_(0, len(self._left) - 1)]
        tokens = torch.where(given < 0, left, given)
        prefixes = None
        if layout.tiles:
            prefixes = Prefixes(views["tiles"], views["members"], views["shared"])
        rows = Rows(tokens, views["positions"], views["first"], views["blocks"], prefixes)
        return rows, views

    def _decode(self, layout: Layout, spans: list[Span], *, sampled: bool) -> torch.Tensor:
        """One row a sequence, as a graph where that can be; logits [rows, vocab_rows], or the
        tokens if they have been `sampled`."""
        longest = max(span.start for span in spans) + 1
        splits = _power_of_two(splits_for(longest, BLOCK))

        def step() -> torch.Tensor:
            rows, views = self._rows(layout)
            attend = self._model.decode_attention(rows, splits)
            logits = self._model.forward(rows, views["ends"], attend)
            if sampled:
                self._sample(layout, logits)
                # A graph keeps its result for good: not the logits of each size.
                return self._tokens
            return self._kept(logits)

        return self._graphs.run((layout.rows, layout.tiles, splits, sampled), step)

    def _kept(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy in memory that all sizes share; made by the first, which runs eagerly."""
        if self._logits is None:
            self._logits = logits.new_empty(self._max_sequences, logits.shape[1])
        kept = self._logits[: len(logits)]
        kept.copy_(logits)
        return kept

    def _eagerly(self, layout: Layout, spans: list[Span], long: int) -> torch.Tensor:
        """Spans of any length, the `long` ones first; logits [choices, vocab_rows]."""
        rows, views = self._rows(layout)
        attend = self._attend(rows, spans, long)
        return self._model.forward(rows, views["ends"], attend)

    def _attend(self, rows: Rows, spans: list[Span], long: int) -> Attend:
        given = [(span.start, span.count, span.sequence.block_ids) for span in spans[:long]]
        prefill = PrefillAttention(self._model.shape, given, self._device, self._varlen)
        if long == len(spans):
            return prefill
        single = slice(prefill.rows, None)
        part = Rows(rows.tokens[single], rows.positions[single], rows.first[single], rows.blocks)
        longest = max(span.start for span in spans[long:]) + 1
        decode = self._model.decode_attention(part, splits_for(longest, BLOCK))
        if long == 0:
            return decode

        def attend(qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            return torch.cat([prefill(qkv, cache), decode(qkv[single], cache)])

        return attend

    def _sample(self, layout: Layout, logits: torch.Tensor) -> None:
        """Chooses into `_tokens` and `_best`."""
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
            views["places"],
            self._tokens[:count],
            self._best[:count],
        )

    def _bring_back(self, stage: _Stage, count: int, places: list[int]) -> Flight:
        """Leaves the tokens for the next step, and starts their way to the CPU."""
        self._left.copy_(self._tokens)
        stage.tokens[:count].copy_(self._tokens[:count], non_blocking=True)
        stage.best[:count].copy_(self._best[:count], non_blocking=True)
        if stage.landed is not None:
            stage.landed.record()

        def flight() -> Choices:
            if stage.landed is not None:
                stage.landed.synchronize()
            choices = Choices(stage.tokens[:count].tolist(), stage.best[:count].tolist())
            return _reordered(choices, places)

        return flight

    def forget(self, sequence: Sequence) -> None:
        self._sampler.forget(sequence)
        self._parameters.pop(id(sequence), None)
        self._prefixes.forget(sequence)
        self._plain.pop(id(sequence), None)

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


def _places(plan: Plan, spans: list[Span]) -> list[int]:
    """For each choice in the plan's order, its place in that of the step."""
    at = {id(span): place for place, span in enumerate(s for s in spans if s.chooses)}
    return [at[id(span)] for span in plan.spans if span.chooses]


def _reordered(choices: Choices, places: list[int]) -> Choices:
    if places == list(range(len(places))):
        return choices
    return Choices(
        [choices.token_ids[place] for place in places],
        [choices.best[place] for place in places],
        {
            new: choices.logprobs[place]
            for new, place in enumerate(places)
            if place in choices.logprobs
        },
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
