"""The model runner for CUDA: fused kernels, graphs for decoding, the CPU one step behind the card.

A step that only decodes is one CUDA graph, the choice of tokens included; a step that prefills
runs eagerly. The chosen tokens stay on the card, where the next step finds them; the CPU reads them
while that one runs. What a step needs from the CPU is one array, copied once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nightherd.params import SamplingParams
from worker.engine import cuda_step
from worker.engine.cuda_graphs import Capture, GraphCache
from worker.engine.cuda_groups import Groups, PrefixIndex, padded_tiles
from worker.engine.cuda_kernels import BLOCK, GROUPS, SAMPLE, Kernels
from worker.engine.cuda_model import (
    Attend,
    CudaModel,
    PrefillAttention,
    Rows,
    varlen_attention,
)
from worker.engine.cuda_step import Layout, padded_items
from worker.engine.interface import EngineRequest
from worker.engine.runner import Choices, Flight
from worker.engine.sampler import Sampler
from worker.engine.scheduler import Plan, Span
from worker.engine.sequence import Sequence
from worker.engine.triton_kernels.reference import (
    PARTS_BYTES,
    SPLIT_BLOCKS,
    Prefixes,
    Splits,
    cuts_of,
    splits_for,
    splits_of,
)

_STAGES = 2
"""A step is packed while the one before may not have been copied yet."""

CHOSEN_AT_ONCE = 128
"""Rows that the sampler of all parameters looks at together: 66 MB of logits at 128k tokens, and up
to ten times that where it sorts."""


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
        layout = Layout(
            max_rows,
            max_sequences,
            self._prefixes.most_tiles(max_sequences),
            padded_items(max_sequences * splits_for(context, BLOCK)),
        )
        size = layout.size + max_sequences * -(-context // BLOCK)
        self._stages = [_Stage(size, max_sequences, device) for _ in range(_STAGES)]
        self._turn = 0
        self._input = torch.zeros(size, dtype=torch.int32, device=device)
        # A step reads what the one before left, and writes beside it: so it can run twice.
        self._left = torch.zeros(max_sequences, dtype=torch.int32, device=device)
        self._tokens = torch.zeros_like(self._left)
        self._best = torch.zeros(max_sequences, dtype=torch.float32, device=device)
        # Made here, so that the KV cache does not get its memory.
        self._logits = torch.empty(
            max_sequences, self._model.shape.vocab_rows, dtype=self._model.dtype, device=device
        )
        self._left_by: dict[int, int] = {}
        self._plain: dict[int, bool] = {}
        self._parameters: dict[int, cuda_step.Ints] = {}
        # One a part, as each keeps what stays the same from step to step.
        self._samplers = [
            _GrammarSampler(vocab_size, device, kernels)
            for _ in range(0, max_sequences, CHOSEN_AT_ONCE)
        ]

    @torch.inference_mode()
    def make_cache(self, blocks: int) -> None:
        """The KV cache, anew."""
        self._graphs.clear()
        self._model.make_cache(blocks)
        self.num_blocks = blocks

    def largest_prefill(self) -> None:
        """Computes as much as a step may prefill, into whatever blocks there are, for nobody."""
        # As many spans as there may be have most logits, long ones most attention.
        self._try(self._spread(self._max_rows, self._nobody))
        longest = min(self._context - 1, self._max_rows)
        most = min(self._max_rows // longest, self._max_sequences)
        self._try([Span(sequence, 0, longest) for sequence in [self._nobody(longest)] * most])

    def largest_decode(self) -> None:
        """Likewise, a row for each of the sequences that may run, of contexts with as many splits
        as are computed at a time: longer ones take no more memory."""
        shape, rows = self._model.shape, self._max_sequences
        most = PARTS_BYTES // (4 * shape.heads * (shape.head_dim + 1))
        each, more = divmod(max(most, rows), rows)
        long, short = (
            self._nobody(min(self._context, splits * SPLIT_BLOCKS * BLOCK))
            for splits in (each + 1, each)
        )
        sequences = [long] * more + [short] * (rows - more)
        self._try([Span(sequence, sequence.length - 1, 1) for sequence in sequences])

    def largest_choose(self) -> None:
        """Likewise, as many choices as a step may have, by what takes most memory: a window that
        does not suffice, so that the vocabulary is sorted."""
        params = SamplingParams(
            temperature=100.0,
            top_p=0.95,
            repetition_penalty=1.1,
            frequency_penalty=0.1,
            logit_bias={0: 1.0},
            logprobs=20,
        )
        rows = min(self._max_rows, 2 * self._max_sequences)
        self._try(self._spread(rows, lambda length: self._nobody(length, params)))

    def _spread(self, rows: int, nobody: Callable[[int], Sequence]) -> list[Span]:
        """A step that prefills about so many rows, in as many spans as there may be."""
        count = min(self._max_sequences, rows)
        rows = min(rows, count * (self._context - 1))
        if 1 < count == rows and self._context > 2:
            count -= 1  # single rows alone would decode
        length, more = divmod(rows, count)
        short = nobody(length)
        spans = [Span(short, 0, length) for _ in range(count - more)]
        if more:
            long = nobody(length + 1)
            spans += [Span(long, 0, length + 1) for _ in range(more)]
        return spans

    def _nobody(self, length: int, params: SamplingParams | None = None) -> Sequence:
        params = params or SamplingParams(temperature=1.0, top_p=0.9)
        sequence = Sequence(EngineRequest((0,) * length, params, (0,), 1), 0, 0)
        sequence.block_ids = [block % self.num_blocks for block in range(-(-length // BLOCK))]
        return sequence

    def _try(self, spans: list[Span]) -> None:
        """Eagerly, and for no graph's sake: what is measured is the step's own memory."""
        graphs, self._graphs = self._graphs, GraphCache(None)
        try:
            self.execute(Plan(spans))
        finally:
            self._graphs = graphs
            for span in spans:
                self.forget(span.sequence)
            self._left_by = {}

    def execute(self, plan: Plan) -> Choices:
        """Computes all positions of the plan into the KV cache, and chooses the next tokens."""
        return self.launch(plan)()

    def runs_ahead(self, sequence: Sequence) -> bool:
        found = self._plain.get(id(sequence))
        if found is None:
            found = SAMPLE not in self._kernels.lacks and cuda_step.plain(sequence)
            self._plain[id(sequence)] = found
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
            groups = None
            if GROUPS not in self._kernels.lacks:
                groups = self._prefixes.groups([span.sequence for span in spans])
            tiles = 0 if groups is None else padded_tiles(len(groups.tiles))
            splits = np.array([span.start for span in spans]) // (SPLIT_BLOCKS * BLOCK) + 1
            several = groups is not None or splits.max() > 1
            items = padded_items(int(splits.sum())) if several else 0
            layout = Layout(rows, rows, tiles, items)
            self._send(stage, layout, spans, groups, splits)
            logits = self._decode(layout, groups, splits, sampled=plainly)
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
            choices = _reordered(self._choose(logits, choosing), places)
            return lambda: choices
        return self._bring_back(stage, len(choosing), places)

    def _send(
        self,
        stage: _Stage,
        layout: Layout,
        spans: list[Span],
        groups: Groups | None = None,
        splits: cuda_step.Counts | None = None,
    ) -> None:
        """Packs a step and copies it to the card.

        What the stage held two steps ago may be on its way still: nobody waits for a step that
        chooses nothing, or that failed.
        """
        if stage.sent is not None:
            stage.sent.synchronize()
        parameters = [self._parameters_of(span.sequence) for span in spans if span.chooses]
        used = cuda_step.pack(stage.array, layout, spans, parameters, self._left_by, groups, splits)
        self._input[:used].copy_(stage.packed[:used], non_blocking=True)
        if stage.sent is not None:
            stage.sent.record()

    def _parameters_of(self, sequence: Sequence) -> cuda_step.Ints:
        found = self._parameters.get(id(sequence))
        if found is None:
            found = cuda_step.parameters_of(sequence, self.vocab_size)
            self._parameters[id(sequence)] = found
        return found

    def _rows(
        self, layout: Layout, depth: int = 0, cuts: tuple[tuple[int, int], ...] = ()
    ) -> tuple[Rows, dict[str, torch.Tensor]]:
        """Views of the step's array on the card, with the tokens that only the card knows; what is
        common has up to `depth` splits."""
        views = layout.views(self._input)
        given = views["tokens"]
        left = self._left[(-1 - given).clamp_(0, len(self._left) - 1)]
        tokens = torch.where(given < 0, left, given)
        prefixes = splits = None
        if layout.tiles:
            prefixes = Prefixes(views["tiles"], views["members"], views["shared"], depth)
        if layout.items:
            splits = Splits(views["items"], views["row_items"], cuts)
        rows = Rows(tokens, views["positions"], views["first"], views["blocks"], prefixes, splits)
        return rows, views

    def _decode(
        self, layout: Layout, groups: Groups | None, splits: cuda_step.Counts, *, sampled: bool
    ) -> torch.Tensor:
        """One row a sequence, as a graph where that can be; logits [rows, vocab_rows], or the
        tokens if they have been `sampled`."""
        shape = self._model.shape
        cuts = cuts_of(splits, shape.heads, shape.head_dim, layout.items)
        # What fills up is joined with the rest.
        cuts = (*cuts[:-1], (layout.rows, layout.items if len(cuts) == 1 else cuts[-1][1]))
        depth = 0
        if groups is not None:
            depth = _power_of_two(splits_for(int(groups.tiles[:, 3].max()), 1))

        def step() -> torch.Tensor:
            rows, views = self._rows(layout, depth, cuts)
            attend = self._model.decode_attention(rows)
            logits = self._model.forward(rows, views["ends"], attend)
            if sampled:
                self._sample(layout, logits)
                # A graph keeps its result for good: not the logits of each size.
                return self._tokens
            return self._kept(logits)

        if len(cuts) > 1:
            # Where it is cut depends on the rows, and a graph would keep it.
            return step()
        return self._graphs.run((layout, depth, sampled), step)

    def _choose(self, logits: torch.Tensor, sequences: list[Sequence]) -> Choices:
        """By every parameter there is; a part of the rows at a time, as float32 and what sampling
        makes of it takes many times the memory of the logits."""
        found = Choices([], [])
        for first in range(0, len(sequences), CHOSEN_AT_ONCE):
            part = sequences[first : first + CHOSEN_AT_ONCE]
            wide = logits[first : first + len(part), : self.vocab_size].float()
            some = self._samplers[first // CHOSEN_AT_ONCE].choose(wide, part)
            found.token_ids += some.token_ids
            found.best += some.best
            found.logprobs |= {first + place: each for place, each in some.logprobs.items()}
        return found

    def _kept(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy in memory that all sizes share."""
        kept = self._logits[: len(logits)]
        kept.copy_(logits)
        return kept

    def _eagerly(self, layout: Layout, spans: list[Span], long: int) -> torch.Tensor:
        """Spans of any length, the `long` ones first; logits [choices, vocab_rows]."""
        rows, views = self._rows(layout)
        attend = self._attend(rows, spans, long)
        return self._model.forward(rows, views["ends"], attend)

    def _attend(self, rows: Rows, spans: list[Span], long: int) -> Attend:
        model, shape = self._model, self._model.shape
        given = [(span.start, span.count) for span in spans[:long]]
        prefill = PrefillAttention(shape, given, rows, self._kernels, self._varlen, model.dtype)
        if long == len(spans):
            return prefill
        single = slice(prefill.rows, None)
        splits = splits_of(
            [span.start + 1 for span in spans[long:]],
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
        for sampler in self._samplers:
            sampler.forget(sequence)
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
