"""The kernels' results in plain torch, slowly: what they are held to, and what runs on a CPU.

Each function has the name, the arguments and the results of its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from worker.engine import noise

SPLIT_BLOCKS = 4
"""Blocks of a split of decode attention. Changing it changes roundings."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Blocks that rows have in common, int32: see `cuda_groups.Groups`. Tiles of no blocks fill
    up."""

    tiles: torch.Tensor
    members: torch.Tensor
    shared: torch.Tensor


def splits_for(length: int, block: int) -> int:
    """Splits of a context of `length` positions."""
    return max(1, -(-length // (SPLIT_BLOCKS * block)))


def decode_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
    blocks: torch.Tensor,
    *,
    splits: int,
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
            table = _led(table, row, first, blocks, prefixes)
        keys, values = gathered(cache, table, position + 1)
        keys = keys.float().repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,khd->hk", query[row].float(), keys) * head_dim**-0.5
        if lse is not None:
            lse[row] = scores.logsumexp(-1)
        values = values.float().repeat_interleave(group, dim=1)
        out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), values)
    return out.to(query.dtype).view(rows, -1)


def _led(
    table: torch.Tensor,
    row: int,
    first: torch.Tensor,
    blocks: torch.Tensor,
    prefixes: Prefixes,
) -> torch.Tensor:
    """A row's blocks, with those in common from the row that leads its group."""
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


def gathered(
    cache: torch.Tensor, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a sequence's first positions, each [length, kv_heads, head_dim]."""
    places = torch.arange(length, device=cache.device)
    size = cache.shape[3]
    pages = blocks[places // size].long()
    return cache[:, 0][pages, :, places % size], cache[:, 1][pages, :, places % size]


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
    places = positions[real].long()
    parts = qkv.view(len(qkv), -1, head_dim)
    query, key, value = parts[real].split([heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        query = rms_norm(query, q_norm, eps)
    if k_norm is not None:
        key = rms_norm(key, k_norm, eps)
    angles = cos[places][:, None], sin[places][:, None]
    query, key = _rotated(query, *angles), _rotated(key, *angles)
    key = key + (value - value)
    value = torch.where(value.isfinite(), value, 0)
    parts[real] = torch.cat([query, key, value], dim=1)
    pages = blocks[first[real].long() + places // block].long()
    cache[:, 0][pages, :, places % block] = key
    cache[:, 1][pages, :, places % block] = value


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
    places: torch.Tensor,
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
        least = _least(scaled, int(top_k[row]), top_p[row], log_min_p[row])
        key = noise.key_of(int(streams[row]), int(places[row]))
        added = noise.gumbel_noise([key], vocab_size, logits.device)[0]
        tokens[row] = (scaled + added).masked_fill_(scaled < least, -torch.inf).argmax()


def _least(
    scaled: torch.Tensor, top_k: int, top_p: torch.Tensor, log_min_p: torch.Tensor
) -> torch.Tensor:
    """The least of a row's logits that may be chosen, by sorting them."""
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
