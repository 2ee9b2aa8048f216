"""What the launches of all kernels share."""

from __future__ import annotations

import triton

UPCAST_DOTS = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter cannot multiply bfloat16 matrices: it gets them in float32."""


def power_of_two(size: int, *, least: int = 1) -> int:
    """The next power of two: Triton's tiles have no other sizes."""
    return max(least, 1 << (size - 1).bit_length())
