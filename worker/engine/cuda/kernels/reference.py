"""The kernels' results in plain torch, slowly: what kernels are tested against; runs on a CPU.

Each function has the name, the arguments and the results of its kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from worker.engine import noise

SPLIT_BLOCKS = 4
"""Blocks of a split of decode attention. Changing this changes roundings."""
missing: frozenset[str] = frozenset()
"""Which of the kernels are missing here: none. See `kernel_selection.CudaKernels`."""
PARTS_BYTES = 256 * 2**20
"""Most bytes of the parts (results of splits) that one pass of decode attention holds."""

_TILE, _FLOAT32_TILE = 128, 64
"""Query rows of a prompt, heads included, that read keys and values together: twice as many as a
warp group multiplies at a time, in float32 as many."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Splits:
    """The splits of fixed length that contexts are divided into, all rows' in one list, int32."""

    rows: torch.Tensor
    """The row of each split; -1 is padding."""
    first: torch.Tensor
    """The index of each row's first split."""
    passes: tuple[tuple[int, int], ...]
    """What is computed at a time: the row and the split at which each pass ends."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Blocks that rows have in common, int32: see `cuda.groups.Groups`. A tile without blocks is
    padding."""

    tiles: torch.Tensor
    members: torch.Tensor
    shared: torch.Tensor
    splits: int
    """At least those of the longest common prefix."""


def to_device(values: npt.NDArray[np.int32], device: torch.device) -> torch.Tensor:
    """A copy on the device, without waiting for what the device does now."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def split_count(length: int, block: int) -> int:
    """How many splits a context of `length` positions has."""
    return -(-length // (SPLIT_BLOCKS * block))


def splits_of(
    lengths: Iterable[int],
    block: int,
    device: torch.device,
    *,
    heads: int,
    head_dim: int,
    padding: int = 0,
) -> Splits:
    """The splits of rows with contexts of these lengths, then `padding` more."""
    counts = np.array([split_count(length, block) for length in lengths], np.int64)
    rows = np.full(int(counts.sum()) + padding, -1, np.int32)
    rows[: counts.sum()] = np.repeat(np.arange(len(counts)), counts)
    first = (counts.cumsum() - counts).astype(np.int32)
    return Splits(
        to_device(rows, device),
        to_device(first, device),
        passes_of(counts, heads, head_dim, len(rows)),
    )


def passes_of(
    counts: Counts, heads: int, head_dim: int, num_splits: int
) -> tuple[tuple[int, int], ...]:
    """The passes (`Splits.passes`) of rows with `counts` splits each, so that a pass holds parts of
    no more than `PARTS_BYTES`; `num_splits` are all splits, padding included."""
    most = max(1, PARTS_BYTES // (4 * heads * (head_dim + 1)))
    if num_splits <= most:
        return ((len(counts), num_splits),)
    passes: list[tuple[int, int]] = []
    ends = counts.cumsum()
    row = done = 0
    while row < len(counts):
        row = max(row + 1, int(np.searchsorted(ends, done + most, "right")))
        done = int(ends[row - 1])
        passes.append((row, done))
    return tuple(passes)


def prefill_tile_rows(group: int, dtype: torch.dtype) -> int:
    """Query rows of a tile, where `group` query heads share one of keys."""
    least = _FLOAT32_TILE if dtype == torch.float32 else _TILE
    return max(least, 1 << (group - 1).bit_length())


def tiles_of(
    spans: Iterable[tuple[int, int, int]], group: int, dtype: torch.dtype
) -> npt.NDArray[np.int32]:
    """The tiles of spans (first row of the step, rows, first position): [tiles, 2], first row and
    rows.

    Those at the latest positions come first, as they take longest.
    """
    size = max(1, prefill_tile_rows(group, dtype) // group)
    tiles = [
        (start + offset, begin + offset, min(size, count - offset))
        for begin, count, start in spans
        for offset in range(0, count, size)
    ]
    tiles.sort(key=lambda tile: -tile[0])
    return np.array([tile[1:] for tile in tiles], np.int32).reshape(-1, 2)


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
    """See `attention.decode_attention`."""
    rows, heads, head_dim = query.shape
    group = heads // cache.shape[2]
    out = torch.zeros(rows, heads, head_dim, dtype=torch.float32, device=query.device)
    for row, (position, start) in enumerate(zip(positions.tolist(), first.tolist(), strict=True)):
        if position < 0:
            continue
        table = blocks[start:]
        if prefixes is not None:
            table = _table_through_leader(table, row, first, blocks, prefixes)
        keys, values = gather_keys_values(cache, table, position + 1)
        keys = keys.float().repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,khd->hk", query[row].float(), keys) * head_dim**-0.5
        if lse is not None:
            lse[row] = scores.logsumexp(-1)
        values = values.float().repeat_interleave(group, dim=1)
        out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), values)
    return out.to(query.dtype).view(rows, -1)


def _table_through_leader(
    table: torch.Tensor,
    row: int,
    first: torch.Tensor,
    blocks: torch.Tensor,
    prefixes: Prefixes,
) -> torch.Tensor:
    """A row's blocks, those in common taken from its group's leader: all that the row reads."""
    shared = int(prefixes.shared[row])
    if shared == 0:
        return table
    ((leader, common),) = [
        (leader, common)
        for begin, count, leader, common in prefixes.tiles.tolist()
        if row in prefixes.members[begin : begin + count].tolist()
    ]
    if common != shared:
        raise AssertionError(f"row {row} shares {shared} blocks, its tile {common}")
    start = int(first[leader])
    return torch.cat([blocks[start : start + shared], table[shared:]])


def prefill_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    blocks: torch.Tensor,
    tiles: torch.Tensor,
) -> torch.Tensor:
    """See `prefill.prefill_attention`."""
    rows, heads, head_dim = query.shape
    group = heads // cache.shape[2]
    out = query.new_empty(rows, heads, head_dim)
    for begin, count in tiles.tolist():
        own = slice(begin, begin + count)
        start = int(positions[begin])
        keys, values = gather_keys_values(cache, blocks[int(first[begin]) :], start + count)
        seen = torch.arange(start + count, device=query.device) <= positions[own, None]
        out[own] = functional.scaled_dot_product_attention(
            query[own].transpose(0, 1).float(),
            keys.float().repeat_interleave(group, dim=1).transpose(0, 1),
            values.float().repeat_interleave(group, dim=1).transpose(0, 1),
            attn_mask=seen,
        ).transpose(0, 1)
    return out.view(rows, -1)


def gather_keys_values(
    cache: torch.Tensor, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a sequence's first positions, each [length, kv_heads, head_dim]."""
    positions = torch.arange(length, device=cache.device)
    size = cache.shape[3]
    pages = blocks[positions // size].long()
    offsets = positions % size
    return cache[:, 0][pages, :, offsets], cache[:, 1][pages, :, offsets]


def rms_norm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `layers.rms_norm`."""
    if residual is not None:
        rows = residual.add_(rows)
    wide = rows.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(rows.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `layers.silu_mul`."""
    gate, up = gate_up.chunk(2, 1)
    return functional.silu(gate) * up


def rotate_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    blocks: torch.Tensor,
    cache: torch.Tensor,
    *,
    heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """See `layers.rotate_and_write`."""
    _, _, kv_heads, block, head_dim = cache.shape
    real = (positions >= 0).nonzero()[:, 0]
    real_positions = positions[real].long()
    parts = qkv.view(len(qkv), -1, head_dim)
    query, key, value = parts[real].split([heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        query = rms_norm(query, q_norm, eps)
    if k_norm is not None:
        key = rms_norm(key, k_norm, eps)
    angles = cos[real_positions][:, None], sin[real_positions][:, None]
    query, key = _rotated(query, *angles), _rotated(key, *angles)
    key = key + (value - value)
    value = torch.where(value.isfinite(), value, 0)
    parts[real] = torch.cat([query, key, value], dim=1)
    pages = blocks[first[real].long() + real_positions // block].long()
    offsets = real_positions % block
    cache[:, 0][pages, :, offsets] = key
    cache[:, 1][pages, :, offsets] = value


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = heads.float().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(heads.dtype)


def sample(
    logits: torch.Tensor,
    vocab_size: int,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
    streams: torch.Tensor,
    indices: torch.Tensor,
    tokens: torch.Tensor,
    best: torch.Tensor,
) -> None:
    """See `sampling.sample`."""
    values = logits[:, :vocab_size].float()
    values = values.masked_fill(values.isnan(), torch.inf)
    highest, likeliest = values.max(-1)
    likeliest = (values == highest[:, None]).int().argmax(-1)
    tokens.copy_(likeliest)
    best.copy_(highest)
    for row in ((temperatures > 0) & highest.isfinite()).nonzero()[:, 0].tolist():
        scaled = values[row] / temperatures[row]
        least = _least_logit(scaled, int(top_k[row]), top_p[row], log_min_p[row])
        key = noise.key_of(int(streams[row]), int(indices[row]))
        added = noise.gumbel_noise([key], vocab_size, logits.device)[0]
        tokens[row] = (scaled + added).masked_fill_(scaled < least, -torch.inf).argmax()


def _least_logit(
    scaled: torch.Tensor, top_k: int, top_p: torch.Tensor, log_min_p: torch.Tensor
) -> torch.Tensor:
    """The least of a row's logits that may be sampled, by sorting them."""
    ordered = scaled.sort(descending=True).values
    least = ordered[min(top_k, len(ordered)) - 1]
    if top_p < 1:
        weights = (ordered - ordered[0]).exp().masked_fill_(ordered < least, 0)
        before = weights.double().cumsum(0) - weights
        inside = before < top_p * weights.double().sum()
        least = torch.maximum(least, ordered[inside & (ordered >= least)][-1])
    return torch.maximum(least, ordered[0] + log_min_p)


def mask_logits(logits: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> None:
    """See `sampling.mask_logits`."""
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)
    allowed = (bits & 1).view(len(rows), -1)[:, : logits.shape[1]].bool()
    picked = rows.long()
    logits[picked] = logits[picked].masked_fill(~allowed, -torch.inf)
