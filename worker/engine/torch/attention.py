"""Paged attention in plain torch: for machines without a compiler, and a reference for the kernels.

Prefill and decode rows of a step are computed alike. A tile, four rows of queries, is multiplied
with one page of 32 keys in one matrix product, whose shape never changes; the softmax takes its
maximum over all pages that a row sees, and sums page by page from position 0. So a row's result
depends on nothing but its query and the keys and values up to its position: it is batch invariant,
and the same bits for other chunks of a prefill and when it is computed again.

Keys and values are multiplied in the cache itself, as batches of pages: gathering them takes
several times as long. Pages of one tile alone are computed in runs of neighbours; a page of many
tiles, as in a prefill or a shared prefix, once for each of them, by a stride of zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from worker.engine.model.weights import Shape
from worker.engine.scheduler import Span

TILE_ROWS = 4
"""Rows of a tile, each one head's query at one position; more only where a key-value head serves
more query heads. Products of fewer rows take as long."""
PAGE = 32
"""Keys of one matrix product with a tile; the cache's blocks consist of such pages."""
CACHE_DTYPE = torch.float32
"""Float32 for every model: converting what a step reads takes longer than the step."""
SCRATCH_BYTES = 16 * 2**20
"""Of the scores and sums that are computed together."""
_MAX_GAP = 8
"""Unneeded pages that a run computes rather than ends: a call costs more than a few pages."""

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Group:
    """Pairs of a tile and a page with consecutive indices: [first, first + count)."""

    page: int
    """Of the first pair."""
    first: int
    count: int
    shared: bool
    """Whether all pairs are of this page; else each is of the page after the last one's."""


@dataclass(slots=True)
class _Part:
    """Tiles that are computed together, those with the most pages first."""

    rows: torch.Tensor
    """The step's row of each query, [tiles, queries]."""
    tile_of: torch.Tensor
    """Each pair's tile, [pairs]; any tile for an unneeded pair."""
    pairs_of: torch.Tensor
    """Each tile's pairs from position 0 on, [tiles, most pages], filled up with the first one."""
    tiles: list[int]
    """For each of those pages in turn, how many tiles reach it."""
    partly: torch.Tensor
    """Pairs with keys that some row must not see, [partly]."""
    hidden: torch.Tensor
    """Which, [partly, 1, tile rows, PAGE]."""
    groups: list[_Group]


class PagedAttention:
    """The KV cache of all layers, and attention over it.

    For each step `prepare`, then for each layer `write` and `attend`.
    """

    def __init__(
        self,
        shape: Shape,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`dtype` is that of queries and results. Raises `ValueError` for blocks that do not
        consist of whole pages."""
        if block_size % PAGE:
            raise ValueError(f"a block of {block_size} positions: must be a multiple of {PAGE}")
        self._shape = shape
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._group = shape.heads // shape.kv_heads
        self._queries = max(1, TILE_ROWS // self._group)
        """Positions of a tile; each has a row for every query head of the key-value head."""
        self._tile_rows = -(-self._queries * self._group // TILE_ROWS) * TILE_ROWS
        # Zeros: `attend` gives weight zero to what is in a page beyond a row's position, which
        # must be finite for that. `write` sees to it that it stays so.
        size = (num_blocks * block_size // PAGE, shape.kv_heads, PAGE, shape.head_dim)
        self._keys, self._values = (
            [torch.zeros(size, dtype=CACHE_DTYPE, device=device) for _ in range(shape.layers)]
            for _ in range(2)
        )
        self._cache_rows = torch.empty(0, dtype=torch.int64)
        self._output_rows = torch.empty(0, dtype=torch.int64)
        self._parts: list[_Part] = []
        self._scratch = torch.empty(0, device=device)

    def prepare(self, spans: list[Span], padded_rows: int) -> torch.Tensor:
        """Prepares the step's indices; returns its rows' positions, int64 [padded_rows].

        The rows are those of the spans in order; those from there to `padded_rows` stand for
        nothing, and get position 0.
        """
        layout = _Layout(spans, self._queries)
        table = _pages(spans, self._block_size)
        pages = table[layout.span_of_row, layout.positions // PAGE]
        heads = pages[:, None] * self._shape.kv_heads + np.arange(self._shape.kv_heads)
        self._cache_rows = self._tensor(
            (heads * PAGE + layout.positions[:, None] % PAGE).reshape(-1)
        )
        output_rows = np.zeros(padded_rows, np.int64)
        output_rows[: len(layout.output_rows)] = layout.output_rows
        self._output_rows = self._tensor(output_rows)
        self._parts = [self._part(layout, table, tiles) for tiles in self._split(layout)]
        most = max(len(part.tile_of) for part in self._parts) * self._pair_size
        if most > len(self._scratch):
            self._scratch = torch.empty(most, device=self._device)
        positions = np.zeros(padded_rows, np.int64)
        positions[: len(layout.positions)] = layout.positions
        return self._tensor(positions)

    @property
    def _pair_size(self) -> int:
        """Scratch numbers for one pair: queries, scores, sums."""
        return self._shape.kv_heads * self._tile_rows * (2 * self._shape.head_dim + PAGE)

    def _split(self, layout: _Layout) -> Iterator[slice]:
        """The tiles of each part."""
        ends = np.cumsum(layout.last // PAGE + 1)
        most = max(1, SCRATCH_BYTES // (4 * self._pair_size))
        first, done = 0, 0
        while first < len(ends):
            stop = max(first + 1, int(np.searchsorted(ends, done + most, side="right")))
            yield slice(first, stop)
            first, done = stop, int(ends[stop - 1])

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys, rotated, and values of the step's rows: each [padded rows, kv_heads, head_dim]."""
        size = self._shape.head_dim
        rows = len(self._cache_rows) // self._shape.kv_heads
        key, value = key[:rows].float().reshape(-1, size), value[:rows].float().reshape(-1, size)
        # A value that is not finite would spoil even rows that give it weight zero: those of
        # earlier positions, and of later owners of the block. So the value becomes a number, and
        # its key NaN, which such rows do not see.
        self._keys[layer].view(-1, size).index_copy_(0, self._cache_rows, key + value * 0)
        self._values[layer].view(-1, size).index_copy_(0, self._cache_rows, value.nan_to_num())

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attention of the step's rows: from rotated queries [padded rows, heads, head_dim] to
        [padded rows, heads * head_dim], of the same type."""
        shape = self._shape
        query = query.float() * shape.head_dim**-0.5
        query = query.view(-1, shape.kv_heads, self._group, shape.head_dim)
        outputs = torch.cat([self._attend_part(layer, query, part) for part in self._parts])
        return outputs.to(self._dtype).index_select(0, self._output_rows)

    def _attend_part(self, layer: int, query: torch.Tensor, part: _Part) -> torch.Tensor:
        """[tiles * queries, heads * head_dim], float32."""
        queries, scores, sums = self._buffers(len(part.tile_of))
        torch.index_select(self._tiles(query, part), 0, part.tile_of, out=queries)
        self._multiply(queries, self._keys[layer].transpose(2, 3), scores, part.groups)
        visible = scores.index_select(0, part.partly).masked_fill_(part.hidden, -torch.inf)
        scores.index_copy_(0, part.partly, visible)

        # Finite: every row sees position 0.
        highest = _of_tiles(scores.amax(-1), part).amax(1)
        scores.sub_(highest.index_select(0, part.tile_of)[..., None]).exp_()
        self._multiply(scores, self._values[layer], sums, part.groups)
        done = _summed(sums, part) / _summed(scores.sum(-1), part)[..., None]
        tiles, kv_heads = len(part.rows), self._shape.kv_heads
        done = done[:, :, : self._queries * self._group]
        done = done.reshape(tiles, kv_heads, self._queries, self._group, -1)
        return done.transpose(1, 2).reshape(tiles * self._queries, -1)

    def _buffers(self, pairs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, scores and sums of so many pairs, each [pairs, kv_heads, tile rows, size]."""
        size = (pairs, self._shape.kv_heads, self._tile_rows)
        made, begin = [], 0
        for width in (self._shape.head_dim, PAGE, self._shape.head_dim):
            end = begin + pairs * size[1] * size[2] * width
            made.append(self._scratch[begin:end].view(*size, width))
            begin = end
        return made[0], made[1], made[2]

    def _tiles(self, query: torch.Tensor, part: _Part) -> torch.Tensor:
        """Queries, [tiles, kv_heads, tile rows, head_dim]; zeros where a tile has no row."""
        shape, used = self._shape, self._queries * self._group
        tiles = len(part.rows)
        picked = query.index_select(0, part.rows.flatten())
        picked = picked.view(tiles, self._queries, shape.kv_heads, self._group, shape.head_dim)
        rows = query.new_zeros(tiles, shape.kv_heads, self._tile_rows, shape.head_dim)
        rows[:, :, :used] = picked.transpose(1, 2).flatten(2, 3)
        return rows

    def _multiply(
        self, left: torch.Tensor, pages: torch.Tensor, out: torch.Tensor, groups: list[_Group]
    ) -> None:
        """Each pair's rows by its page: `left` [pairs, kv_heads, tile rows, n], `pages`
        [pages, kv_heads, n, m], into `out` [pairs, kv_heads, tile rows, m]."""
        for group in groups:
            some = slice(group.first, group.first + group.count)
            if group.shared:
                for head, page in enumerate(pages[group.page]):
                    right = page.expand(group.count, -1, -1)
                    # Into a result of its own: in parts of another, torch multiplies one by one.
                    out[some, head] = torch.bmm(left[some, head], right)
            else:
                right = pages[group.page : group.page + group.count].flatten(0, 1)
                torch.bmm(left[some].flatten(0, 1), right, out=out[some].flatten(0, 1))

    def _part(self, layout: _Layout, table: _Ints, tiles: slice) -> _Part:
        last = layout.last[tiles]
        counts = last // PAGE + 1
        tile_of = np.repeat(np.arange(len(counts)), counts)
        turn = np.arange(len(tile_of)) - _before(counts)[tile_of]
        pair_of, groups, pairs = _grouped(table[layout.span_of_tile[tiles]][tile_of, turn])

        tile_of_pair = np.zeros(pairs, np.int64)
        tile_of_pair[pair_of] = tile_of
        pairs_of = np.repeat(pair_of[turn == 0][:, None], counts[0], axis=1)
        pairs_of[tile_of, turn] = pair_of

        # Each row's position; a row that only fills up its tile has the last one.
        positions = layout.tile_positions[tiles]
        rows = np.repeat(last[:, None], self._tile_rows, axis=1)
        rows[:, : self._queries * self._group] = np.repeat(positions, self._group, axis=1)
        partly = np.flatnonzero(rows.min(1)[tile_of] < (turn + 1) * PAGE - 1)
        keys = turn[partly, None] * PAGE + np.arange(PAGE)
        hidden = keys[:, None, None, :] > rows[tile_of[partly]][:, None, :, None]
        return _Part(
            rows=self._tensor(layout.tile_rows[tiles]),
            tile_of=self._tensor(tile_of_pair),
            pairs_of=self._tensor(pairs_of),
            tiles=[int((counts > page).sum()) for page in range(counts[0])],
            partly=self._tensor(pair_of[partly]),
            hidden=self._tensor(hidden),
            groups=groups,
        )

    def _tensor(self, values: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)


def _of_tiles(pairs: torch.Tensor, part: _Part) -> torch.Tensor:
    """Each tile's values of `pairs`, [tiles, most pages, …]."""
    found = pairs.index_select(0, part.pairs_of.flatten())
    return found.view(*part.pairs_of.shape, *pairs.shape[1:])


def _summed(pairs: torch.Tensor, part: _Part) -> torch.Tensor:
    """[tiles, …]: the sum of each tile's pairs, one after the other from position 0 on."""
    sums = pairs.index_select(0, part.pairs_of[:, 0])
    for page, tiles in enumerate(part.tiles[1:], 1):
        sums[:tiles] += pairs.index_select(0, part.pairs_of[:tiles, page])
    return sums


def _grouped(pages: _Ints) -> tuple[_Ints, list[_Group], int]:
    """Orders pairs by the page of each, so that groups can be multiplied at once: the pairs' new
    indices, the groups, and the number of indices, some of which stand for unneeded pairs."""
    found, of_pair, users = np.unique(pages, return_inverse=True, return_counts=True)
    groups: list[_Group] = []
    first_of = np.zeros(len(found), np.int64)
    end = 0
    alone = np.flatnonzero(users == 1)
    for run in np.split(alone, np.flatnonzero(np.diff(found[alone]) > _MAX_GAP + 1) + 1):
        if len(run):
            begin = int(found[run[0]])
            first_of[run] = end + found[run] - begin
            groups.append(_Group(begin, end, int(found[run[-1]]) - begin + 1, shared=False))
            end += groups[-1].count
    for index in np.flatnonzero(users > 1):
        first_of[index] = end
        groups.append(_Group(int(found[index]), end, int(users[index]), shared=True))
        end += groups[-1].count
    # Several pairs with one page have consecutive indices.
    order = np.argsort(of_pair, kind="stable")
    nth = np.empty_like(order)
    nth[order] = np.arange(len(order)) - _before(users)[of_pair[order]]
    return first_of[of_pair] + nth, groups, end


class _Layout:
    """The tile of each row of a step, and its index there. A tile has rows of one sequence."""

    def __init__(self, spans: list[Span], queries: int) -> None:
        counts = np.array([span.count for span in spans])
        starts = np.array([span.start for span in spans])
        tiles = -(-counts // queries)
        first_row, first_tile = _before(counts), _before(tiles)

        self.span_of_row = np.repeat(np.arange(len(spans)), counts)
        local = np.arange(counts.sum()) - first_row[self.span_of_row]
        self.positions = starts[self.span_of_row] + local
        span_of_tile = np.repeat(np.arange(len(spans)), tiles)
        # A tile that a span does not fill repeats the span's last row.
        of_tile = np.arange(tiles.sum()) - first_tile[span_of_tile]
        in_span = of_tile[:, None] * queries + np.arange(queries)
        in_span = np.minimum(in_span, counts[span_of_tile, None] - 1)
        positions = starts[span_of_tile, None] + in_span

        order = np.argsort(-positions[:, -1], kind="stable")
        self.span_of_tile = span_of_tile[order]
        self.tile_rows = (first_row[span_of_tile, None] + in_span)[order]
        self.tile_positions = positions[order]
        self.last = self.tile_positions[:, -1]
        """The last position of each tile, descending."""
        sorted_index = np.empty_like(order)
        sorted_index[order] = np.arange(len(order))
        tile = sorted_index[first_tile[self.span_of_row] + local // queries]
        self.output_rows = tile * queries + local % queries
        """Each row's index in the flattened tiles."""


def _before(counts: _Ints) -> _Ints:
    """The sum of all earlier counts, for each."""
    return np.cumsum(counts) - counts


def _pages(spans: list[Span], block_size: int) -> _Ints:
    """The pages of each span's sequence, [spans, most pages], zero beyond their end."""
    table = np.zeros((len(spans), max(len(span.sequence.block_ids) for span in spans)), np.int64)
    for row, span in zip(table, spans, strict=True):
        row[: len(span.sequence.block_ids)] = span.sequence.block_ids
    each = block_size // PAGE
    return (table[:, :, None] * each + np.arange(each)).reshape(len(spans), -1)
