"""How much of a card the KV cache gets: what the largest steps and the graphs leave free."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nightherd.errors import CheckpointError
from worker.engine.cuda.graphs import GRAPH_BYTES, MAX_GRAPHS
from worker.engine.validation import one_line, out_of_memory

log = logging.getLogger("nightherd.engine")

GPU_MEMORY_UTILIZATION = 0.92
"""The share of the card's memory that the engine uses, all in all: the driver and other processes
need some too."""
_GRAPHS_BYTES = MAX_GRAPHS * GRAPH_BYTES
"""Set aside for the graphs themselves, beside the memory that their steps use."""
_FRAGMENTATION = 1.1
"""A step takes so many times its peak, as the allocator cannot use every gap."""


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What was measured on a card, in bytes."""

    total: int
    used: int
    """Of the total: by the weights, by what a step leaves behind, and by other processes."""
    prefill: int
    """Beside `used`, at the peak of the largest step that prefills."""
    decode: int
    """Likewise of the largest step that decodes; its graph takes as much once more."""
    sampling: int
    """Likewise of the step that samples most tokens, by every parameter there is."""

    @property
    def cache(self) -> int:
        """Bytes that are left for the KV cache."""
        steps = max(self.prefill, self.decode, self.sampling) + self.decode
        return max(
            0,
            int(GPU_MEMORY_UTILIZATION * self.total)
            - self.used
            - int(_FRAGMENTATION * steps)
            - _GRAPHS_BYTES,
        )


def measure(runner: Any, device: torch.device) -> MemoryProfile:
    """Runs the largest steps of a `CudaRunner`, which has a cache of a few blocks for that.

    Raises `CheckpointError` where there is no memory even for one of them.
    """
    try:
        profile = _measure(runner, device)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise CheckpointError(
            f"beside the weights the card has no memory for the largest step ({one_line(error)}); "
            "give less with NIGHTHERD_TOKEN_BUDGET or NIGHTHERD_MAX_BATCH"
        ) from None
    log.info(
        "of %.1f GiB %.1f are used, a step takes up to %.1f, decoding %.1f, sampling %.1f",
        *(
            size / 2**30
            for size in (
                profile.total,
                profile.used,
                profile.prefill,
                profile.decode,
                profile.sampling,
            )
        ),
    )
    return profile


def _measure(runner: Any, device: torch.device) -> MemoryProfile:
    # The first run of each leaves memory behind: compiled kernels, libraries, their workspaces.
    for step in (runner.largest_prefill, runner.largest_decode, runner.largest_sampling):
        step()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    profile = MemoryProfile(
        total=total,
        used=total - free,
        prefill=_peak(runner.largest_prefill, device),
        decode=_peak(runner.largest_decode, device),
        sampling=_peak(runner.largest_sampling, device),
    )
    torch.cuda.empty_cache()
    return profile


def _peak(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that a step takes beside what was taken before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before
