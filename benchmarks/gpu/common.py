"""What all scripts of this folder share: options, models and engines on the card, the result."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "benchmarks")) if path not in sys.path]

from card import (  # noqa: E402
    breakdown,
    has_card,
    least_seconds,
    limits,
    milliseconds,
    profiled,
    synchronize,
)
from shapes import SHAPES, random_model  # noqa: E402

__all__ = [
    "SHAPES",
    "breakdown",
    "least_seconds",
    "limits",
    "milliseconds",
    "profiled",
    "random_model",
    "synchronize",
]


def options(describe: str | None, dry: dict[str, Any], **defaults: Any) -> argparse.Namespace:
    """`--name value` for each default; `--dry` tries the script on a CPU, with the values of `dry`.

    Then kernels are their references in plain torch, and what is printed means nothing.
    """
    parser = argparse.ArgumentParser(description=(describe or "").partition("\n")[0])
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--dry", action="store_true", help="no card: try the script, tiny")
    parser.set_defaults(device="cuda")
    given = parser.parse_args()
    if given.dry:
        vars(given).update({"shape": "T", **dry, "device": "cpu"})
    elif not has_card():
        raise SystemExit("no card here; --dry tries the script on a CPU")
    return given


def kernels_of(device: str) -> Any:
    """The Triton kernels, or on a CPU their references."""
    import torch

    if device == "cpu":
        from worker.engine.triton_kernels import reference

        return reference
    from worker.engine.cuda_model import kernels_for

    return kernels_for(torch.device(device))


def capture_of(device: str) -> Any:
    """Captures steps into graphs; on a CPU a graph is a call."""
    import torch

    if device == "cpu":
        return lambda step: step
    from worker.engine.cuda_graphs import cuda_capture

    return cuda_capture(torch.device(device))


def make_runner(model: Any, *, sequences: int, rows: int, context: int) -> Any:
    """A `CudaRunner` without a KV cache."""
    from worker.engine.cuda_runner import CudaRunner

    device = model.device.type
    return CudaRunner(
        model,
        kernels=kernels_of(device),
        vocab_size=model.config.vocab_size,
        max_sequences=sequences,
        max_rows=rows,
        context=context,
        capture=capture_of(device),
    )


def make_engine(model: Any, *, sequences: int, budget: int, context: int, **more: Any) -> Any:
    """An engine as a worker builds it on a card."""
    if model.device.type == "cpu":
        return _dry_engine(model, sequences, budget, context)
    import torch

    from worker.engine.build import EngineOptions, build_engine

    return build_engine(
        model,
        vocab_size=model.config.vocab_size,
        context_length=context,
        device=model.device,
        available=int(torch.cuda.mem_get_info(model.device)[0]),
        library_folder=ROOT / "build" / "kernels",
        options=EngineOptions(max_batch=sequences, budget=budget, **more),
    )


def _dry_engine(model: Any, sequences: int, budget: int, context: int) -> Any:
    from worker.engine.block_manager import BlockManager
    from worker.engine.engine import BatchEngine
    from worker.engine.scheduler import Scheduler

    runner = make_runner(model, sequences=sequences, rows=budget, context=context)
    runner.make_cache(sequences * -(-context // runner.block_size))
    manager = BlockManager(runner.num_blocks, runner.block_size)
    scheduler = Scheduler(manager, max_sequences=sequences, budget=budget, apart=True)
    return BatchEngine(runner, scheduler, context)


def run_requests(engine: Any, requests: list[dict[str, Any]], **params: Any) -> float:
    """Seconds for requests of `prompt`, `out` and perhaps `samples`, at forced lengths."""
    from nightherd.params import SamplingParams
    from worker.engine.interface import EngineRequest

    sampling = SamplingParams(**{"temperature": 0.0, **params})
    started = time.monotonic()
    generations = [
        engine.add(
            EngineRequest(
                prompt_token_ids=tuple(request["prompt"]),
                params=sampling,
                seeds=tuple(range(request.get("samples", 1))),
                max_new_tokens=request["out"],
            )
        )
        for request in requests
    ]
    for generation in generations:
        for future in generation.futures:
            output = future.result()
            if output.finish_reason != "length":
                raise SystemExit(f"{output.finish_reason}: {output.error_message}")
    return time.monotonic() - started


def prompts(count: int, length: int, vocab: int, seed: int = 1) -> list[list[int]]:
    import random

    rng = random.Random(seed)
    return [rng.choices(range(3, vocab), k=length) for _ in range(count)]


@contextmanager
def result(name: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A dict to fill; printed as the last line and written to $OUT, also after a failure."""
    import torch
    import transformers

    made: dict[str, Any] = {
        "script": name,
        "options": vars(given),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if torch.cuda.is_available():
        import triton

        made |= {"card": torch.cuda.get_device_name(), "triton": triton.__version__}
    try:
        yield made
    except BaseException as error:
        made["failed"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        if torch.cuda.is_available():
            made["peak_bytes"] = int(torch.cuda.max_memory_reserved())
        folder = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
        folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(made)
        (folder / f"{name}.json").write_text(line)
        print(line, flush=True)


def say(line: str) -> None:
    print(line, flush=True)
