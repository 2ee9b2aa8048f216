"""What a layer does beside its matrices and attention, each in one pass over its rows.

Roundings are those of transformers' LLaMA: the norm is rounded before its weight is multiplied in,
SiLU before it is multiplied with the other half, a rotated head once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.cuda.kernels.launch import power_of_two

_SILU_TILE = 1024


def rms_norm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich 2019) of [rows, hidden].

    With `residual`, of the same shape, the rows are added to it in place, and the norm is that of
    the sum.
    """
    out = torch.empty_like(rows)
    hidden = rows.shape[1]
    tile = power_of_two(hidden)
    _rms_norm[(rows.shape[0],)](
        rows,
        rows if residual is None else residual,
        weight,
        out,
        rows.stride(0),
        eps,
        HIDDEN=hidden,
        TILE=tile,
        ADD=residual is not None,
        num_warps=8 if tile >= 4096 else 4,
    )
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, from [rows, 2 * width] with the gates first, to [rows, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    grid = (rows, triton.cdiv(width, _SILU_TILE))
    _silu_mul[grid](gate_up, out, width, TILE=_SILU_TILE, num_warps=4)
    return out


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
    """Rotates queries and keys in place, and writes keys and values into the cache.

    `qkv` is [rows, (heads + 2 * kv_heads) * head_dim]; `cos` and `sin` are float32
    [context, head_dim / 2]; the other tensors are as the package says. `q_norm` and `k_norm`,
    [head_dim], are RMSNorms of each head before the rotation (Qwen3).

    A value that is not finite would spoil rows that give it weight zero. So it is written as 0, and
    its key as NaN, which only rows that attend to this position read.
    """
    _, _, kv_heads, block, head_dim = cache.shape
    _rotate_and_write[(qkv.shape[0],)](
        qkv,
        cos,
        sin,
        positions,
        first,
        blocks,
        cache,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        qkv.stride(0),
        eps,
        HEADS=heads,
        HEADS_TILE=power_of_two(heads),
        KV_HEADS=kv_heads,
        KV_TILE=power_of_two(kv_heads),
        HALF=head_dim // 2,
        HALF_TILE=power_of_two(head_dim // 2),
        BLOCK=block,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        num_warps=4,
    )


@triton.jit
def _rms_norm(
    rows_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    stride,
    eps,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    inside = columns < HIDDEN
    dtype = out_ptr.dtype.element_ty
    wide = tl.load(rows_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual = residual_ptr + row * HIDDEN + columns
        wide += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(dtype)
        tl.store(residual, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    normed = (wide * scale).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * HIDDEN + columns, (normed * weight).to(dtype), mask=inside)


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < width
    dtype = out_ptr.dtype.element_ty
    start = gate_up_ptr + row * 2 * width + columns
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + width, mask=inside, other=0.0).to(tl.float32)
    # exp of minus the magnitude cannot overflow.
    small = tl.exp(-tl.abs(gate))
    sigmoid = tl.where(gate >= 0, 1.0, small) / (1.0 + small)
    silu = (gate * sigmoid).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (silu * up).to(dtype), mask=inside)


@triton.jit
def _normed_halves(first, second, weight_ptr, half, inside, eps, HALF: tl.constexpr, dtype):
    """RMSNorm of heads given as halves, float32 [heads, half], rounded as `rms_norm` rounds."""
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
    scale = tl.rsqrt(mean + eps)[:, None]
    low = tl.load(weight_ptr + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    high = tl.load(weight_ptr + HALF + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = ((first * scale).to(dtype).to(tl.float32) * low).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * high).to(dtype).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize_on_alignment=["position_ptr", "first_ptr"])
def _rotate_and_write(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    first_ptr,
    blocks_ptr,
    cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    stride,
    eps,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_TILE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row).to(tl.int64)
    if position >= 0:
        dtype = qkv_ptr.dtype.element_ty
        half = tl.arange(0, HALF_TILE)
        inside = half < HALF
        cos = tl.load(cos_ptr + position * HALF + half, mask=inside, other=0.0)[None, :]
        sin = tl.load(sin_ptr + position * HALF + half, mask=inside, other=0.0)[None, :]

        heads = tl.arange(0, HEADS_TILE)[:, None]
        real = (heads < HEADS) & inside[None, :]
        start = qkv_ptr + row * stride + heads * 2 * HALF + half[None, :]
        low = tl.load(start, mask=real, other=0.0).to(tl.float32)
        high = tl.load(start + HALF, mask=real, other=0.0).to(tl.float32)
        if Q_NORM:
            low, high = _normed_halves(low, high, q_norm_ptr, half, inside, eps, HALF, dtype)
        tl.store(start, (low * cos - high * sin).to(dtype), mask=real)
        tl.store(start + HALF, (high * cos + low * sin).to(dtype), mask=real)

        heads = tl.arange(0, KV_TILE)[:, None]
        real = (heads < KV_HEADS) & inside[None, :]
        start = qkv_ptr + row * stride + (HEADS + heads) * 2 * HALF + half[None, :]
        low = tl.load(start, mask=real, other=0.0).to(tl.float32)
        high = tl.load(start + HALF, mask=real, other=0.0).to(tl.float32)
        if K_NORM:
            low, high = _normed_halves(low, high, k_norm_ptr, half, inside, eps, HALF, dtype)
        value = start + KV_HEADS * 2 * HALF
        value_low = tl.load(value, mask=real, other=0.0).to(tl.float32)
        value_high = tl.load(value + HALF, mask=real, other=0.0).to(tl.float32)
        # 0 where the value is finite, else NaN.
        low_flaw = value_low - value_low
        high_flaw = value_high - value_high
        key_low = (low * cos - high * sin + low_flaw).to(dtype)
        key_high = (high * cos + low * sin + high_flaw).to(dtype)
        value_low = tl.where(low_flaw == 0, value_low, 0.0).to(dtype)
        value_high = tl.where(high_flaw == 0, value_high, 0.0).to(dtype)

        block = tl.load(blocks_ptr + tl.load(first_ptr + row) + position // BLOCK).to(tl.int64)
        cache_row = (block * 2 * KV_HEADS + heads) * BLOCK + position % BLOCK
        cache_key = cache_ptr + cache_row * 2 * HALF + half[None, :]
        cache_value = cache_key + KV_HEADS * BLOCK * 2 * HALF
        tl.store(cache_key, key_low, mask=real)
        tl.store(cache_key + HALF, key_high, mask=real)
        tl.store(cache_value, value_low, mask=real)
        tl.store(cache_value + HALF, value_high, mask=real)
        # Prefill reads the step's own keys and values from here.
        tl.store(start, key_low, mask=real)
        tl.store(start + HALF, key_high, mask=real)
        tl.store(value, value_low, mask=real)
        tl.store(value + HALF, value_high, mask=real)
