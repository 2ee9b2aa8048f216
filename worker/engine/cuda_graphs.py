"""CUDA graphs of whole decode steps: one launch instead of hundreds.

A step of each size runs eagerly at first, which compiles its kernels; one that comes again is
captured and replayed from then on. What it reads and writes lies at fixed addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

log = logging.getLogger("nightherd.engine")

Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], Step]
"""Records what a step does; what it gives back does that again, with the same result tensor."""

EAGER_USES = 2
"""Times that a step of a size runs before it is captured."""

CALM_USES = 1000
"""After so many more it is tried again if there was no memory for its graph."""


class GraphCache:
    """Steps by their size."""

    def __init__(self, capture: Capture | None) -> None:
        """Without `capture` all steps run eagerly."""
        self._capture = capture
        self._uses: dict[Hashable, int] = {}
        self._captured: dict[Hashable, Step] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, size: Hashable, step: Step) -> torch.Tensor:
        """The result of a step; all steps of a size must be the same function."""
        replay = self._captured.get(size)
        if replay is None:
            uses = self._uses[size] = self._uses.get(size, 0) + 1
            if self._capture is None or uses <= EAGER_USES:
                return step()
            try:
                replay = self._capture(step)
            except torch.OutOfMemoryError as error:
                self._uses[size] = -CALM_USES
                log.warning("no memory for the graph of a decode step: it runs without (%s)", error)
                return step()
            except Exception as error:  # whatever driver, torch and Triton raise
                self._capture = None
                log.warning(
                    "CUDA graphs cannot be captured (%s): decoding goes on without, slower", error
                )
                return step()
            self._captured[size] = replay
        return replay()

    def clear(self) -> None:
        self._captured.clear()


def cuda_capture(device: torch.device) -> Capture:
    """Captures into graphs that share their memory: they never run at the same time, and what one
    leaves is read before the next."""
    pool: Any = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        nonlocal pool
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails at its end leaves its own stream as the current one: hence the outer
        # context. Other threads of the worker may use the card meanwhile.
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
            ):
                result = step()
        except Exception:
            # torch takes no further graph into a pool whose only one has gone.
            pool = torch.cuda.graph_pool_handle()
            raise

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    return capture
