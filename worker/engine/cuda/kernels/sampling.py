"""Sampling without sorting the vocabulary, and grammars' masks.

One program a row. Top-k and top-p become the least logit that may be sampled, found by a search of
two bits a pass in the logits' order: each pass over the vocabulary counts (or weighs) what is above
three candidates, so bfloat16 takes eight passes, float32 sixteen, out of the L2 cache. The noise is
that of `worker.engine.noise`, a function of (seed, index, token id); the sample is the argmax of
logits and noise (Gumbel-max).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 4096
"""Logits that a program loads at once: enough to hide the latency of memory."""
_NOISE_TILE = 2048
_LANES = 256
"""Threads of a program that searches the least logit."""
_MASK_TILE = 1024
_GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND: tl.constexpr = tl.constexpr(0x94D049BB133111EB)
_UNIT: tl.constexpr = tl.constexpr(2.0**-40)
_BELOW_ONE: tl.constexpr = tl.constexpr(1 - 2.0**-24)


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
    """Writes each row's token (int32) and greatest logit (float32) to `tokens` and `best`.

    `logits` is [rows, at least vocab_size]. A row of temperature 0 takes the likeliest token, the
    lowest id of several. `top_k` (int32) is vocab_size or more where all may be sampled, `top_p` 1,
    `log_min_p` minus infinity. `streams` (int64) is `noise.stream_of` each seed, `indices` (int32)
    the token's index in its sample's output. NaN counts as the greatest and is given as infinity.
    """
    rows = logits.shape[0]
    least = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _top_k_top_p[(rows,)](
        logits,
        logits.stride(0),
        vocab_size,
        temperatures,
        top_k,
        top_p,
        least,
        PASSES=8 if logits.dtype == torch.bfloat16 else 16,
        LANES=_LANES,
        WIDTH=16 // logits.element_size(),
        num_warps=8,
    )
    _sample[(rows,)](
        logits,
        logits.stride(0),
        vocab_size,
        temperatures,
        log_min_p,
        least,
        streams,
        indices,
        tokens,
        best,
        TILE=_TILE,
        NOISE_TILE=_NOISE_TILE,
        num_warps=8,
    )


def mask_logits(logits: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> None:
    """Masks, in place, what a grammar forbids: bit i % 32 of `words[j, i // 32]` (int32) says
    whether token i may come in row `rows[j]` (int32)."""
    vocab_size = logits.shape[1]
    grid = (rows.shape[0], triton.cdiv(vocab_size, _MASK_TILE))
    _mask[grid](logits, logits.stride(0), vocab_size, rows, words, words.stride(0), TILE=_MASK_TILE)


@triton.jit
def _splitmix64(value):
    """splitmix64's finaliser (Steele, Lea and Flood 2014), on uint64."""
    value = (value ^ (value >> 30)) * _FIRST
    value = (value ^ (value >> 27)) * _SECOND
    return value ^ (value >> 31)


@triton.jit
def _uniform(key, ids):
    """Uniform numbers in (0, 1) of token ids, float32."""
    state = _splitmix64(key + (ids + 1).to(tl.uint64) * _GOLDEN) >> 24
    return tl.minimum((state.to(tl.int64) + 1).to(tl.float32) * _UNIT, _BELOW_ONE)


@triton.jit
def _gumbel(uniform):
    """Standard Gumbel noise of uniform numbers: `-log(-log1p(-u))`."""
    # log1p by the rounding error of 1 - u (Kahan): exact enough down to 2^-40.
    rest = 1.0 - uniform
    gap = 1.0 - rest
    correction = tl.where(gap == 0, 1.0, uniform / tl.where(gap == 0, 1.0, gap))
    magnitude = tl.where(gap == 0, uniform, -tl.log(rest) * correction)
    return -tl.log(magnitude)


@triton.jit
def _ordered(values):
    """uint32 in the order of finite float32 values."""
    bits = (values + 0.0).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def _mass_above(
    row_ptr,
    vocab,
    floor,
    unit,
    highest,
    inverse,
    WEIGHED: tl.constexpr,
    least,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """How many of the logits from `least` on are at or above `floor`, `floor` + `unit`,
    + 2 `unit` and + 3 `unit`; with `WEIGHED` the sums of their weights instead."""
    # Each thread adds up what it loads: threads are reduced after the last tile only.
    ids = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    none = tl.zeros([LANES], tl.float32)
    one = tl.zeros([LANES], tl.float32)
    two = tl.zeros([LANES], tl.float32)
    three = tl.zeros([LANES], tl.float32)
    for start in range(0, vocab, LANES * WIDTH):
        inside = start + ids < vocab
        values = tl.load(row_ptr + start + ids, mask=inside, other=-float("inf")).to(tl.float32)
        ordered = _ordered(values)
        counted = inside & (ordered >= least)
        if WEIGHED:
            weights = tl.where(counted, tl.exp((values - highest) * inverse), 0.0)
        else:
            weights = tl.where(counted, 1.0, 0.0)
        none += tl.sum(tl.where(ordered >= floor, weights, 0.0), 1)
        one += tl.sum(tl.where(ordered >= floor + unit, weights, 0.0), 1)
        two += tl.sum(tl.where(ordered >= floor + unit * 2, weights, 0.0), 1)
        three += tl.sum(tl.where(ordered >= floor + unit * 3, weights, 0.0), 1)
    return tl.sum(none, 0), tl.sum(one, 0), tl.sum(two, 0), tl.sum(three, 0)


@triton.jit
def _search_floor(
    row_ptr,
    vocab,
    target,
    share,
    highest,
    inverse,
    least,
    WEIGHED: tl.constexpr,
    PASSES: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The greatest floor with at least `target`, and at least the `share` of all, at or above it:
    counts of logits, or with `WEIGHED` their weights."""
    found = least * 0
    for step in range(PASSES):
        unit = (least * 0 + 1) << (30 - 2 * step)
        none, one, two, three = _mass_above(
            row_ptr, vocab, found, unit, highest, inverse, WEIGHED, least, LANES, WIDTH
        )
        # Nothing is below the first floor: what is above it is all.
        target = tl.where(step == 0, tl.maximum(target, share * none), target)
        found += tl.where(one >= target, unit, 0).to(tl.uint32)
        found += tl.where(two >= target, unit, 0).to(tl.uint32)
        found += tl.where(three >= target, unit, 0).to(tl.uint32)
    return found


@triton.jit
def _top_k_top_p(
    logits_ptr,
    stride,
    vocab,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    least_ptr,
    PASSES: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The least logit of a row that top-k and top-p leave, as its ordered bits."""
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    least = (row * 0).to(tl.uint32)
    if (temperature > 0) & ((top_k < vocab) | (top_p < 1)):
        row_ptr = logits_ptr + row.to(tl.int64) * stride
        ids = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        most = tl.full([LANES, WIDTH], -float("inf"), tl.float32)
        for start in range(0, vocab, LANES * WIDTH):
            inside = start + ids < vocab
            values = tl.load(row_ptr + start + ids, mask=inside, other=-float("inf"))
            values = values.to(tl.float32)
            most = tl.maximum(most, tl.where(values == values, values, float("inf")))
        highest = tl.max(tl.max(most, 1), 0)
        if (highest > -float("inf")) & (highest < float("inf")):
            inverse = 1.0 / temperature
            if top_k < vocab:
                least = _search_floor(
                    row_ptr,
                    vocab,
                    top_k.to(tl.float32),
                    top_p * 0.0,
                    highest,
                    inverse,
                    least,
                    False,
                    PASSES,
                    LANES,
                    WIDTH,
                )
            if top_p < 1:
                nucleus = _search_floor(
                    row_ptr,
                    vocab,
                    top_p * 0.0,
                    top_p,
                    highest,
                    inverse,
                    least,
                    True,
                    PASSES,
                    LANES,
                    WIDTH,
                )
                least = tl.maximum(least, nucleus)
    tl.store(least_ptr + row, least.to(tl.int32, bitcast=True))


@triton.jit
def _sample(
    logits_ptr,
    stride,
    vocab,
    temperature_ptr,
    log_min_p_ptr,
    least_ptr,
    stream_ptr,
    index_ptr,
    token_ptr,
    best_ptr,
    TILE: tl.constexpr,
    NOISE_TILE: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    temperature = tl.load(temperature_ptr + row)
    ids = tl.arange(0, TILE)
    scores = tl.full([TILE], -float("inf"), tl.float32)
    chosen = tl.zeros([TILE], tl.int32)
    for start in range(0, vocab, TILE):
        inside = start + ids < vocab
        values = tl.load(row_ptr + start + ids, mask=inside, other=-float("inf")).to(tl.float32)
        values = tl.where(values == values, values, float("inf"))
        better = values > scores
        scores = tl.where(better, values, scores)
        chosen = tl.where(better, start + ids, chosen)
    highest = tl.max(scores, 0)
    token = tl.min(tl.where(scores == highest, chosen, vocab), 0)
    if (temperature > 0) & (highest > -float("inf")) & (highest < float("inf")):
        least = tl.load(least_ptr + row).to(tl.uint32, bitcast=True)
        floor = tl.div_rn(highest, temperature) + tl.load(log_min_p_ptr + row)
        seed = tl.load(stream_ptr + row).to(tl.uint64)
        index = (tl.load(index_ptr + row) + 1).to(tl.uint64)
        key = _splitmix64(seed + index * _GOLDEN)
        noise_ids = tl.arange(0, NOISE_TILE)
        best = (row * 0).to(tl.float32) - float("inf")
        for start in range(0, vocab, NOISE_TILE):
            inside = start + noise_ids < vocab
            values = tl.load(row_ptr + start + noise_ids, mask=inside, other=-float("inf"))
            values = values.to(tl.float32)
            scaled = tl.div_rn(values, tl.zeros([NOISE_TILE], tl.float32) + temperature)
            kept = inside & (_ordered(values) >= least) & (scaled >= floor)
            # Where few tokens may be sampled, few tiles need noise.
            if tl.max(kept.to(tl.int32), 0) > 0:
                uniform = _uniform(key, start + noise_ids)
                # Noise is above x with u < exp(-x) only, so most tiles need no logarithms. What is
                # added is more than all roundings of the sum.
                slack = 1e-3 + tl.abs(best) * 1e-6
                candidates = kept & (uniform <= tl.exp(scaled - best + slack))
                if tl.max(candidates.to(tl.int32), 0) > 0:
                    noisy = tl.where(candidates, scaled + _gumbel(uniform), -float("inf"))
                    highest_here = tl.max(noisy, 0)
                    if highest_here > best:
                        best = highest_here
                        token = tl.min(tl.where(noisy == best, start + noise_ids, vocab), 0)
    tl.store(token_ptr + row, token)
    tl.store(best_ptr + row, highest)


@triton.jit
def _mask(logits_ptr, stride, vocab, rows_ptr, words_ptr, words_stride, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = ids < vocab
    words = tl.load(words_ptr + index * words_stride + ids // 32, mask=inside, other=0)
    forbidden = ((words >> (ids % 32)) & 1) == 0
    minus_infinity = tl.full([TILE], -float("inf"), tl.float32).to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * stride + ids, minus_infinity, mask=inside & forbidden)
