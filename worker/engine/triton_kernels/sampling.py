"""Choosing tokens without sorting the vocabulary.

One program a row. Top-k and top-p become the least logit that may be chosen, found digit by digit
in the logits' bits: each pass over the vocabulary counts (or weighs) what is above 16 candidates at
once, so bfloat16 takes four passes, float32 eight. The noise is that of `worker.engine.noise`, a
function of (seed, position, token id); the sample is the argmax of logits and noise (Gumbel-max).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 1024
_SEARCH_TILE = 512
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
    places: torch.Tensor,
    tokens: torch.Tensor,
    best: torch.Tensor,
) -> None:
    """Writes each row's token (int32) and greatest logit (float32) to `tokens` and `best`.

    `logits` is [rows, at least vocab_size]. A row of temperature 0 takes the likeliest token, the
    lowest id of several. `top_k` (int32) is vocab_size or more where all may be chosen, `top_p` 1,
    `log_min_p` minus infinity. `streams` (int64) is `noise.stream_of` each seed, `places` (int32)
    how many tokens were generated before. NaN counts as the greatest and is told as infinity.
    """
    _sample[(logits.shape[0],)](
        logits,
        logits.stride(0),
        vocab_size,
        temperatures,
        top_k,
        top_p,
        log_min_p,
        streams,
        places,
        tokens,
        best,
        PASSES=4 if logits.dtype == torch.bfloat16 else 8,
        TILE=_TILE,
        SEARCH_TILE=_SEARCH_TILE,
        num_warps=8,
    )


def mask_logits(logits: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> None:
    """Forbids, in place, what a grammar forbids: bit i % 32 of `words[j, i // 32]` (int32) says
    whether token i may come in row `rows[j]` (int32)."""
    vocab_size = logits.shape[1]
    grid = (rows.shape[0], triton.cdiv(vocab_size, _TILE))
    _mask[grid](logits, logits.stride(0), vocab_size, rows, words, words.stride(0), TILE=_TILE)


@triton.jit
def _mixed(value):
    """splitmix64's finaliser (Steele, Lea and Flood 2014), on uint64."""
    value = (value ^ (value >> 30)) * _FIRST
    value = (value ^ (value >> 27)) * _SECOND
    return value ^ (value >> 31)


@triton.jit
def _noise(key, ids):
    """Standard Gumbel noise of token ids: float32, `-log(-log1p(-u))`."""
    state = _mixed(key + (ids + 1).to(tl.uint64) * _GOLDEN) >> 24
    uniform = (state.to(tl.int64) + 1).to(tl.float32) * _UNIT
    uniform = tl.minimum(uniform, _BELOW_ONE)
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
    row_ptr, vocab, floors, highest, inverse, WEIGHED: tl.constexpr, least, TILE: tl.constexpr
):
    """How many logits are at or above each of 16 floors and `least`, or their weights' sum."""
    ids = tl.arange(0, TILE)
    sums = tl.zeros([16], tl.float32)
    for start in range(0, vocab, TILE):
        inside = start + ids < vocab
        values = tl.load(row_ptr + start + ids, mask=inside, other=-float("inf")).to(tl.float32)
        ordered = _ordered(values)
        counted = inside & (ordered >= least)
        if WEIGHED:
            weights = tl.where(counted, tl.exp((values - highest) * inverse), 0.0)
        else:
            weights = tl.where(counted, 1.0, 0.0)
        above = ordered[:, None] >= floors[None, :]
        sums += tl.sum(tl.where(above, weights[:, None], 0.0), 0)
    return sums


@triton.jit
def _least_with(
    row_ptr,
    vocab,
    target,
    share,
    highest,
    inverse,
    least,
    WEIGHED: tl.constexpr,
    PASSES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The greatest floor that leaves at least `target` and `share` of all above it."""
    digits = tl.arange(0, 16).to(tl.uint32)
    found = tl.sum(digits, 0) * 0
    for step in tl.static_range(PASSES):
        floors = found + (digits << (28 - 4 * step))
        sums = _mass_above(row_ptr, vocab, floors, highest, inverse, WEIGHED, least, TILE)
        if step == 0:
            # Nothing is below the first floor.
            target = tl.maximum(target, share * tl.max(sums, 0))
        digit = tl.max(tl.where(sums >= target, digits, digits * 0), 0)
        found += digit << (28 - 4 * step)
    return found


@triton.jit
def _sample(
    logits_ptr,
    stride,
    vocab,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    log_min_p_ptr,
    stream_ptr,
    place_ptr,
    token_ptr,
    best_ptr,
    PASSES: tl.constexpr,
    TILE: tl.constexpr,
    SEARCH_TILE: tl.constexpr,
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
        inverse = 1.0 / temperature
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        least = (row * 0).to(tl.uint32)
        if top_k < vocab:
            least = _least_with(
                row_ptr,
                vocab,
                top_k.to(tl.float32),
                top_p * 0.0,
                highest,
                inverse,
                least,
                False,
                PASSES,
                SEARCH_TILE,
            )
        if top_p < 1:
            nucleus = _least_with(
                row_ptr,
                vocab,
                top_p * 0.0,
                top_p,
                highest,
                inverse,
                least,
                True,
                PASSES,
                SEARCH_TILE,
            )
            least = tl.maximum(least, nucleus)
        floor = tl.div_rn(highest, temperature) + tl.load(log_min_p_ptr + row)
        seed = tl.load(stream_ptr + row).to(tl.uint64)
        place = (tl.load(place_ptr + row) + 1).to(tl.uint64)
        key = _mixed(seed + place * _GOLDEN)
        scores = tl.full([TILE], -float("inf"), tl.float32)
        chosen = tl.zeros([TILE], tl.int32)
        for start in range(0, vocab, TILE):
            inside = start + ids < vocab
            values = tl.load(row_ptr + start + ids, mask=inside, other=-float("inf")).to(tl.float32)
            scaled = tl.div_rn(values, tl.zeros([TILE], tl.float32) + temperature)
            kept = inside & (_ordered(values) >= least) & (scaled >= floor)
            # Narrow rows need noise for few tiles.
            if tl.max(kept.to(tl.int32), 0) > 0:
                noisy = tl.where(kept, scaled + _noise(key, start + ids), -float("inf"))
                better = noisy > scores
                scores = tl.where(better, noisy, scores)
                chosen = tl.where(better, start + ids, chosen)
        likeliest = tl.max(scores, 0)
        token = tl.min(tl.where(scores == likeliest, chosen, vocab), 0)
    tl.store(token_ptr + row, token)
    tl.store(best_ptr + row, highest)


@triton.jit
def _mask(logits_ptr, stride, vocab, rows_ptr, words_ptr, words_stride, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = ids < vocab
    words = tl.load(words_ptr + place * words_stride + ids // 32, mask=inside, other=0)
    forbidden = ((words >> (ids % 32)) & 1) == 0
    nothing = tl.full([TILE], -float("inf"), tl.float32).to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * stride + ids, nothing, mask=inside & forbidden)
