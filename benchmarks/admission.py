"""What admission costs and gains: the real scheduler, and nothing computed.

    .venv/bin/python benchmarks/admission.py

For caches of the size that a card has for the 8B shape: rows that are computed a second time,
because a sequence was preempted, and how many sequences decode at once. Tokens a second are
estimated from the rates of an H100 for both caches: they rank policies, no more.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nightherd.params import SamplingParams
from worker.engine.block_manager import BlockManager
from worker.engine.interface import EngineRequest
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence

BLOCK = 64
CARDS = {"H100": 7065, "H200": 14250}
"""Blocks of the KV cache, for Llama-3.1-8B in bfloat16: 8 MiB each."""
MATRIX_FLOPS, COPY_BYTES = 0.75 * 798e12, 3.0e12
"""An H100's, as measured, the first at what linears reach of it."""
_WEIGHTS, _KV_BYTES = 7.5e9, 131072
_GAPS = 1e-3

PARAMS = SamplingParams()


@dataclass(frozen=True, slots=True)
class Job:
    """Lengths of a job's prompts and outputs; the scheduler learns an output's when it ends."""

    prompts: list[int]
    outputs: list[int]
    limit: int
    """max_tokens of each request."""


@dataclass(frozen=True, slots=True)
class Run:
    """How a job went."""

    preemptions: int
    recomputed: float
    """Rows of prompts and outputs computed once more, over the rows of all prompts."""
    mean: float
    """Sequences that decode in a step."""
    most: int
    steps: int
    seconds: float
    tokens: int


def run(
    job: Job,
    blocks: int,
    *,
    max_sequences: int = 1024,
    budget: int = 8192,
    separate_prefill: bool = True,
) -> Run:
    """Runs all of a job through the scheduler; nothing is computed."""
    scheduler = Scheduler(
        BlockManager(blocks, BLOCK),
        max_sequences=max_sequences,
        budget=budget,
        separate_prefill=separate_prefill,
    )
    rng = random.Random(0)
    outputs: dict[Sequence, int] = {}
    for order, (prompt, output) in enumerate(zip(job.prompts, job.outputs, strict=True)):
        tokens = tuple(rng.randrange(1 << 30) for _ in range(prompt))
        sequence = Sequence(EngineRequest(tokens, PARAMS, (0,), job.limit), 0, order)
        outputs[sequence] = output
        scheduler.add(sequence)
    prefilled = steps = decoding = decoded = most = 0
    seconds = 0.0
    while not scheduler.idle:
        plan = scheduler.plan()
        if not plan.spans:
            raise SystemExit("nothing can run")
        scheduler.advance(plan)
        rows = context = 0
        ended = []
        for span in plan.spans:
            sequence = span.sequence
            if span.count == 1 and sequence.generated:
                rows, context = rows + 1, context + sequence.length
            else:
                prefilled += span.count
            if sequence.pending == 0:
                sequence.token_ids.append(0)
                if sequence.generated == outputs[sequence]:
                    ended.append(sequence)
        for sequence in ended:
            scheduler.record_length(sequence)
        scheduler.remove(ended)
        steps += 1
        decoding, decoded, most = decoding + (rows > 0), decoded + rows, max(most, rows)
        products = 2 * _WEIGHTS * plan.rows / MATRIX_FLOPS
        seconds += max(products, 2 * _WEIGHTS / COPY_BYTES) + context * _KV_BYTES / COPY_BYTES
        seconds += _GAPS
    wanted = sum(job.prompts)
    return Run(
        preemptions=scheduler.preemptions,
        recomputed=(prefilled - wanted) / wanted,
        mean=decoded / max(1, decoding),
        most=most,
        steps=steps,
        seconds=seconds,
        tokens=sum(job.outputs),
    )


def _job(count: int, limit: int, output: Callable[[random.Random, int], float]) -> Job:
    """Prompts of mixed lengths."""
    rng = random.Random(1)
    outputs = [min(limit, max(1, int(output(rng, index)))) for index in range(count)]
    return Job([rng.randint(64, 900) for _ in range(count)], outputs, limit)


JOBS: dict[str, Callable[[], Job]] = {
    "1,200 of 512/256, forced": lambda: Job([512] * 1200, [256] * 1200, 256),
    "6,000 mixed/256, forced": lambda: _job(6000, 256, lambda rng, index: 256),
    "6,000, log-normal, max 1,024": lambda: _job(
        6000, 1024, lambda rng, index: rng.lognormvariate(5, 0.8)
    ),
    "6,000, the same, max 8,192": lambda: _job(
        6000, 8192, lambda rng, index: rng.lognormvariate(5, 0.8)
    ),
    "6,000, 50 or (1 in 10) 1,000": lambda: _job(
        6000, 1024, lambda rng, index: 1000 if rng.random() < 0.1 else 50
    ),
    "6,000, 60, then 400": lambda: _job(6000, 1024, lambda rng, index: 60 if index < 3000 else 400),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--max-sequences", type=int, default=1024)
    given = parser.parse_args()
    print("| card, blocks | job | preemptions | rows recomputed | decode at once: mean, most "
          "| tokens/s, estimated |\n| --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for card, blocks in CARDS.items():
        for name, make in JOBS.items():
            made = run(make(), blocks, max_sequences=given.max_sequences)
            print(f"| {card}, {blocks:,} | {name} | {made.preemptions:,} | {made.recomputed:.1%} "
                  f"| {made.mean:.0f}, {made.most} | {made.tokens / made.seconds:,.0f} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
