"""What was measured: a table for people, then one line of JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import levels
import processes
from card import least_seconds, linear_flops
from runner import OURS, PEER_NAMES, WORKER
from shapes import Shape
from workloads import Request


@dataclass(slots=True)
class Measured:
    """What is known until now; it can be reported at any time after the first of `limits`."""

    limits: list[dict[str, Any]] = field(default_factory=list)
    """What the machine could do, before each round."""
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of each engine that was measured at least once."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why an engine was not measured, or not in all rounds."""
    stopped: str | None = None
    """What ended it all before the last round."""


def report(
    given: argparse.Namespace,
    shape: Shape,
    requests: list[Request],
    measured: Measured,
) -> None:
    """Prints the table and the line of JSON."""
    runs, rates = measured.runs, measured.limits
    tokens = sum(request["out"] for request in requests)
    best_rates = max(rates, key=lambda rate: rate["matrix_flops"])
    matrix_flops = best_rates["matrix_flops"]
    if "copy_bytes_per_second" in best_rates:
        itemsize = 2 if given.dtype == "bf16" else 4
        ceiling = tokens / least_seconds(given.workload, shape, requests, best_rates, itemsize)
    else:
        ceiling = tokens * matrix_flops / linear_flops(given.workload, shape, requests)
    speeds = {
        name: statistics.median(run["tokens_per_second"] for run in of) for name, of in runs.items()
    }
    peers = {name: speed for name, speed in speeds.items() if name in PEER_NAMES}
    best = max(peers, key=peers.__getitem__, default=None)
    ours = speeds.get(OURS)
    level = given.level or levels.of_this_cpu()
    # The best of a moment is not what a virtual machine keeps up.
    kept = [rate["sustained_flops"] for rate in rates if "sustained_flops" in rate]
    sustained = statistics.mean(kept) if kept else None
    what = f"{given.shape} {given.workload} {given.dtype} {given.device}"
    print(
        f"{what}, {len(requests)} requests, {tokens:,} tokens, {given.threads} threads, "
        f"level {level}; ceiling {ceiling:,.0f} tokens/s at {matrix_flops / 1e9:,.0f} GFLOP/s in "
        f"{best_rates['matrix_dtype']}"
        + (f" ({sustained / 1e9:,.0f} over some seconds)" if sustained else "")
        + "".join(
            f" and a copy of {rate / 1e9:,.0f} GB/s"
            for name, rate in best_rates.items()
            if name == "copy_bytes_per_second"
        )
    )
    for line in _table(runs, speeds, best, ceiling):
        print(line)
    for name, why in measured.left_out.items():
        when = f" after {len(runs[name])} of {given.rounds} rounds" if name in runs else ""
        print(f"left out{when}: {name}, {why}")
    if measured.stopped is not None:
        print(f"not all was measured: {measured.stopped}")
    noisy = sum(run["others_cpu"] > processes.QUIET for of in runs.values() for run in of)
    if noisy:
        print(f"{noisy} runs were disturbed by other processes: measure again")
    summary = {
        "shape": given.shape,
        "workload": given.workload,
        "requests": len(requests),
        "tokens": tokens,
        "dtype": given.dtype,
        "device": given.device,
        "cpu": levels.model_name(),
        "level": level,
        "threads": given.threads,
        "kv_gib": given.kv_memory,
        "sampling": {name: getattr(given, name) for name in ("temperature", "top_p", "top_k")},
        "json_schema": given.json_schema,
        "tokens_per_second": speeds,
        "best_peer": best,
        "ratio_to_best_peer": None if best is None or ours is None else ours / peers[best],
        "ratio_by_round": _ratios(runs, best),
        "ratio_to_each": {name: ours / speed for name, speed in peers.items() if ours is not None},
        "worker_to_engine": _ratios(runs, OURS, of=WORKER),
        "ceiling": ceiling,
        "matrix_dtype": best_rates["matrix_dtype"],
        "share_of_ceiling": None if ours is None else ours / ceiling,
        "share_of_sustained": None
        if ours is None or sustained is None
        else ours / ceiling * matrix_flops / sustained,
        "limits": rates,
        "random_weights": given.random,
        "disturbed_runs": noisy,
        "left_out": measured.left_out,
        "stopped": measured.stopped,
        "runs": runs,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    print(json.dumps(summary))


def _ratios(
    runs: dict[str, list[dict[str, Any]]], to: str | None, *, of: str = OURS
) -> list[float]:
    """One engine over another, round by round; nothing where one was not measured."""
    if to not in runs or of not in runs:
        return []
    pairs = zip(runs[of], runs[to], strict=False)
    return [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]


def _table(
    runs: dict[str, list[dict[str, Any]]],
    speeds: dict[str, float],
    best: str | None,
    ceiling: float,
) -> Iterator[str]:
    yield (
        f"{'engine':<16}{'tokens/s':>10}{'lowest':>9}{'highest':>9}"
        f"{'of best peer':>14}{'of ceiling':>12}{'peak MB':>9}{'load s':>8}"
    )
    for name in sorted(runs, key=speeds.__getitem__, reverse=True):
        of, speed = runs[name], speeds[name]
        each = [run["tokens_per_second"] for run in of]
        share = "-" if best is None else f"{speed / speeds[best]:.2f}"
        peak = max(run.get("peak_device_bytes", run["peak_bytes"]) for run in of) / 1e6
        load = statistics.median(run["load_seconds"] for run in of)
        yield (
            f"{name:<16}{speed:>10,.0f}{min(each):>9,.0f}{max(each):>9,.0f}"
            f"{share:>14}{speed / ceiling:>12.0%}{peak:>9,.0f}{load:>8.1f}"
        )
