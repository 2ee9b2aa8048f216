"""How much of a card the KV cache gets: what the largest steps and the graphs leave."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nightherd.errors import CheckpointError
from worker.engine.cuda_graphs import GRAPH_BYTES, MOST_GRAPHS
from worker.engine.requests import one_line, out_of_memory

log = logging.getLogger("nightherd.engine")

SHARE = 0.92
"""Of the whole card, for everything: the driver and other processes need something too."""
_GRAPHS = MOST_GRAPHS * GRAPH_BYTES
"""Of graphs themselves, beside the memory that their steps use."""
_SPARE = 1.1
"""The allocator cannot use every gap."""


@dataclass(frozen=True, slots=True)
class Use:
    """What was measured, in bytes."""

    total: int
    used: int
    """By the weights, by what a step leaves behind, and by whoever else uses the card."""
    prefill: int
    """Beside that, at the peak of the largest step that prefills."""
    decode: int
    """And of the largest that decodes; its graph has as much for itself."""
    choose: int
    """And of the one that chooses most tokens by every parameter there is."""

    @property
    def cache(self) -> int:
        """What is left for the KV cache."""
        steps = max(self.prefill, self.decode, self.choose) + self.decode
        return max(0, int(SHARE * self.total) - self.used - int(_SPARE * steps) - _GRAPHS)


def measure(runner: Any, device: torch.device) -> Use:
    """Runs the largest steps of a `CudaRunner`, which has a cache of a few blocks for that.

    Raises `CheckpointError` where there is no memory even for one of them.
    """
    try:
        use = _measure(runner, device)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise CheckpointError(
            f"beside the weights the card has no memory for the largest step ({one_line(error)}); "
            "give less with NIGHTHERD_TOKEN_BUDGET or NIGHTHERD_MAX_BATCH"
        ) from None
    log.info(
        "of %.1f GiB %.1f are used, a step takes up to %.1f, decoding %.1f, choosing %.1f",
        *(size / 2**30 for size in (use.total, use.used, use.prefill, use.decode, use.choose)),
    )
    return use


def _measure(runner: Any, device: torch.device) -> Use:
    # Once for what stays: compiled kernels, libraries, their workspaces.
    for step in (runner.largest_prefill, runner.largest_decode, runner.largest_choose):
        step()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    use = Use(
        total=total,
        used=total - free,
        prefill=_peak(runner.largest_prefill, device),
        decode=_peak(runner.largest_decode, device),
        choose=_peak(runner.largest_choose, device),
    )
    torch.cuda.empty_cache()
    return use


def _peak(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that a step takes beside what was taken before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before
