"""Attention of groups of decoding rows over their common prefix, whose blocks a tile reads once.

The rows of a group are the query rows of one matrix product, as in Hydragen (Juravsky et al. 2024)
and cascade attention (FlashInfer). The results are the parts of the same splits that the decode
kernel would have written. That kernel then goes on: a split whose first blocks are common starts
from its part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.cuda.groups import TILE_ROWS
from worker.engine.cuda.kernels.launch import UPCAST_DOTS, power_of_two
from worker.engine.cuda.kernels.reference import SPLIT_BLOCKS, Prefixes

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def attend_prefixes(
    query: torch.Tensor,
    cache: torch.Tensor,
    first: torch.Tensor,
    blocks: torch.Tensor,
    prefixes: Prefixes,
    row_split: torch.Tensor,
    parts: torch.Tensor,
    part_lse: torch.Tensor,
    *,
    rows: tuple[int, int],
    first_split: int,
) -> None:
    """Writes the parts of rows `[rows[0], rows[1])` over their groups' common blocks.

    `row_split` is the index of each row's first split, `first_split` that of the first of these
    rows. `parts` and `part_lse` are these rows' [splits, heads, …] in float32, the log-sum-exp to
    base 2.
    """
    _, heads, head_dim = query.shape
    kv_heads, block = cache.shape[2], cache.shape[3]
    group = heads // kv_heads
    tile_rows = max(TILE_ROWS, power_of_two(group))
    upcast = UPCAST_DOTS or query.dtype == torch.float32
    _attend_prefixes[(len(prefixes.tiles), kv_heads, prefixes.splits)](
        query,
        cache,
        first,
        blocks,
        prefixes.tiles,
        prefixes.members,
        row_split,
        parts,
        part_lse,
        query.stride(0),
        head_dim**-0.5,
        *rows,
        first_split,
        KV_HEADS=kv_heads,
        GROUP=group,
        TILE_ROWS=tile_rows,
        HEAD_DIM=head_dim,
        DIMS=power_of_two(head_dim, least=16),
        BLOCK=block,
        SPLIT_BLOCKS=SPLIT_BLOCKS,
        UPCAST=upcast,
        # Float32 is multiplied without tensor cores: fewer threads would run out of registers.
        num_warps=16 if upcast else 4 if tile_rows == 64 else 8,
        # A stage holds a block's keys and values: 64 KiB in float32 at 128 dimensions.
        num_stages=2 if upcast else 3,
    )


@triton.jit(
    do_not_specialize=["first_row", "end_row", "first_split"],
    do_not_specialize_on_alignment=["row_split_ptr"],
)
def _attend_prefixes(
    query_ptr,
    cache_ptr,
    first_ptr,
    blocks_ptr,
    tiles_ptr,
    members_ptr,
    row_split_ptr,
    parts_ptr,
    part_lse_ptr,
    query_stride,
    scale,
    first_row,
    end_row,
    first_split,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tiles_ptr + 4 * tl.program_id(0)
    head = tl.program_id(1)
    row_split = tl.program_id(2)
    from_block = row_split * SPLIT_BLOCKS
    to_block = tl.minimum(from_block + SPLIT_BLOCKS, tl.load(tile + 3))
    if from_block < to_block:
        query_rows = tl.arange(0, TILE_ROWS)
        dims = tl.arange(0, DIMS)
        keys = tl.arange(0, BLOCK)
        inside = dims < HEAD_DIM
        member = query_rows // GROUP
        row = tl.load(
            members_ptr + tl.load(tile) + member, mask=member < tl.load(tile + 1), other=-1
        )
        # A group's other rows may belong to another pass.
        own = (member < tl.load(tile + 1)) & (row >= first_row) & (row < end_row)
        row = tl.where(own, row, first_row).to(tl.int64)
        heads = head * GROUP + query_rows % GROUP
        real = own[:, None] & inside[None, :]
        query = tl.load(
            query_ptr + row[:, None] * query_stride + heads[:, None] * HEAD_DIM + dims[None, :],
            mask=real,
            other=0.0,
        )
        if UPCAST:
            query = query.to(tl.float32)
        base = tl.load(first_ptr + tl.load(tile + 2))
        maximum = tl.full([TILE_ROWS], -1e30, tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        sums = tl.zeros([TILE_ROWS, DIMS], tl.float32)
        for index in range(from_block, to_block):
            block = tl.load(blocks_ptr + base + index).to(tl.int64)
            start = (block * 2 * KV_HEADS + head) * BLOCK * HEAD_DIM
            key = tl.load(
                cache_ptr + start + keys[None, :] * HEAD_DIM + dims[:, None],
                mask=inside[:, None],
                other=0.0,
            )
            value = tl.load(
                cache_ptr
                + start
                + KV_HEADS * BLOCK * HEAD_DIM
                + keys[:, None] * HEAD_DIM
                + dims[None, :],
                mask=inside[None, :],
                other=0.0,
            )
            if UPCAST:
                key = key.to(tl.float32)
                value = value.to(tl.float32)
            scores = tl.dot(query, key, input_precision="ieee") * (scale * _LOG2_E)
            higher = tl.maximum(maximum, tl.max(scores, 1))
            kept = tl.exp2(maximum - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * kept + tl.sum(weights, 1)
            sums = sums * kept[:, None]
            sums += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            maximum = higher
        sums = sums / total[:, None]
        split = tl.load(row_split_ptr + row) - first_split + row_split
        part_index = split.to(tl.int64) * (KV_HEADS * GROUP) + heads
        tl.store(parts_ptr + part_index[:, None] * HEAD_DIM + dims[None, :], sums, mask=real)
        tl.store(part_lse_ptr + part_index, maximum + tl.log2(total), mask=own)
