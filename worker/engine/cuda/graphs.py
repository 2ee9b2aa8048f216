"""CUDA graphs of whole decode steps: one launch instead of hundreds.

The first steps of each size run eagerly, which compiles their kernels; then the step is captured,
and replayed from then on. What it reads and writes lies at fixed addresses.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch

from worker.engine.validation import one_line, out_of_memory

log = logging.getLogger("nightherd.engine")

Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], Step]
"""Captures a step. The function that it returns replays it, into the same result tensor."""

EAGER_USES = 2
"""Times that a step of a size runs eagerly before it is captured."""

RETRY_USES = 1000
"""Where there was no memory for a graph: eager runs of its step until it is captured again."""

GRAPH_BYTES = 4 << 20
"""Set aside on the card for a graph itself: an 8B model's has some 340 kernels, each with 12 KiB.
Reckoned, not measured."""

MAX_GRAPHS = 128
"""Most graphs that are kept: as many as `memory.py` sets memory aside for. Twenty batch sizes up to
512, at three lengths of context, with and without the sampling kernel."""

IDLE_RUNS = 4000
"""Steps without a graph after which it may be evicted for another. So no more than `MAX_GRAPHS`
are captured in as many steps, whatever sizes come: some 5 s of the 100 that those take."""


class GraphCache:
    """The captured steps, by their size."""

    def __init__(self, capture: Capture | None) -> None:
        """Without `capture` all steps run eagerly."""
        self._capture = capture
        self._uses: dict[Hashable, int] = {}
        self._captured: dict[Hashable, Step] = {}
        self._runs = 0
        self._last_run: dict[Hashable, int] = {}
        """The number of the run in which each graph was used last."""
        self._warned = False

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, size: Hashable, step: Step) -> torch.Tensor:
        """The result of a step; all steps of a size must be the same function."""
        self._runs += 1
        replay = self._captured.get(size) or self._capture_if_due(size, step)
        if replay is None:
            return step()
        self._last_run[size] = self._runs
        return replay()

    def _capture_if_due(self, size: Hashable, step: Step) -> Step | None:
        """A new graph; None where the step runs eagerly: too few uses yet, no room, a failure."""
        uses = self._uses[size] = self._uses.get(size, 0) + 1
        if self._capture is None or uses <= EAGER_USES or not self._evict_if_full():
            return None
        try:
            replay = self._captured[size] = self._capture(step)
        except Exception as error:  # whatever driver, torch and Triton raise
            if out_of_memory(error):
                self._uses[size] = -RETRY_USES
                warning = "no memory for the graph of a decode step: it runs without (%s)"
            else:
                self._capture = None
                warning = "CUDA graphs cannot be captured (%s): decoding goes on without, slower"
            # Its text alone: the error itself would keep the failed graph in memory.
            log.warning(warning, one_line(error))
            return None
        return replay

    def _evict_if_full(self) -> bool:
        """Whether there is room for one more graph: the least recently used one is evicted if it is
        idle. It may still be running: CUDA frees it when it is done."""
        if len(self._captured) < MAX_GRAPHS:
            return True
        oldest = min(self._last_run, key=self._last_run.__getitem__)
        if self._runs - self._last_run[oldest] > IDLE_RUNS:
            del self._captured[oldest], self._last_run[oldest]
            self._uses[oldest] = 0
            return True
        if not self._warned:
            self._warned = True
            log.warning(
                "%d CUDA graphs are in use, the most there may be: decode steps of other sizes run "
                "without, some milliseconds slower; a smaller NIGHTHERD_MAX_BATCH or --context has "
                "fewer sizes",
                len(self._captured),
            )
        return False

    def clear(self) -> None:
        self._captured.clear()
        self._last_run.clear()


def cuda_capture(device: torch.device) -> Capture:
    """Captures into graphs that share their memory: they never run at the same time, and the result
    of one is read before the next."""
    pool: Any = None
    # The graphs in the pool: once all are freed, torch captures no further one into it.
    graphs: weakref.WeakSet[Any] = weakref.WeakSet()
    failed: list[Any] = []

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
            # If the end of the capture fails too, its error says only that one came before.
            failure = failure or error
            if _abandon(device, pool):
                # Never freed: torch's allocator of pinned memory goes on asking it whether it
                # captures.
                failed.append(graph)
                graphs.clear()
        if failure is not None:
            try:
                raise failure
            finally:
                # Else the error would hold itself, by its traceback, and so the graph.
                failure = None
        graphs.add(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    return capture


def _abandon(device: torch.device, pool: Any) -> bool:
    """Ends what a failed capture has begun, as far as possible; False if torch had done so.

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
