"""Attention of prompts' rows over the paged KV cache, cached prefixes included.

A tile is some rows of one sequence with all query heads of a key-value head (grouped-query
attention): one matrix product with each block, which is read where it lies (FlashAttention: Dao
2023; paged: Kwon et al. 2023). Nothing is copied, so a long prefix that many prompts share takes
memory once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.cuda.kernels.launch import UPCAST_DOTS, power_of_two
from worker.engine.cuda.kernels.reference import prefill_tile_rows

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def prefill_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    blocks: torch.Tensor,
    tiles: torch.Tensor,
) -> torch.Tensor:
    """Each row's attention over positions [0, its own]: [rows, heads * head_dim], of query's type.

    `query` is [rows, heads, head_dim], each row contiguous; `cache`, `positions`, `first` and
    `blocks` (int32) are as the package says. `tiles` are `tiles_of` the spans: rows of a tile are
    consecutive positions of a sequence. Rows in no tile are not written.
    """
    rows, heads, head_dim = query.shape
    kv_heads, block = cache.shape[2], cache.shape[3]
    group = heads // kv_heads
    out = query.new_empty(rows, heads * head_dim)
    upcast = UPCAST_DOTS or query.dtype == torch.float32
    tile = prefill_tile_rows(group, query.dtype)
    _attend_prefill[(len(tiles), kv_heads)](
        query,
        cache,
        positions,
        first,
        blocks,
        tiles,
        out,
        query.stride(0),
        head_dim**-0.5,
        KV_HEADS=kv_heads,
        GROUP=group,
        TILE=tile,
        HEAD_DIM=head_dim,
        DIMS=power_of_two(head_dim, least=16),
        BLOCK=block,
        UPCAST=upcast,
        # Float32 is multiplied without tensor cores: fewer threads would run out of registers.
        num_warps=16 if upcast else 8,
        # 96 KiB of shared memory in bfloat16 at 128 dimensions, 144 in float32.
        num_stages=2 if upcast else 3,
    )
    return out


@triton.jit
def _attend_block(
    query,
    maximum,
    total,
    sums,
    cache_ptr,
    start,
    row_positions,
    block_position,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block more of a tile's online softmax; `MASKED` where not all rows see all of it."""
    dims = tl.arange(0, DIMS)
    keys = tl.arange(0, BLOCK)
    inside = dims < HEAD_DIM
    key = tl.load(
        cache_ptr + start + keys[None, :] * HEAD_DIM + dims[:, None],
        mask=inside[:, None],
        other=0.0,
    )
    value = tl.load(
        cache_ptr + start + KV_HEADS * BLOCK * HEAD_DIM + keys[:, None] * HEAD_DIM + dims[None, :],
        mask=inside[None, :],
        other=0.0,
    )
    if UPCAST:
        key = key.to(tl.float32)
        value = value.to(tl.float32)
    scores = tl.dot(query, key, input_precision="ieee") * (scale * _LOG2_E)
    if MASKED:
        seen = (block_position + keys)[None, :] <= row_positions[:, None]
        scores = tl.where(seen, scores, -float("inf"))
        # Values behind the last position may be anything, NaN too.
        last = tl.max(row_positions, 0)
        value = tl.where((block_position + keys <= last)[:, None], value, 0.0)
    higher = tl.maximum(maximum, tl.max(scores, 1))
    kept = tl.exp2(maximum - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * kept + tl.sum(weights, 1)
    sums = sums * kept[:, None]
    sums += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return higher, total, sums


@triton.jit(do_not_specialize_on_alignment=["position_ptr", "first_ptr", "tiles_ptr"])
def _attend_prefill(
    query_ptr,
    cache_ptr,
    position_ptr,
    first_ptr,
    blocks_ptr,
    tiles_ptr,
    out_ptr,
    query_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tiles_ptr + 2 * tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(tile)
    count = tl.load(tile + 1)
    start = tl.load(position_ptr + begin)
    table = blocks_ptr + tl.load(first_ptr + begin)
    query_rows = tl.arange(0, TILE)
    dims = tl.arange(0, DIMS)
    member = query_rows // GROUP
    own = member < count
    row = (begin + tl.where(own, member, 0)).to(tl.int64)
    # Rows beyond the tile see what its first one sees: their results are not stored.
    row_positions = start + tl.where(own, member, 0)
    heads = head * GROUP + query_rows % GROUP
    real = own[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr + row[:, None] * query_stride + heads[:, None] * HEAD_DIM + dims[None, :],
        mask=real,
        other=0.0,
    )
    if UPCAST:
        query = query.to(tl.float32)
    maximum = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, DIMS], tl.float32)
    whole = (start + 1) // BLOCK
    for index in range(whole):
        block = tl.load(table + index).to(tl.int64)
        maximum, total, sums = _attend_block(
            query,
            maximum,
            total,
            sums,
            cache_ptr,
            (block * 2 * KV_HEADS + head) * BLOCK * HEAD_DIM,
            row_positions,
            index * BLOCK,
            scale,
            KV_HEADS,
            HEAD_DIM,
            DIMS,
            BLOCK,
            UPCAST,
            False,
        )
    for index in range(whole, tl.cdiv(start + count, BLOCK)):
        block = tl.load(table + index).to(tl.int64)
        maximum, total, sums = _attend_block(
            query,
            maximum,
            total,
            sums,
            cache_ptr,
            (block * 2 * KV_HEADS + head) * BLOCK * HEAD_DIM,
            row_positions,
            index * BLOCK,
            scale,
            KV_HEADS,
            HEAD_DIM,
            DIMS,
            BLOCK,
            UPCAST,
            True,
        )
    sums = sums / total[:, None]
    flat = row * (KV_HEADS * GROUP) + heads
    tl.store(
        out_ptr + flat[:, None] * HEAD_DIM + dims[None, :],
        sums.to(out_ptr.dtype.element_ty),
        mask=real,
    )
