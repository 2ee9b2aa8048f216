"""A step's input as the device reads it: one array, so that one copy takes it there. numpy.

For each row: its token, its position, where its block ids begin. For each row whose next token is
sampled: its parameters. Which rows have blocks in common, and the splits of their contexts for
decode attention. Then the block ids of all sequences, one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nightherd.params import SamplingParams
from worker.engine import noise
from worker.engine.cuda.groups import Groups
from worker.engine.scheduler import Span, StepPlan
from worker.engine.sequence import Sequence

Ints = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5
"""A lower temperature is taken for 0: dividing by it would overflow."""
_PER_ROW, _PER_CHOICE, _PER_TILE = 3, 8, 4
_PARAMETERS = 6
_MIN_PADDED_SPLITS = 15


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is in the array of a step of `rows` rows, for `choices` of which a token is
    sampled. `tiles` is 0 where no rows have blocks in common, `splits` where each context is one
    split."""

    rows: int
    choices: int
    tiles: int = 0
    splits: int = 0

    @property
    def size(self) -> int:
        """How many numbers there are before the block ids."""
        per_row = _PER_ROW + (2 if self.tiles else 0) + (1 if self.splits else 0)
        return (
            per_row * _aligned(self.rows)
            + _PER_CHOICE * _aligned(self.choices)
            + _PER_TILE * self.tiles
            + _aligned(self.splits)
        )

    def views(self, array: Any) -> dict[str, Any]:
        """Named parts of an array (numpy) or a tensor (torch), each at a multiple of 16 bytes.

        `parameters` are [6, choices]: the halves of the stream, then temperature, top_k, top_p and
        log_min_p, by their bits. `indices` are the sampled tokens' in their samples' outputs,
        `ends` the rows that they follow. `tiles`, `members` and `shared` are `groups.Groups`, empty
        without tiles; `split_rows` and `first_splits` are `reference.Splits`' rows and first.
        """
        choices, wide, long = self.choices, _aligned(self.choices), _aligned(self.rows)
        grouped = long if self.tiles else 0
        split = long if self.splits else 0
        begin = _PARAMETERS * wide
        views = {"parameters": array[:begin].reshape(_PARAMETERS, wide)[:, :choices]}
        for name, count, size in (
            ("indices", choices, wide),
            ("ends", choices, wide),
            ("tokens", self.rows, long),
            ("positions", self.rows, long),
            ("first", self.rows, long),
            ("members", min(self.rows, grouped), grouped),
            ("shared", min(self.rows, grouped), grouped),
            ("tiles", _PER_TILE * self.tiles, _PER_TILE * self.tiles),
            ("first_splits", min(self.rows, split), split),
            ("split_rows", self.splits, _aligned(self.splits)),
        ):
            views[name] = array[begin : begin + count]
            begin += size
        views["tiles"] = views["tiles"].reshape(self.tiles, _PER_TILE)
        return {**views, "blocks": array[begin:]}


def _aligned(count: int) -> int:
    return -(-count // 4) * 4


def bucket(rows: int, max_rows: int) -> int | None:
    """The batch size of the graph for `rows` decoding rows; None beyond `max_rows`."""
    if rows > max_rows:
        return None
    return next(size for size in buckets(max_rows) if size >= rows)


def buckets(max_rows: int) -> list[int]:
    """Batch sizes that graphs are captured for, wider apart where batches are large: padding costs
    little there."""
    few = [1, 2, 4, 8, 16, 24, 32, 48, 64]
    more = [*range(96, 257, 32), *range(320, 1025, 64), *range(1152, max_rows + 128, 128)]
    return [*(size for size in few + more if size < max_rows), max_rows]


def only_decodes(plan: StepPlan) -> bool:
    """Whether every row of the plan is the last position of its sequence."""
    return all(span.count == 1 and span.chooses for span in plan.spans)


def long_spans_first(plan: StepPlan) -> tuple[list[Span], int]:
    """The plan's spans, those of several rows first, and how many those are. Of these, spans that
    begin at position 0 come first."""
    long = [span for span in plan.spans if span.count > 1]
    long.sort(key=lambda span: span.start > 0)
    return [*long, *(span for span in plan.spans if span.count == 1)], len(long)


def padded_splits(splits: int) -> int:
    """The number of splits of the graph for so many: few sizes, as padding costs little."""
    power = 1 << max(_MIN_PADDED_SPLITS, splits - 1).bit_length()
    return power // 4 * 3 if splits <= power // 4 * 3 else power


def pack(
    array: Ints,
    layout: Layout,
    spans: list[Span],
    parameters: list[Ints],
    prev_index: Mapping[int, int],
    groups: Groups | None = None,
    split_counts: Counts | None = None,
) -> int:
    """Writes a step into the array; returns how many numbers of it the step takes.

    `parameters` are `parameters_of` each span that chooses, in order. `prev_index` is the index of
    a sequence, by its identity, among those that the last step sampled: token -1 - i stands for the
    i-th of its tokens, which only the device has yet. Rows and choices beyond the plan's are
    padding: position -1, greedy. `split_counts` are the numbers of splits of the rows' contexts.
    """
    views = layout.views(array)
    _pack_rows(views, spans, prev_index)
    if groups is not None:
        _pack_groups(views, groups)
    if layout.splits and split_counts is not None:
        _pack_splits(views, split_counts)
    choosing = [span for span in spans if span.chooses]
    count = len(choosing)
    if count:
        views["parameters"][:, :count] = np.stack(parameters, axis=1)
        views["indices"][:count] = [span.sequence.generated for span in choosing]
    views["parameters"][:, count:] = 0
    views["indices"][count:] = 0
    counts = np.array([span.count for span in spans])
    last = np.cumsum(counts) - 1
    chooses = np.array([span.chooses for span in spans], bool)
    views["ends"][:count] = last[chooses]
    views["ends"][count:] = last[-1] if len(last) else 0

    lengths = [len(span.sequence.block_ids) for span in spans]
    total = sum(lengths)
    ids = itertools.chain.from_iterable(span.sequence.block_ids for span in spans)
    views["blocks"][:total] = np.fromiter(ids, np.int32, total)
    begins = np.cumsum(lengths) - lengths
    rows = int(counts.sum())
    views["first"][:rows] = np.repeat(begins, counts)
    return layout.size + total


def _pack_rows(views: Mapping[str, Ints], spans: list[Span], prev_index: Mapping[int, int]) -> None:
    if all(span.count == 1 for span in spans):
        rows = len(spans)
        views["tokens"][:rows] = [
            _token_or_prev(span.sequence, span.start, prev_index) for span in spans
        ]
        views["positions"][:rows] = [span.start for span in spans]
    else:
        rows = 0
        for span in spans:
            part = slice(rows, rows + span.count)
            views["positions"][part] = np.arange(span.start, span.start + span.count)
            tokens = span.sequence.token_ids[span.start : span.start + span.count]
            views["tokens"][rows : rows + len(tokens)] = tokens
            if len(tokens) < span.count:
                last = span.start + span.count - 1
                views["tokens"][rows + span.count - 1] = _token_or_prev(
                    span.sequence, last, prev_index
                )
            rows += span.count
    views["tokens"][rows:] = 0
    views["positions"][rows:] = -1
    views["first"][rows:] = 0


def _pack_groups(views: Mapping[str, Ints], groups: Groups) -> None:
    rows, tiles = len(groups.members), len(groups.tiles)
    views["members"][:rows] = groups.members
    views["members"][rows:] = 0
    views["shared"][:rows] = groups.shared
    views["shared"][rows:] = 0
    views["tiles"][:tiles] = groups.tiles
    views["tiles"][tiles:] = 0


def _pack_splits(views: Mapping[str, Ints], counts: Counts) -> None:
    rows, splits = len(counts), int(counts.sum())
    views["first_splits"][:rows] = counts.cumsum() - counts
    views["first_splits"][rows:] = 0
    views["split_rows"][:splits] = np.repeat(np.arange(rows), counts)
    views["split_rows"][splits:] = -1


def _token_or_prev(sequence: Sequence, position: int, prev_index: Mapping[int, int]) -> int:
    """The token at a position; the reference to the last step's where it is not known here yet."""
    if position < sequence.num_known_tokens:
        return sequence.token_ids[position]
    return -1 - prev_index[id(sequence)]


def parameters_of(sequence: Sequence, vocab_size: int) -> Ints:
    """A sequence's column of the `parameters` of `Layout.views`: int32 [6]."""
    params = sequence.request.params
    stream = noise.stream_of(sequence.request.seeds[sequence.index])
    sampled = params.temperature >= GREEDY_BELOW
    top_k = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
    column = np.empty(_PARAMETERS, np.int32)
    column[:2] = np.array([stream], np.int64).view(np.int32)
    column[2] = _bits(params.temperature if sampled else 0.0)
    column[3] = top_k
    column[4] = _bits(params.top_p)
    column[5] = _bits(log_min_p)
    return column


def _bits(value: float) -> int:
    return int(np.array([value], np.float32).view(np.int32)[0])


_GPU_SAMPLABLE_FIELDS = frozenset(
    {
        # What the sampling kernel honours.
        *("temperature", "top_k", "top_p", "min_p", "seed", "seeds"),
        # What is computed, when a sample ends, what becomes of its text: not what is sampled.
        *("prompt_token_ids", "n", "priority", "job", "max_tokens", "max_length", "max_new_tokens"),
        *("stop", "stop_token_ids", "eos_token_ids", "ignore_eos", "make_stop_check"),
        *("skip_special_tokens", "include_stop_str_in_output"),
        *("truncate_prompt_tokens", "add_special_tokens"),
        # Checked by themselves: the parameters, and the grammar that a format becomes.
        *("params", "response_format", "structured_outputs"),
    }
)
"""Fields of a request and of its parameters with which the sampling kernel can sample, whatever
their values. With any other that is set it cannot: torch's sampler honours a new one, and the
kernel would ignore it."""


def gpu_samplable(sequence: Sequence) -> bool:
    """Whether the sampling kernel can sample its tokens: they depend on temperature, top-k, top-p
    and min-p alone."""
    request = sequence.request
    return sequence.grammar is None and _is_default(request) and _is_default(request.params)


def _is_default(given: object) -> bool:
    kind: Any = type(given)
    return all(getattr(given, name) == default for name, default in _defaults(kind))


@functools.cache
def _defaults(kind: type[Any]) -> tuple[tuple[str, Any], ...]:
    """The fields that must have their default for `gpu_samplable`, with that default."""
    if issubclass(kind, SamplingParams):
        found = {
            name: field.get_default(call_default_factory=True)
            for name, field in kind.model_fields.items()
        }
    else:
        found = {
            field.name: field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
            for field in dataclasses.fields(kind)
        }
    return tuple(
        (name, default) for name, default in found.items() if name not in _GPU_SAMPLABLE_FIELDS
    )
