"""CUDA graphs of whole decode steps: one launch instead of hundreds.

A step of each size runs eagerly at first, which compiles its kernels; one that comes again is
captured and replayed from then on. What it reads and writes lies at fixed addresses.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch

from worker.engine.requests import one_line, out_of_memory

log = logging.getLogger("nightherd.engine")

Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], Step]
"""Records what a step does; what it gives back does that again, with the same result tensor."""

EAGER_USES = 2
"""Times that a step of a size runs before it is captured."""

CALM_USES = 1000
"""After so many more it is tried again if there was no memory for its graph."""

GRAPH_BYTES = 4 << 20
"""Of the card, for a graph itself: an 8B model's has some 340 kernels, and 12 KiB are set aside for
each. Reckoned, not measured."""

MOST_GRAPHS = 128
"""Kept at a time: as many as `cuda_memory` leaves room for. Twenty batch sizes up to 512, at three
lengths of context, with and without the fast sampler."""

IDLE_RUNS = 4000
"""A graph that was not used in so many steps gives way to another. So no more than `MOST_GRAPHS`
are captured in as many steps, whatever sizes come: some 5 s of the 100 that those take."""


class GraphCache:
    """Steps by their size."""

    def __init__(self, capture: Capture | None) -> None:
        """Without `capture` all steps run eagerly."""
        self._capture = capture
        self._uses: dict[Hashable, int] = {}
        self._captured: dict[Hashable, Step] = {}
        self._runs = 0
        self._last: dict[Hashable, int] = {}
        """The run in which each graph was used last."""
        self._told = False

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, size: Hashable, step: Step) -> torch.Tensor:
        """The result of a step; all steps of a size must be the same function."""
        self._runs += 1
        replay = self._captured.get(size) or self._graph_of(size, step)
        if replay is None:
            return step()
        self._last[size] = self._runs
        return replay()

    def _graph_of(self, size: Hashable, step: Step) -> Step | None:
        """A new graph; None if it is not to be, or cannot be had."""
        uses = self._uses[size] = self._uses.get(size, 0) + 1
        if self._capture is None or uses <= EAGER_USES or not self._make_room():
            return None
        try:
            replay = self._captured[size] = self._capture(step)
        except Exception as error:  # whatever driver, torch and Triton raise
            if out_of_memory(error):
                self._uses[size] = -CALM_USES
                told = "no memory for the graph of a decode step: it runs without (%s)"
            else:
                self._capture = None
                told = "CUDA graphs cannot be captured (%s): decoding goes on without, slower"
            # Its words alone: the error would keep the graph that failed.
            log.warning(told, one_line(error))
            return None
        return replay

    def _make_room(self) -> bool:
        """Lets the graph go whose last use is the longest ago, if that is long enough. One that
        runs still may go: CUDA frees it when it is done."""
        if len(self._captured) < MOST_GRAPHS:
            return True
        oldest = min(self._last, key=self._last.__getitem__)
        if self._runs - self._last[oldest] > IDLE_RUNS:
            del self._captured[oldest], self._last[oldest]
            self._uses[oldest] = 0
            return True
        if not self._told:
            self._told = True
            log.warning(
                "%d CUDA graphs are in use, the most there may be: decode steps of other sizes run "
                "without, some milliseconds slower; a smaller NIGHTHERD_MAX_BATCH or --context has "
                "fewer sizes",
                len(self._captured),
            )
        return False

    def clear(self) -> None:
        self._captured.clear()
        self._last.clear()


def cuda_capture(device: torch.device) -> Capture:
    """Captures into graphs that share their memory: they never run at the same time, and what one
    leaves is read before the next."""
    pool: Any = None
    # Those in the pool: torch takes no further one into it when all have gone.
    graphs: weakref.WeakSet[Any] = weakref.WeakSet()
    abandoned: list[Any] = []

    def capture(step: Step) -> Step:
        nonlocal pool
        torch.cuda.synchronize(device)
        if not graphs:
            pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        failure: BaseException | None = None
        # A capture that fails at its end leaves its own stream as the current one: hence the outer
        # context. Other threads of the worker may use the card meanwhile.
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
            ):
                try:
                    result = step()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            # An end that fails too says only that something was wrong before.
            failure = failure or error
            if _abandon(device, pool):
                # torch's allocator of pinned memory goes on asking it whether it captures.
                abandoned.append(graph)
                graphs.clear()
        if failure is not None:
            try:
                raise failure
            finally:
                # Else it would hold itself, by its traceback, and with it the graph.
                failure = None
        graphs.add(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    return capture


def _abandon(device: torch.device, pool: Any) -> bool:
    """Ends what a failed capture has begun, as far as that can be; False if torch had done so.

    torch 2.11 does not where the driver refuses the end of a capture: its allocator goes on putting
    memory into the graphs' pool, frees nothing any more, and fails when its cache is to be emptied.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    release = getattr(torch._C, "_cuda_releasePool", None)
    if end is None or release is None:
        return True
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        end(index, pool)
    except RuntimeError:
        # Not recording: the capture had ended, and the graph's own end releases the pool.
        return False
    with contextlib.suppress(RuntimeError):
        release(index, pool)
    return True
