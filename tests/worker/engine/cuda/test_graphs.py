"""Which steps become CUDA graphs, and what a capture leaves behind when it fails."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.checkpoints import tiny_llama
from tests.worker.engine.cuda.test_cuda_runner import runner_of
from worker.engine.cuda import graphs as cuda_graphs
from worker.engine.cuda import memory
from worker.engine.cuda.graphs import EAGER_USES, GraphCache, Step
from worker.engine.validation import out_of_memory


def step() -> torch.Tensor:
    return torch.ones(1)


def accelerator_error(code: int, text: str) -> Exception:
    """As torch raises it for what the CUDA runtime says."""
    error = torch.AcceleratorError(
        f"CUDA error: {text}\nCUDA kernel errors might be reported later"
    )
    error.error_code = code
    return error


NO_MEMORY: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: accelerator_error(2, "out of memory"),
    lambda: torch.AcceleratorError("CUDA error: out of memory\nSearch for it in the docs"),
    lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
]


def test_graphs_are_captured_once_a_size_comes_again() -> None:
    calls: list[str] = []

    def step() -> torch.Tensor:
        calls.append("step")
        return torch.zeros(1)

    def capture(given: Step) -> Step:
        calls.append("capture")
        return lambda: given()

    graphs = GraphCache(capture)
    for _ in range(EAGER_USES + 3):
        graphs.run(4, step)
    graphs.run(8, step)
    assert calls == ["step"] * EAGER_USES + ["capture"] + ["step"] * 4
    assert len(graphs) == 1


# Where a graph cannot be had.


@pytest.mark.parametrize("lack", NO_MEMORY)
def test_a_lack_of_memory_costs_one_graph_for_a_while(
    lack: Callable[[], Exception],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, "RETRY_USES", 5)
    lacking = [True]

    def capture(step: Step) -> Step:
        if lacking:
            lacking.pop()
            raise lack()
        return step

    graphs = GraphCache(capture)
    with caplog.at_level(logging.WARNING, "nightherd.engine"):
        for use in range(EAGER_USES + 1 + 5 + EAGER_USES + 1):
            assert len(graphs) == 0, use
            assert graphs.run(4, step) == 1
    assert len(graphs) == 1
    assert len(caplog.records) == 1


def test_a_graph_that_failed_is_gone_before_its_step_runs() -> None:
    """It holds the memory that was lacking."""
    failed: list[weakref.ref[Any]] = []

    class Graph:
        pass

    def capture(step: Step) -> Step:
        graph = Graph()
        failed.append(weakref.ref(graph))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def step() -> torch.Tensor:
        assert not any(graph() for graph in failed)
        return torch.ones(1)

    graphs = GraphCache(capture)
    for _ in range(EAGER_USES + 1):
        graphs.run(4, step)
    assert len(failed) == 1


def test_without_graphs_steps_run_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    def capture(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = GraphCache(capture)
    with caplog.at_level(logging.WARNING, "nightherd.engine"):
        for size in (1, 2):
            for _ in range(EAGER_USES + 2):
                assert graphs.run(size, step) == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("lack", [*NO_MEMORY, lambda: RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_a_lack_of_memory_is_known_however_it_is_said(lack: Callable[[], Exception]) -> None:
    assert out_of_memory(lack())


def test_an_error_that_stays_is_no_lack_of_memory() -> None:
    assert not out_of_memory(accelerator_error(700, "an illegal memory access was encountered"))
    assert not out_of_memory(accelerator_error(719, "unspecified launch failure: out of memory"))
    assert not out_of_memory(RuntimeError("the size of tensor a (3) must match"))


def test_an_error_that_stays_loses_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the step itself said: a lack of memory alone is tried again."""
    runner = runner_of(tiny_llama())
    stays = [accelerator_error(700, "an illegal memory access was encountered")]

    def synchronize(device: torch.device) -> None:
        if stays:
            raise stays[0]

    monkeypatch.setattr(runner, "_on_card", True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert runner.lost()
    stays.clear()
    assert not runner.lost()


# How many there are.


def captures(graphs: GraphCache, sizes: Iterator[int] | range) -> int:
    """Of steps of these sizes, one after the other."""
    before = counted["captures"]
    for size in sizes:
        assert graphs.run(size, step) == 1
    return counted["captures"] - before


counted: Counter[str] = Counter()


def counting(step: Step) -> Step:
    counted["captures"] += 1
    return step


def test_only_so_many_graphs_are_kept(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 3, raising=False)
    monkeypatch.setattr(cuda_graphs, "IDLE_RUNS", 20, raising=False)
    graphs = GraphCache(counting)
    with caplog.at_level(logging.WARNING, "nightherd.engine"):
        # More sizes than there is room for, in turn: those that came first keep their graphs.
        assert captures(graphs, (size for _ in range(50) for size in range(5))) == 3
        assert len(graphs) == 3
        assert len(caplog.records) == 1
        assert "slower" in caplog.text
        assert "NIGHTHERD_MAX_BATCH" in caplog.text
        # Others for good: they take over from those that are idle, the one idle longest first.
        assert captures(graphs, (size for _ in range(9) for size in (0, 1))) == 0
        assert captures(graphs, (size for _ in range(9) for size in (7, 0, 1))) == 1
        assert captures(graphs, iter((0, 1, 7))) == 0
        assert captures(graphs, iter((2,))) == 0, "its graph has gone, and none is idle"
        assert captures(graphs, (2 for _ in range(40))) == 1
        assert len(graphs) == 3
    assert len(caplog.records) == 1


def test_as_many_graphs_as_have_memory_set_aside() -> None:
    assert memory._GRAPHS_BYTES == cuda_graphs.MAX_GRAPHS * cuda_graphs.GRAPH_BYTES == 512 << 20


# What a capture leaves behind.


class Card:
    """What torch's allocator knows of its pools."""

    def __init__(self) -> None:
        self.recording: list[int] = []
        self.users: Counter[int] = Counter()
        self.pools: list[int] = []
        """In the order in which graphs were captured into them."""
        self.current = "the engine's"
        self.fails: str | None = None
        """At which point the next capture does."""

    def end(self, index: int, pool: int) -> None:
        assert index == 0
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, index: int, pool: int) -> None:
        assert index == 0
        self.users[pool] -= 1
        assert self.users[pool] >= 0

    def destroyed(self, state: dict[str, int]) -> None:
        if "ended" in state:
            self.release(0, state["ended"])


class Graph:
    """As `CUDAGraph`, whose destructor lets go of the pool if the capture had ended in order."""

    def __init__(self, card: Card) -> None:
        self.state: dict[str, int] = {}
        weakref.finalize(self, card.destroyed, self.state)

    def replay(self) -> None:
        pass


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    handles = iter(range(9))

    @contextlib.contextmanager
    def stream(wanted: str) -> Iterator[None]:
        before, card.current = card.current, wanted
        try:
            yield
        finally:
            card.current = before

    @contextlib.contextmanager
    def graph(graph: Graph, *, pool: int, capture_error_mode: str) -> Iterator[None]:
        assert not card.recording, "a capture is under way"
        assert pool not in card.users or card.users[pool], "the pool has lost its graphs"
        card.users[pool] += 1
        card.recording.append(pool)
        card.pools.append(pool)
        before, card.current = card.current, "the capture's"
        try:
            yield
        finally:
            fails, card.fails = card.fails, None
            if fails == "end":
                raise RuntimeError("operation failed due to a previous error during capture")
            card.end(0, pool)
            graph.state["ended"] = pool
            if fails == "instantiation":
                raise accelerator_error(2, "out of memory")
        card.current = before

    for name, fake in {
        "graph_pool_handle": handles.__next__,
        "synchronize": lambda device: None,
        "CUDAGraph": lambda: Graph(card),
        "current_stream": lambda device: card.current,
        "current_device": lambda: 0,
        "stream": stream,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", card.end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", card.release)
    return card


def capture_on(name: str = "cuda:0") -> cuda_graphs.Capture:
    return cuda_graphs.cuda_capture(torch.device(name))


def interrupted() -> torch.Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("device", ["cuda:0", "cuda"])
@pytest.mark.parametrize(
    ("given", "error"), [(step, RuntimeError), (interrupted, KeyboardInterrupt)]
)
def test_a_failed_end_leaves_neither_stream_nor_pool_behind(
    given: Step, error: type[BaseException], device: str, card: Card
) -> None:
    """torch leaves the capture's stream current, and the allocator frees nothing while it records:
    a later `empty_cache` would assert."""
    capture = capture_on(device)
    for _ in range(2):
        card.fails = "end"
        with pytest.raises(error):
            capture(given)
        gc.collect()
        assert card.current == "the engine's"
        assert card.recording == []
        assert not +card.users
    kept = capture(step)
    assert kept() == 1
    assert card.pools == [0, 1, 2]


def test_the_end_of_a_capture_does_not_hide_that_memory_was_lacking(card: Card) -> None:
    lacking = [torch.OutOfMemoryError("CUDA out of memory")]

    def step() -> torch.Tensor:
        if lacking and card.recording:
            card.fails = "end"
            raise lacking.pop()
        return torch.ones(1)

    graphs = GraphCache(capture_on())
    for size in (4, 8):
        for _ in range(EAGER_USES + 1):
            graphs.run(size, step)
    assert len(graphs) == 1, "the next size has its graph"
    assert card.pools == [0, 1]


def test_an_interrupted_capture_that_ends_leaves_nothing_behind(card: Card) -> None:
    with pytest.raises(KeyboardInterrupt):
        capture_on()(interrupted)
    gc.collect()
    assert (card.recording, card.current) == ([], "the engine's")
    assert not +card.users


def test_a_failed_instantiation_is_cleaned_up_by_the_graph_alone(card: Card) -> None:
    capture = capture_on()
    kept = capture(step)
    card.fails = "instantiation"
    with pytest.raises(torch.AcceleratorError):
        capture(step)
    gc.collect()
    assert card.recording == []
    assert card.users == {0: 1}
    more = capture(step)
    assert card.pools == [0, 0, 0], "graphs go on to share their memory"
    assert kept() == more() == 1


def test_a_failed_end_harms_no_other_graph(card: Card) -> None:
    capture = capture_on()
    kept = capture(step)
    card.fails = "end"
    with pytest.raises(RuntimeError, match="previous error"):
        capture(step)
    assert card.recording == []
    assert card.users == {0: 1}
    more = capture(step)
    assert kept() == more() == 1
    assert card.pools == [0, 0, 1]


def test_a_pool_whose_graphs_have_gone_is_not_used_again(card: Card) -> None:
    """torch asserts there: so did the first graph after all had been dropped."""
    graphs = GraphCache(capture_on())
    for _ in range(2):
        for size in (1, 2):
            for _ in range(EAGER_USES + 1):
                graphs.run(size, step)
        assert len(graphs) == 2
        graphs.clear()
        gc.collect()
    assert card.pools == [0, 0, 1, 1]
    assert not +card.users


def test_a_torch_without_these_functions_goes_on(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    capture = capture_on()
    card.fails = "end"
    with pytest.raises(RuntimeError, match="previous error"):
        capture(step)
    card.recording.clear()
    capture(step)
    assert card.pools == [0, 1]
