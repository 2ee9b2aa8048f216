"""What all scripts of this folder share: options, models and engines on the card, the result."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
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


STOPPED = 3
"""The exit code of a script after which nothing is worth measuring."""


class Stopped(SystemExit):
    """The engine itself is wrong: no number of it would mean anything."""

    def __init__(self, why: str) -> None:
        super().__init__(STOPPED)
        self._why = why

    def __str__(self) -> str:
        return self._why


class Result(dict[str, Any]):
    """What a script finds, saved after every piece: a script that is ended has them on disk."""

    def __init__(self, file: Path, found: Mapping[str, Any]) -> None:
        super().__init__(found)
        self._file = file

    def save(self) -> None:
        write(self._file, self)

    def gather(self, name: str, pieces: Iterable[Any]) -> None:
        """A list, saved with each of its pieces."""
        found: list[Any] = []
        self[name] = found
        for piece in pieces:
            found.append(piece)
            self.save()


def write(file: Path, found: Mapping[str, Any]) -> None:
    """Replaces a file by JSON: whole, or it stays what it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(found))
    temporary.replace(file)


def out_folder() -> Path:
    return Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve()


def options(describe: str | None, dry: dict[str, Any], **defaults: Any) -> argparse.Namespace:
    """`--name value` for each default; `--dry` tries the script on a CPU, with the values of `dry`.

    Then kernels are their references in plain torch, and what is printed means nothing.
    """
    parser = argparse.ArgumentParser(description=(describe or "").partition("\n")[0])
    parser.add_argument("--name", default="", help="of the JSON file, if not the script's own")
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
    if device == "cpu":
        from worker.engine.cuda.kernels import reference

        return reference
    from worker.engine.cuda.kernel_selection import fused_kernels

    return fused_kernels()


def capture_of(device: str) -> Any:
    """Captures steps into graphs; on a CPU a graph is a call."""
    import torch

    if device == "cpu":
        return lambda step: step
    from worker.engine.cuda.graphs import cuda_capture

    return cuda_capture(torch.device(device))


def make_runner(model: Any, *, sequences: int, rows: int, context: int) -> Any:
    """A `CudaRunner` without a KV cache."""
    from worker.engine.cuda.cuda_runner import CudaRunner

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
    """An engine as a worker builds it on a card; stops where it is not the one for cards."""
    if model.device.type == "cpu":
        engine = _dry_engine(model, sequences, budget, context)
    else:
        engine = _card_engine(model, sequences, budget, context, more)
    say(f"engine: {engine.name}")
    require_cuda(engine.name)
    return engine


def require_cuda(name: str) -> None:
    if name != "cuda":
        raise Stopped(f"the engine is '{name}', not 'cuda': the warnings say why")


def facts(engine: Any) -> dict[str, Any]:
    """An engine's state, which each result tells; read before it stops, which frees its graphs."""
    runner = engine._runner
    return {
        "engine": engine.name,
        "num_blocks": runner.num_blocks,
        "preemptions": engine.scheduler.preemptions,
        "graphs": len(runner._graphs),
        "lacks": sorted(runner._kernels.missing),
    }


def _card_engine(
    model: Any, sequences: int, budget: int, context: int, more: dict[str, Any]
) -> Any:
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
    scheduler = Scheduler(manager, max_sequences=sequences, budget=budget, separate_prefill=True)
    return BatchEngine(runner, scheduler, context)


def run_requests(engine: Any, requests: list[dict[str, Any]], **params: Any) -> float:
    """Seconds for requests of `prompt`, `out` and perhaps `samples`, at forced lengths."""
    from nightherd.params import SamplingParams
    from worker.engine.interface import EngineRequest

    sampling = SamplingParams(**{"temperature": 0.0, **params})
    started = time.monotonic()
    handles = [
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
    for handle in handles:
        for future in handle.futures:
            output = future.result()
            if output.finish_reason != "length":
                raise SystemExit(f"{output.finish_reason}: {output.error_message}")
    return time.monotonic() - started


def prompts(count: int, length: int, vocab: int, seed: int = 1) -> list[list[int]]:
    import random

    rng = random.Random(seed)
    return [rng.choices(range(3, vocab), k=length) for _ in range(count)]


def tokens_of(engine: Any, texts: list[list[int]], out: int) -> list[list[int]]:
    """The engine's greedy tokens after each text."""
    from nightherd.params import SamplingParams
    from worker.engine.interface import EngineRequest

    handles = [
        engine.add(EngineRequest(tuple(text), SamplingParams(temperature=0.0), (0,), out))
        for text in texts
    ]
    outputs = [handle.futures[0].result() for handle in handles]
    for output in outputs:
        if output.finish_reason != "length":
            raise SystemExit(f"{output.finish_reason}: {output.error_message}")
    return [list(output.token_ids) for output in outputs]


def transformers_tokens(model: Any, texts: list[list[int]], out: int) -> list[list[int]]:
    """The greedy tokens of transformers' own `generate`, text by text."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    wanted = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([text], device=model.device)
            made = model.generate(ids, do_sample=False, max_new_tokens=out, eos_token_id=None,
                                  attention_mask=torch.ones_like(ids), pad_token_id=0)  # fmt: skip
            wanted.append(made[0, len(text) :].tolist())
    return wanted


def equal_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of equal tokens, of all texts."""
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


class _Warnings(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


@contextmanager
def _engine_logs(warnings: list[str]) -> Iterator[None]:
    """Prints what the engine logs, from INFO on, and adds its warnings to `warnings`."""
    logger, shown = logging.getLogger("nightherd.engine"), logging.StreamHandler(sys.stdout)
    shown.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    before = logger.level
    logger.setLevel(logging.INFO)
    handlers = (shown, _Warnings(warnings))
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(before)
        for handler in handlers:
            logger.removeHandler(handler)


@contextmanager
def result(name: str, given: argparse.Namespace) -> Iterator[Result]:
    """A dict to fill and to save. At the end, also after a failure, it is saved and printed as the
    last line."""
    import torch

    started = time.monotonic()
    made = Result(
        out_folder() / f"{given.name or name}.json",
        {
            "script": name,
            "options": vars(given),
            "torch": torch.__version__,
            # Importing it takes seconds, and not all scripts need it.
            "transformers": version("transformers"),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "warnings": [],
        },
    )
    if torch.cuda.is_available():
        made |= {"card": torch.cuda.get_device_name(), "triton": version("triton")}
    try:
        with _engine_logs(made["warnings"]):
            yield made
    except BaseException as error:
        made["failed"] = f"{type(error).__name__}: {error}"
        if isinstance(error, Stopped):
            made["stopped"] = str(error)
            say(f"STOP: {error}")
        raise
    finally:
        made["seconds"] = time.monotonic() - started
        if torch.cuda.is_available():
            made["peak_bytes"] = int(torch.cuda.max_memory_reserved())
        made.save()
        say(json.dumps(made))


def say(line: str) -> None:
    print(line, flush=True)
