"""Attention of decoding rows over the paged KV cache.

One program serves all query heads of a key-value head (grouped-query attention) over one split of a
row's context; a second kernel merges the splits' results, the parts (Flash-Decoding: Dao et al.
2023). Splits have a fixed length, so attention is batch invariant, but for the roundings of a
group's common blocks (`prefix.py`). All rows' splits are in one list: a long context among short
ones adds its own splits, and none to the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from worker.engine.cuda.kernels.launch import UPCAST_DOTS, power_of_two
from worker.engine.cuda.kernels.prefix import attend_prefixes
from worker.engine.cuda.kernels.reference import SPLIT_BLOCKS, Prefixes, Splits

WARPS, STAGES = 4, 3
"""Of decode attention. With three stages loads overlap the computing of the multiprocessor's other
programs only (five fit, of 32 KiB each at head_dim 128), with five stages that of the same program
(three fit, of 64 KiB each); `benchmarks/gpu/kernels.py` measures which is faster."""
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
        _launch_decode(*given, rows, None, scores, scores, 0, lse is not None, None)
        return out
    size = max(end - begin for (_, begin), (_, end) in _passes(splits))
    parts = torch.empty(size * heads, head_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(size * heads, dtype=torch.float32, device=query.device)
    for (row, first_split), (row_end, split_end) in _passes(splits):
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
                first_split=first_split,
            )
        _launch_decode(
            *given,
            split_end - first_split,
            splits,
            parts,
            part_lse,
            first_split,
            lse is not None,
            prefixes,
        )
        _merge_splits[(row_end - row, heads)](
            positions,
            splits.first,
            parts,
            part_lse,
            out,
            scores,
            row,
            first_split,
            HEADS=heads,
            HEAD_DIM=head_dim,
            DIMS=power_of_two(head_dim, least=16),
            SPLIT=SPLIT_BLOCKS * cache.shape[3],
            WITH_LSE=lse is not None,
            num_warps=1,
        )
    return out


def _passes(splits: Splits) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The (row, split) at which each pass begins, and at which it ends."""
    return itertools.pairwise([(0, 0), *splits.passes])


def _launch_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    scores: torch.Tensor,
    count: int,
    splits: Splits | None,
    parts: torch.Tensor,
    part_lse: torch.Tensor,
    first_split: int,
    with_lse: bool,
    prefixes: Prefixes | None,
) -> None:
    _, heads, head_dim = query.shape
    kv_heads, block = cache.shape[2], cache.shape[3]
    group = heads // kv_heads
    _decode[(count, kv_heads)](
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
        first_split,
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
        UPCAST=UPCAST_DOTS or query.dtype == torch.float32,
        num_warps=WARPS,
        num_stages=STAGES,
    )


@triton.jit(
    do_not_specialize=["first_split"],
    do_not_specialize_on_alignment=[
        "position_ptr",
        "first_ptr",
        "split_row_ptr",
        "row_split_ptr",
        "shared_ptr",
    ],
)
def _decode(
    query_ptr,
    cache_ptr,
    position_ptr,
    first_ptr,
    blocks_ptr,
    split_row_ptr,
    row_split_ptr,
    shared_ptr,
    out_ptr,
    parts_ptr,
    part_lse_ptr,
    lse_ptr,
    query_stride,
    scale,
    first_split,
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
    UPCAST: tl.constexpr,
):
    split = tl.program_id(0)
    head = tl.program_id(1)
    if DIRECT:
        row = split.to(tl.int64)
        row_split = 0
        length = tl.load(position_ptr + row) + 1
    else:
        owner = tl.load(split_row_ptr + first_split + split)
        row = tl.maximum(owner, 0).to(tl.int64)
        row_split = first_split + split - tl.load(row_split_ptr + row)
        # A split that is padding belongs to no row.
        length = tl.where(owner >= 0, tl.load(position_ptr + row) + 1, 0)
    begin = row_split * SPLIT_BLOCKS
    end = tl.minimum(begin + SPLIT_BLOCKS, tl.cdiv(length, BLOCK))
    if GROUPED:
        shared = tl.load(shared_ptr + row)
        started = shared > begin
        begin = tl.maximum(begin, shared)
    # With DIRECT a row of padding still writes its output, as no merge does.
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
        if UPCAST:
            query = query.to(tl.float32)
        base = tl.load(first_ptr + row)
        maximum = tl.full([GROUP_ROWS], -1e30, tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)
        sums = tl.zeros([GROUP_ROWS, DIMS], tl.float32)
        if GROUPED:
            # A split that begins with common blocks continues from their part.
            held = (members < GROUP) & started
            part_index = split.to(tl.int64) * (KV_HEADS * GROUP) + heads
            maximum = tl.load(part_lse_ptr + part_index, mask=held, other=-1e30)
            total = tl.where(held, 1.0, 0.0)
            sums = tl.load(
                parts_ptr + part_index[:, None] * HEAD_DIM + dims[None, :],
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
            if UPCAST:
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
        # Only a row of padding has a total of 0.
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
            part_index = split.to(tl.int64) * (KV_HEADS * GROUP) + heads
            tl.store(parts_ptr + part_index[:, None] * HEAD_DIM + dims[None, :], sums, mask=real)
            tl.store(part_lse_ptr + part_index, score, mask=members < GROUP)


@triton.jit(
    do_not_specialize=["first_row", "first_split"],
    do_not_specialize_on_alignment=["position_ptr", "row_split_ptr"],
)
def _merge_splits(
    position_ptr,
    row_split_ptr,
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    first_row,
    first_split,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLIT: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    row = (first_row + tl.program_id(0)).to(tl.int64)
    flat = row * HEADS + tl.program_id(1)
    begin = (tl.load(row_split_ptr + row) - first_split).to(tl.int64)
    used = tl.cdiv(tl.load(position_ptr + row) + 1, SPLIT)
    dims = tl.arange(0, DIMS)
    maximum = tl.full([1], -1e30, tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([DIMS], tl.float32)
    # In order, so that splits which only others use change no bit.
    for split in range(used):
        part_index = (begin + split) * HEADS + tl.program_id(1)
        score = tl.load(part_lse_ptr + part_index)
        part = tl.load(parts_ptr + part_index * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
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
