"""Attention of decoding rows over the paged KV cache.

One program serves all query heads of a key-value head (grouped-query attention) over one split of a
row's context; a second kernel joins the splits (Flash-Decoding: Dao et al. 2023). Splits have a
fixed length, so a row's result does not depend on its company, but for the roundings of a group's
common blocks (`prefix.py`). All rows' splits are one list: a long context among short ones brings
its own, and none to the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from worker.engine.triton_kernels.launch import WIDE_DOTS, power_of_two
from worker.engine.triton_kernels.prefix import attend_prefixes
from worker.engine.triton_kernels.reference import SPLIT_BLOCKS, Prefixes, Splits

WARPS, STAGES = 4, 3
"""Of decode attention. Three stages load a block while the one before is computed only by other
programs of the multiprocessor (five fit, of 32 KiB each at head_dim 128), five stages by the same
one (three fit, twice as much each); `benchmarks/gpu/kernels.py` tells which is faster."""
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def decode_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    blocks: torch.Tensor,
    *,
    splits: Splits | None,
    lse: torch.Tensor | None = None,
    prefixes: Prefixes | None = None,
) -> torch.Tensor:
    """Each row's attention over positions [0, its own]: [rows, heads * head_dim], of query's type.

    `query` is [rows, heads, head_dim], each row contiguous; `cache`, `positions`, `first` and
    `blocks` (int32) are as the package says; without `splits` no context is longer than one. `lse`,
    float32 [rows, heads], gets the natural log-sum-exp of the scaled scores. With `prefixes`, which
    need `splits`, the blocks that rows have in common are read once for all of them.
    """
    rows, heads, head_dim = query.shape
    out = query.new_empty(rows, heads * head_dim)
    scores = query.new_empty(1, 1, dtype=torch.float32) if lse is None else lse
    given = (query, cache, positions, first, blocks, out, scores)
    if splits is None:
        _launch(*given, rows, None, scores, scores, 0, lse is not None, None)
        return out
    size = max(end - begin for (_, begin), (_, end) in _pieces(splits))
    parts = torch.empty(size * heads, head_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(size * heads, dtype=torch.float32, device=query.device)
    for (row, item), (row_end, item_end) in _pieces(splits):
        if prefixes is not None:
            attend_prefixes(
                query,
                cache,
                first,
                blocks,
                prefixes,
                splits.first,
                parts,
                part_lse,
                rows=(row, row_end),
                item=item,
            )
        _launch(*given, item_end - item, splits, parts, part_lse, item, lse is not None, prefixes)
        _join[(row_end - row, heads)](
            positions,
            splits.first,
            parts,
            part_lse,
            out,
            scores,
            row,
            item,
            HEADS=heads,
            HEAD_DIM=head_dim,
            DIMS=power_of_two(head_dim, least=16),
            SPLIT=SPLIT_BLOCKS * cache.shape[3],
            WITH_LSE=lse is not None,
            num_warps=1,
        )
    return out


def _pieces(splits: Splits) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The (row, split) at which each piece of the work begins, and where it ends."""
    return itertools.pairwise([(0, 0), *splits.cuts])


def _launch(
    query: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    scores: torch.Tensor,
    items: int,
    splits: Splits | None,
    parts: torch.Tensor,
    part_lse: torch.Tensor,
    item: int,
    with_lse: bool,
    prefixes: Prefixes | None,
) -> None:
    _, heads, head_dim = query.shape
    kv_heads, block = cache.shape[2], cache.shape[3]
    group = heads // kv_heads
    _decode[(items, kv_heads)](
        query,
        cache,
        positions,
        first,
        blocks,
        positions if splits is None else splits.rows,
        positions if splits is None else splits.first,
        positions if prefixes is None else prefixes.shared,
        out,
        parts,
        part_lse,
        scores,
        query.stride(0),
        head_dim**-0.5,
        item,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_ROWS=power_of_two(group, least=16),
        HEAD_DIM=head_dim,
        DIMS=power_of_two(head_dim, least=16),
        BLOCK=block,
        SPLIT_BLOCKS=SPLIT_BLOCKS,
        DIRECT=splits is None,
        GROUPED=prefixes is not None,
        WITH_LSE=with_lse,
        WIDE=WIDE_DOTS or query.dtype == torch.float32,
        num_warps=WARPS,
        num_stages=STAGES,
    )


@triton.jit(
    do_not_specialize=["first_item"],
    do_not_specialize_on_alignment=[
        "position_ptr",
        "first_ptr",
        "item_row_ptr",
        "row_item_ptr",
        "shared_ptr",
    ],
)
def _decode(
    query_ptr,
    cache_ptr,
    position_ptr,
    first_ptr,
    blocks_ptr,
    item_row_ptr,
    row_item_ptr,
    shared_ptr,
    out_ptr,
    parts_ptr,
    part_lse_ptr,
    lse_ptr,
    query_stride,
    scale,
    first_item,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    DIRECT: tl.constexpr,
    GROUPED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    WIDE: tl.constexpr,
):
    item = tl.program_id(0)
    head = tl.program_id(1)
    if DIRECT:
        row = item.to(tl.int64)
        split = 0
        length = tl.load(position_ptr + row) + 1
    else:
        owner = tl.load(item_row_ptr + first_item + item)
        row = tl.maximum(owner, 0).to(tl.int64)
        split = first_item + item - tl.load(row_item_ptr + row)
        # A split that fills up is nobody's.
        length = tl.where(owner >= 0, tl.load(position_ptr + row) + 1, 0)
    begin = split * SPLIT_BLOCKS
    end = tl.minimum(begin + SPLIT_BLOCKS, tl.cdiv(length, BLOCK))
    if GROUPED:
        shared = tl.load(shared_ptr + row)
        started = shared > begin
        begin = tl.maximum(begin, shared)
    # A row without positions still clears its output where nobody joins.
    if (begin < end) | DIRECT:
        members = tl.arange(0, GROUP_ROWS)
        dims = tl.arange(0, DIMS)
        keys = tl.arange(0, BLOCK)
        real = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        heads = head * GROUP + members
        query = tl.load(
            query_ptr + row * query_stride + heads[:, None] * HEAD_DIM + dims[None, :],
            mask=real,
            other=0.0,
        )
        if WIDE:
            query = query.to(tl.float32)
        base = tl.load(first_ptr + row)
        maximum = tl.full([GROUP_ROWS], -1e30, tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)
        sums = tl.zeros([GROUP_ROWS, DIMS], tl.float32)
        if GROUPED:
            # A split that begins with common blocks goes on from their part.
            held = (members < GROUP) & started
            place = item.to(tl.int64) * (KV_HEADS * GROUP) + heads
            maximum = tl.load(part_lse_ptr + place, mask=held, other=-1e30)
            total = tl.where(held, 1.0, 0.0)
            sums = tl.load(
                parts_ptr + place[:, None] * HEAD_DIM + dims[None, :],
                mask=real & started,
                other=0.0,
            )
        for index in range(begin, end):
            block = tl.load(blocks_ptr + base + index).to(tl.int64)
            start = (block * 2 * KV_HEADS + head) * BLOCK * HEAD_DIM
            seen = index * BLOCK + keys < length
            key = tl.load(
                cache_ptr + start + keys[None, :] * HEAD_DIM + dims[:, None],
                mask=seen[None, :] & (dims < HEAD_DIM)[:, None],
                other=0.0,
            )
            value = tl.load(
                cache_ptr
                + start
                + KV_HEADS * BLOCK * HEAD_DIM
                + keys[:, None] * HEAD_DIM
                + dims[None, :],
                mask=seen[:, None] & (dims < HEAD_DIM)[None, :],
                other=0.0,
            )
            if WIDE:
                key = key.to(tl.float32)
                value = value.to(tl.float32)
            scores = tl.dot(query, key, input_precision="ieee") * (scale * _LOG2_E)
            scores = tl.where(seen[None, :], scores, -float("inf"))
            higher = tl.maximum(maximum, tl.max(scores, 1))
            kept = tl.exp2(maximum - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * kept + tl.sum(weights, 1)
            sums = sums * kept[:, None]
            sums += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            maximum = higher
        # Only a row that fills up the batch has nothing in it.
        total = tl.where(total == 0, 1.0, total)
        sums = sums / total[:, None]
        score = maximum + tl.log2(total)
        flat = row * (KV_HEADS * GROUP) + heads
        if DIRECT:
            tl.store(
                out_ptr + flat[:, None] * HEAD_DIM + dims[None, :],
                sums.to(out_ptr.dtype.element_ty),
                mask=real,
            )
            if WITH_LSE:
                tl.store(lse_ptr + flat, score / _LOG2_E, mask=members < GROUP)
        else:
            place = item.to(tl.int64) * (KV_HEADS * GROUP) + heads
            tl.store(parts_ptr + place[:, None] * HEAD_DIM + dims[None, :], sums, mask=real)
            tl.store(part_lse_ptr + place, score, mask=members < GROUP)


@triton.jit(
    do_not_specialize=["first_row", "first_item"],
    do_not_specialize_on_alignment=["position_ptr", "row_item_ptr"],
)
def _join(
    position_ptr,
    row_item_ptr,
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    first_row,
    first_item,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLIT: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    row = (first_row + tl.program_id(0)).to(tl.int64)
    flat = row * HEADS + tl.program_id(1)
    begin = (tl.load(row_item_ptr + row) - first_item).to(tl.int64)
    used = tl.cdiv(tl.load(position_ptr + row) + 1, SPLIT)
    dims = tl.arange(0, DIMS)
    maximum = tl.full([1], -1e30, tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([DIMS], tl.float32)
    # In order, so that splits which only others use change no bit.
    for split in range(used):
        place = (begin + split) * HEADS + tl.program_id(1)
        score = tl.load(part_lse_ptr + place)
        part = tl.load(parts_ptr + place * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        higher = tl.maximum(maximum, score)
        kept = tl.exp2(maximum - higher)
        weight = tl.exp2(score - higher)
        total = total * kept + weight
        sums = sums * kept + part * weight
        maximum = higher
    total = tl.where(total == 0, 1.0, total)
    sums = sums / total
    tl.store(
        out_ptr + flat * HEAD_DIM + dims,
        sums.to(out_ptr.dtype.element_ty),
        mask=dims < HEAD_DIM,
    )
    if WITH_LSE:
        tl.store(lse_ptr + flat + tl.arange(0, 1), (maximum + tl.log2(total)) / _LOG2_E)
