"""A step's numbers as the device reads them: one array, so that one copy brings them there. numpy.

For each row: its token, its position, where its block ids begin. For each row that chooses: its
parameters. Which rows have blocks in common, and into which pieces decode attention splits their
contexts. Then the block ids of all sequences, one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nightherd.params import SamplingParams
from worker.engine import noise
from worker.engine.cuda_groups import Groups
from worker.engine.scheduler import Plan, Span
from worker.engine.sequence import Sequence

Ints = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5
"""A lower temperature is taken for 0: dividing by it would overflow."""
_PER_ROW, _PER_CHOICE, _PER_TILE = 3, 8, 4
_PARAMETERS = 6
_LEAST_ITEMS = 15


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is in the array of a step of so many rows, `choices` of which choose, which
    have blocks in common if there are `tiles`, and `items` splits if any context has several."""

    rows: int
    choices: int
    tiles: int = 0
    items: int = 0

    @property
    def size(self) -> int:
        """Numbers before the block ids."""
        per_row = _PER_ROW + (2 if self.tiles else 0) + (1 if self.items else 0)
        return (
            per_row * _aligned(self.rows)
            + _PER_CHOICE * _aligned(self.choices)
            + _PER_TILE * self.tiles
            + _aligned(self.items)
        )

    def views(self, array: Any) -> dict[str, Any]:
        """Named parts of an array (numpy) or a tensor (torch), each at a multiple of 16 bytes.

        `parameters` are [6, choices]: the halves of the stream, then temperature, top_k, top_p and
        log_min_p, by their bits. `tiles`, `members` and `shared` are `cuda_groups.Groups`, empty
        without tiles; `items` and `row_items` are `reference.Splits`' rows and first.
        """
        choices, wide, long = self.choices, _aligned(self.choices), _aligned(self.rows)
        grouped = long if self.tiles else 0
        split = long if self.items else 0
        begin = _PARAMETERS * wide
        views = {"parameters": array[:begin].reshape(_PARAMETERS, wide)[:, :choices]}
        for name, count, size in (
            ("places", choices, wide),
            ("ends", choices, wide),
            ("tokens", self.rows, long),
            ("positions", self.rows, long),
            ("first", self.rows, long),
            ("members", min(self.rows, grouped), grouped),
            ("shared", min(self.rows, grouped), grouped),
            ("tiles", _PER_TILE * self.tiles, _PER_TILE * self.tiles),
            ("row_items", min(self.rows, split), split),
            ("items", self.items, _aligned(self.items)),
        ):
            views[name] = array[begin : begin + count]
            begin += size
        views["tiles"] = views["tiles"].reshape(self.tiles, _PER_TILE)
        return {**views, "blocks": array[begin:]}


def _aligned(count: int) -> int:
    return -(-count // 4) * 4


def bucket(rows: int, most: int) -> int | None:
    """The batch size of the graph for `rows` decoding rows; None beyond `most`."""
    if rows > most:
        return None
    return next(size for size in buckets(most) if size >= rows)


def buckets(most: int) -> list[int]:
    """Batch sizes that graphs are captured for: padding costs little where batches are large."""
    few = [1, 2, 4, 8, 16, 24, 32, 48, 64]
    more = [*range(96, 257, 32), *range(320, 1025, 64), *range(1152, most + 128, 128)]
    return [*(size for size in few + more if size < most), most]


def decodes(plan: Plan) -> bool:
    """Whether each row of the plan is a sequence's last position."""
    return all(span.count == 1 and span.chooses for span in plan.spans)


def ordered(plan: Plan) -> tuple[list[Span], int]:
    """The plan's spans, those of several rows first, and how many those are; of these, what is a
    sequence's beginning comes before what is not."""
    long = [span for span in plan.spans if span.count > 1]
    long.sort(key=lambda span: span.start > 0)
    return [*long, *(span for span in plan.spans if span.count == 1)], len(long)


def padded_items(items: int) -> int:
    """The number of splits of the graph for so many: few sizes, as idle ones cost little."""
    power = 1 << max(_LEAST_ITEMS, items - 1).bit_length()
    return power // 4 * 3 if items <= power // 4 * 3 else power


def pack(
    array: Ints,
    layout: Layout,
    spans: Many[Span],
    parameters: Many[Ints],
    left: Mapping[int, int],
    groups: Groups | None = None,
    splits: Counts | None = None,
) -> int:
    """Fills in a step; how many numbers of the array it takes.

    `parameters` are `parameters_of` each span that chooses, in order. `left` says where the step
    before left the token of a sequence, by its identity: token -1 - i stands for the i-th of those.
    Rows and choices beyond the plan's get position -1, and are greedy. `splits` are how many each
    row's context has.
    """
    views = layout.views(array)
    _pack_rows(views, spans, left)
    if groups is not None:
        _pack_groups(views, groups)
    if layout.items and splits is not None:
        _pack_splits(views, splits)
    choosing = [span for span in spans if span.chooses]
    count = len(choosing)
    if count:
        views["parameters"][:, :count] = np.stack(parameters, axis=1)
        views["places"][:count] = [span.sequence.generated for span in choosing]
    views["parameters"][:, count:] = 0
    views["places"][count:] = 0
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


def _pack_rows(views: Mapping[str, Ints], spans: Many[Span], left: Mapping[int, int]) -> None:
    if all(span.count == 1 for span in spans):
        rows = len(spans)
        views["tokens"][:rows] = [_token(span.sequence, span.start, left) for span in spans]
        views["positions"][:rows] = [span.start for span in spans]
    else:
        rows = 0
        for span in spans:
            part = slice(rows, rows + span.count)
            views["positions"][part] = np.arange(span.start, span.start + span.count)
            known = span.sequence.token_ids[span.start : span.start + span.count]
            views["tokens"][rows : rows + len(known)] = known
            if len(known) < span.count:
                last = span.start + span.count - 1
                views["tokens"][rows + span.count - 1] = _token(span.sequence, last, left)
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


def _pack_splits(views: Mapping[str, Ints], splits: Counts) -> None:
    rows, items = len(splits), int(splits.sum())
    views["row_items"][:rows] = splits.cumsum() - splits
    views["row_items"][rows:] = 0
    views["items"][:items] = np.repeat(np.arange(rows), splits)
    views["items"][items:] = -1


def _token(sequence: Sequence, position: int, left: Mapping[int, int]) -> int:
    if position < sequence.known:
        return sequence.token_ids[position]
    return -1 - left[id(sequence)]


def parameters_of(sequence: Sequence, vocab_size: int) -> Ints:
    """A sequence's column of `Layout.views`' parameters: int32 [6]."""
    params = sequence.request.params
    stream = noise.stream_of(sequence.request.seeds[sequence.place])
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


_PLAIN_FIELDS = frozenset(
    {
        # What the kernel for samples does.
        *("temperature", "top_k", "top_p", "min_p", "seed", "seeds"),
        # What is computed, when a sample ends and what becomes of its text: not what is chosen.
        *("prompt_token_ids", "n", "priority", "job", "max_tokens", "max_length", "max_new_tokens"),
        *("stop", "stop_token_ids", "eos_token_ids", "ignore_eos", "make_stop_check"),
        *("skip_special_tokens", "include_stop_str_in_output"),
        *("truncate_prompt_tokens", "add_special_tokens"),
        # Looked at themselves: parameters, and the grammar that comes of a format.
        *("params", "response_format", "structured_outputs"),
    }
)
"""Fields of a request and its parameters that let the kernel choose. Any other that is set does
not, so that a new one is honoured by the sampler of all parameters, not ignored."""


def plain(sequence: Sequence) -> bool:
    """Whether temperature, top-k, top-p and min-p are all that its choice depends on."""
    request = sequence.request
    return sequence.grammar is None and _is_usual(request) and _is_usual(request.params)


def _is_usual(given: object) -> bool:
    kind: Any = type(given)
    return all(getattr(given, name) == usual for name, usual in _usual(kind))


@functools.cache
def _usual(kind: type[Any]) -> tuple[tuple[str, Any], ...]:
    """The fields that matter, with what they are where nobody sets them."""
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
    return tuple((name, usual) for name, usual in found.items() if name not in _PLAIN_FIELDS)
