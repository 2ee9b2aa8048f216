"""Paged attention in plain torch: for machines without a compiler, and what kernels are held to.

All rows of a step, prefill and decode alike, go the same way: 16 rows of queries at a time against
blocks of 64 keys from position 0, with an online softmax in float32 (Milakov and Gimelshein 2018).
So a row's result is a function of its query and of the keys and values up to its position alone:
neither the company, nor the chunks of a prefill, nor a second computation change a bit of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from worker.engine.scheduler import Span
from worker.engine.weights import Shape

TILE_ROWS = 16
"""Rows of a tile, each one head's query at one position; more only where a key-value head serves
more query heads."""
KEY_BLOCK = 64
"""Keys that a tile meets at a time, whatever the size of the cache's own blocks."""
SCRATCH_BYTES = 64 * 2**20
"""Of the keys and values gathered at a time."""

_Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _KeyBlock:
    """A block of keys, for the tiles of a part that reach it: its first `tiles`."""

    tiles: int
    pages: torch.Tensor
    """The blocks of the cache that have them, [tiles * pages of a block of keys]."""
    hidden: torch.Tensor
    """Which keys each row must not see, [tiles that hide any, tile rows, KEY_BLOCK]. Those are the
    last ones: they have the fewest keys."""


@dataclass(slots=True)
class _Part:
    """Tiles that are computed together, those with the most keys first."""

    rows: torch.Tensor
    """The step's row of each query, [tiles, queries]."""
    blocks: list[_KeyBlock]


class PagedAttention:
    """The KV cache of all layers, and attention over it.

    For each step `prepare`, then for each layer `write` and `attend`. Positions live in slots:
    position p of a sequence is slot `block_ids[p // block_size] * block_size + p % block_size`.
    """

    def __init__(
        self,
        shape: Shape,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape = shape
        self._block_size = block_size
        self._page_size = math.gcd(block_size, KEY_BLOCK)
        """Keys that always lie together, in the cache and in a block of keys."""
        self._device = device
        self._group = shape.heads // shape.kv_heads
        self._queries = max(1, TILE_ROWS // self._group)
        """Positions of a tile; each has a row for every query head of the key-value head."""
        self._tile_rows = -(-self._queries * self._group // TILE_ROWS) * TILE_ROWS
        # Zeros: `attend` gives weight zero to what is in a block beyond a row's position, which
        # must be finite for that. `write` sees to it that it stays so.
        size = (shape.kv_heads, num_blocks * block_size, shape.head_dim)
        self._keys, self._values = (
            [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
            for _ in range(2)
        )
        self._slots = torch.empty(0, dtype=torch.int64)
        self._places = torch.empty(0, dtype=torch.int64)
        self._parts: list[_Part] = []

    @staticmethod
    def bytes_per_block(shape: Shape, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block of the KV cache, all layers together."""
        return 2 * shape.layers * shape.kv_width * block_size * dtype.itemsize

    def prepare(self, spans: Many[Span], padded_rows: int) -> torch.Tensor:
        """Takes in where the step's rows are; their positions, int64 [padded_rows].

        The rows are those of the spans in order; those from there to `padded_rows` stand for
        nothing, and get position 0.
        """
        layout = _Layout(spans, self._queries)
        table = _table(spans)
        size = self._block_size
        self._slots = self._tensor(
            table[layout.span_of_row, layout.positions // size] * size + layout.positions % size
        )
        places = np.zeros(padded_rows, np.int64)
        places[: len(layout.places)] = layout.places
        self._places = self._tensor(places)
        tile_bytes = 8 * self._shape.kv_heads * KEY_BLOCK * self._shape.head_dim
        step = max(1, SCRATCH_BYTES // tile_bytes)
        self._parts = [
            self._part(layout, table, slice(first, first + step))
            for first in range(0, len(layout.span_of_tile), step)
        ]
        positions = np.zeros(padded_rows, np.int64)
        positions[: len(layout.positions)] = layout.positions
        return self._tensor(positions)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys, rotated, and values of the step's rows: each [padded rows, kv_heads, head_dim]."""
        rows = self._slots.shape[0]
        key, value = key[:rows].transpose(0, 1), value[:rows].transpose(0, 1)
        # A value that is not finite would reach even those that give it weight zero: earlier
        # positions, and later owners of the block. The key, which they never look at, becomes NaN
        # for it.
        self._keys[layer].index_copy_(1, self._slots, key + value * 0)
        self._values[layer].index_copy_(1, self._slots, value.nan_to_num())

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attention of the step's rows: from rotated queries [padded rows, heads, head_dim] to
        [padded rows, heads * head_dim], of the same type."""
        shape = self._shape
        query = query.float() * shape.head_dim**-0.5
        query = query.view(-1, shape.kv_heads, self._group, shape.head_dim)
        outputs = torch.cat([self._attend_part(layer, query, part) for part in self._parts])
        outputs = outputs.to(self._keys[layer].dtype)
        return outputs.index_select(0, self._places)

    def _attend_part(self, layer: int, query: torch.Tensor, part: _Part) -> torch.Tensor:
        """[tiles * queries, heads * head_dim], float32."""
        kv_heads, head_dim = self._shape.kv_heads, self._shape.head_dim
        tiles, used = part.rows.shape[0], self._queries * self._group
        rows = query.new_zeros(kv_heads, tiles, self._tile_rows, head_dim)
        picked = query.index_select(0, part.rows.flatten())
        picked = picked.view(tiles, self._queries, kv_heads, self._group, head_dim)
        rows[:, :, :used] = picked.permute(2, 0, 1, 3, 4).reshape(kv_heads, tiles, used, head_dim)

        maximum = rows.new_full((kv_heads, tiles, self._tile_rows, 1), -torch.inf)
        total = torch.zeros_like(maximum)
        sums = torch.zeros_like(rows)
        for block in part.blocks:
            live = slice(0, block.tiles)
            # Whole pages: slot by slot it takes several times as long.
            key, value = (
                cache[layer]
                .view(kv_heads, -1, self._page_size * head_dim)
                .index_select(1, block.pages)
                .float()
                .view(kv_heads * block.tiles, KEY_BLOCK, head_dim)
                for cache in (self._keys, self._values)
            )
            queries = rows[:, live].reshape(-1, self._tile_rows, head_dim)
            weights = torch.bmm(queries, key.transpose(1, 2))
            weights = weights.view(kv_heads, block.tiles, self._tile_rows, KEY_BLOCK)
            weights[:, block.tiles - len(block.hidden) :].masked_fill_(block.hidden, -torch.inf)
            # Finite from the first block on: every row sees position 0.
            new = torch.maximum(maximum[:, live], weights.amax(-1, keepdim=True))
            kept = (maximum[:, live] - new).exp_()
            weights.sub_(new).exp_()
            total[:, live] = total[:, live] * kept + weights.sum(-1, keepdim=True)
            added = torch.bmm(weights.view(-1, self._tile_rows, KEY_BLOCK), value)
            sums[:, live] = sums[:, live] * kept + added.view(kv_heads, block.tiles, -1, head_dim)
            maximum[:, live] = new
        done = (sums / total)[:, :, :used]
        done = done.view(kv_heads, tiles, self._queries, self._group, head_dim)
        return done.permute(1, 2, 0, 3, 4).reshape(tiles * self._queries, -1)

    def _part(self, layout: _Layout, table: _Ints, tiles: slice) -> _Part:
        positions = layout.tile_positions[tiles]
        tables = table[layout.span_of_tile[tiles]]
        last = layout.last[tiles]
        rows = np.repeat(last[:, None], self._tile_rows, axis=1)
        rows[:, : self._queries * self._group] = np.repeat(positions, self._group, axis=1)
        blocks = []
        for first in range(0, int(last[0]) + 1, KEY_BLOCK):
            count = int((last >= first).sum())
            keys = np.arange(first, first + KEY_BLOCK)
            begins = keys[:: self._page_size]
            blocks_of = np.minimum(begins // self._block_size, tables.shape[1] - 1)
            pages = tables[:count, blocks_of] * (self._block_size // self._page_size)
            pages = pages + begins % self._block_size // self._page_size
            hiding = rows[:count].min(1) < keys[-1]
            hidden = keys > rows[np.argmax(hiding) if hiding.any() else count : count, :, None]
            blocks.append(
                _KeyBlock(
                    count,
                    self._tensor(pages.reshape(-1)),
                    self._tensor(hidden),
                )
            )
        return _Part(self._tensor(layout.tile_rows[tiles]), blocks)

    def _tensor(self, values: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)


class _Layout:
    """Which tile and place each row of a step goes to. Tiles never mix sequences."""

    def __init__(self, spans: Many[Span], queries: int) -> None:
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
        sorted_place = np.empty_like(order)
        sorted_place[order] = np.arange(len(order))
        tile = sorted_place[first_tile[self.span_of_row] + local // queries]
        self.places = tile * queries + local % queries
        """Of each row, in the flattened tiles."""


def _before(counts: _Ints) -> _Ints:
    """The sum of all earlier counts, for each."""
    return np.cumsum(counts) - counts


def _table(spans: Many[Span]) -> _Ints:
    """The block ids of each span's sequence, [spans, most blocks], zero beyond their end."""
    table = np.zeros((len(spans), max(len(span.sequence.block_ids) for span in spans)), np.int64)
    for row, span in zip(table, spans, strict=True):
        row[: len(span.sequence.block_ids)] = span.sequence.block_ids
    return table
