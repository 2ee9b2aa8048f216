"""What a card could do at most, how long work takes on it, and where the time of an engine goes.

On a CPU the same functions run, so that what uses them can be tried there.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shapes import Shape
from workloads import Request, shared_tokens

PARTS = ("linears", "attention", "sampling", "rest")
_KINDS = (
    ("sampling", r"^_(sample|top_k|mask)|argmax|topk|sort|multinomial|philox|distribution"),
    ("attention", r"^_(decode|merge|attend)|flash|fmha|attention|sdpa|varlen|softmax"),
    ("linears", r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitk|addmm|\bmm\b|matmul|linear"),
)
"""Of a kernel's name, or of an operation's on a CPU; what fits none is `rest`."""


def has_card() -> bool:
    import torch

    return torch.cuda.is_available()


def synchronize() -> None:
    import torch

    if has_card():
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], object], repeats: int = 20, calls: int = 1) -> float:
    """The median time of work once it is warm, on a card between events.

    With several `calls` it is there that of one of so many in a graph: launches from Python take
    longer than small kernels do.
    """
    import torch

    for _ in range(3):
        work()
    if calls > 1 and has_card():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        work = graph.replay
        work()
    else:
        calls = 1
    times = []
    for _ in range(repeats):
        if has_card():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            work()
            times.append((time.perf_counter() - started) * 1e3)
    return float(statistics.median(times)) / calls


def limits() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and FLOP a second of a bf16 product."""
    import torch

    device, size, width = ("cuda", 2**32, 8192) if has_card() else ("cpu", 2**22, 256)
    memory = torch.empty(2, size, dtype=torch.uint8, device=device).random_()
    copied = milliseconds(lambda: memory[0].copy_(memory[1]))
    left, right = torch.randn(2, width, width, device=device).bfloat16()
    product = milliseconds(lambda: left @ right)
    return {
        "copy_bytes_per_second": 2 * size / copied * 1e3,
        "matrix_flops": 2 * width**3 / product * 1e3,
    }


def linear_flops(name: str, shape: Shape, requests: Sequence[Request]) -> int:
    """FLOP of all matrices for a workload; a shared prefix and each last token are spared."""
    rows = sum(len(request["prompt"]) + request["out"] - 1 for request in requests)
    outputs = sum(request["out"] for request in requests)
    rows -= shared_tokens(name, requests)
    return int(2 * (rows * shape.layer_weights + outputs * shape.output_weights))


def least_seconds(
    name: str, shape: Shape, requests: Sequence[Request], rates: dict[str, float], itemsize: int = 2
) -> float:
    """The serial floor of a workload: its matrix products, then its reads of the KV cache.

    Beyond about 190 rows the reads of the weights hide behind the products. What many requests
    have in common is read once a step.
    """
    flops = linear_flops(name, shape, requests)
    read = sum(
        request["out"] * (len(request["prompt"]) + request["out"] / 2) for request in requests
    )
    mean = statistics.mean(request["out"] for request in requests)
    read -= shared_tokens(name, requests) * mean
    # A copy reads and writes: its rate is that of bytes moved.
    seconds = read * shape.kv_bytes_per_token(itemsize) / rates["copy_bytes_per_second"]
    return float(flops / rates["matrix_flops"] + seconds)


def part_of(kernel: str) -> str:
    """Which of `PARTS` a kernel belongs to."""
    for part, pattern in _KINDS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return part
    return "rest"


def parts(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Shares of the time of (kernel, time), by part."""
    spent = dict.fromkeys(PARTS, 0.0)
    for kernel, took in kernels:
        spent[part_of(kernel)] += took
    total = sum(spent.values()) or 1.0
    return {part: took / total for part, took in spent.items()}


@contextmanager
def profiled() -> Iterator[dict[str, Any]]:
    """Afterwards the dict has `parts`, `busy` (kernels' time over the clock's) and the `longest`
    kernels with their seconds, of all threads' work on the card."""
    from torch.profiler import ProfilerActivity, profile

    made: dict[str, Any] = {}
    synchronize()
    with profile(
        activities=[ProfilerActivity.CUDA if has_card() else ProfilerActivity.CPU]
    ) as seen:
        started = time.perf_counter()
        yield made
        synchronize()
        took = time.perf_counter() - started
    kernels = [(event.key, _microseconds(event) / 1e6) for event in seen.key_averages()]
    kernels.sort(key=lambda kernel: -kernel[1])
    made |= {
        "parts": parts(kernels),
        "busy": sum(seconds for _, seconds in kernels) / took,
        "longest": [(name[:80], seconds) for name, seconds in kernels[:12]],
    }


def _microseconds(event: Any) -> float:
    return float(event.self_device_time_total if has_card() else event.self_cpu_time_total)


def breakdown(made: dict[str, Any]) -> str:
    """One line of `profiled`."""
    shares = ", ".join(f"{part} {share:.0%}" for part, share in made["parts"].items())
    return f"{shares}; kernels run {made['busy']:.0%} of the time"
