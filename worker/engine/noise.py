"""Counter-based noise for sampling: a pure function of (seed, position, token id).

A sample is `argmax(logits + noise)` with Gumbel noise, which draws from `softmax(logits)` (the
Gumbel-max trick). Because no generator has a state, the same sample gets the same noise in any
batch, engine or order, also when it is computed again after a failure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MASK = (1 << 64) - 1
# splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_BITS = 40


def _mix(value: int) -> int:
    """splitmix64's finaliser on an unsigned 64-bit number."""
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


def _xor_shifted(state: torch.Tensor, bits: int, scratch: torch.Tensor) -> None:
    """`state ^= state >> bits` in place, without the sign that int64's own shift would draw in."""
    torch.bitwise_right_shift(state, bits, out=scratch)
    scratch &= (1 << (64 - bits)) - 1
    state ^= scratch


def noise_key(seed: int, position: int) -> int:
    """The start of the stream of one position (0 is the first generated token) of one sample."""
    return key_of(stream_of(seed), position)


def stream_of(seed: int) -> int:
    """What `key_of` takes of a seed, as int64."""
    return _signed(_mix((seed + _GOLDEN) & _MASK))


def key_of(stream: int, position: int) -> int:
    """`noise_key` from `stream_of` the seed."""
    return _mix((stream + (position + 1) * _GOLDEN) & _MASK)


def uniform_noise(keys: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Uniform numbers in (0, 1), float32, `[len(keys), vocab_size]`, row r for `keys[r]`.

    40 bits each: fine enough near 0, where the greatest Gumbel noise comes from, that tokens of
    probability 1e-9 are still drawn as often as they should be.
    """
    start = torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=device)
    ids = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device)
    # In place from here: new memory for each operation takes four times as long.
    state = start[:, None] + (ids * _signed(_GOLDEN))[None, :]
    scratch = torch.empty_like(state)
    _xor_shifted(state, 30, scratch)
    state *= _signed(_FIRST)
    _xor_shifted(state, 27, scratch)
    state *= _signed(_SECOND)
    _xor_shifted(state, 31, scratch)
    state >>= 64 - _BITS
    state &= (1 << _BITS) - 1
    state += 1
    # Below 1 even where float32 rounds up, so that no noise is infinite.
    return state.to(torch.float32).mul_(2.0**-_BITS).clamp_(max=1 - 2.0**-24)


def gumbel_noise(keys: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise, `-log(-log1p(-u))` of `uniform_noise`: float32,
    `[len(keys), vocab_size]`, row r for `keys[r]`."""
    return uniform_noise(keys, vocab_size, device).neg_().log1p_().neg_().log_().neg_()
