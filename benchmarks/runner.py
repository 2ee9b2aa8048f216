"""Runs drivers one by one, each in its environment, on a quiet machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import levels
import processes
from shapes import CONTEXT, Shape
from workloads import Request, as_text, warm_up

ROOT = Path(__file__).resolve().parents[1]
DRIVERS = Path(__file__).resolve().parent / "peers"
PEERS = ROOT / "build" / "peers"
OURS, WORKER = "nightherd", "nightherd-worker"
PEER_NAMES = ("vllm", "openvino", "transformers", "transformers-cb")
ENGINES = (OURS, WORKER, *PEER_NAMES)
OWN_ENVIRONMENT = ("vllm", "openvino")
NO_TORCH = ("openvino",)
"""Nor anything else that can be held to a CPU level."""
DTYPES = {"bf16": "bfloat16", "float32": "float32"}
LEAST_LIMIT = 60.0
"""Seconds that every engine gets, however fast another one was: it may have to compile first."""
_GIB = 1 << 30

SCHEMA = {
    "type": "array",
    "minItems": 400,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 40}, "score": {"type": "integer"}},
        "required": ["name", "score"],
        "additionalProperties": False,
    },
}
"""Nothing gets to the end of it, so that outputs keep their lengths."""


class LeftOut(Exception):
    """Why an engine cannot be measured; the others can."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def time_limit(most: float, slowest: float, fastest: float | None) -> float:
    """Seconds for a run: `most`, or `slowest` times what the `fastest` run until now took."""
    if fastest is None:
        return most
    return min(most, max(LEAST_LIMIT, slowest * fastest))


class Runner:
    """Has a task for drivers; they answer with numbers, or `LeftOut` says why not."""

    def __init__(
        self, given: argparse.Namespace, shape: Shape, folder: Path, requests: list[Request]
    ) -> None:
        self._given = given
        self._shape = shape
        self._logs = given.cache / "logs"
        self._logs.mkdir(exist_ok=True)
        dtype = DTYPES[given.dtype]
        itemsize = 2 if dtype == "bfloat16" else 4
        self._task = {
            "checkpoint": str(folder),
            "random": given.shape if given.random else None,
            "profile": given.profile,
            "dtype": dtype,
            "device": given.device,
            "threads": given.threads,
            "context": CONTEXT,
            "kv_bytes": int(given.kv_memory * _GIB),
            "kv_bytes_per_token": shape.kv_bytes_per_token(itemsize),
            "temperature": given.temperature,
            "top_p": given.top_p,
            "top_k": given.top_k,
            "schema": SCHEMA if given.json_schema else None,
            "requests": requests,
            "warm_up": as_text(self._warm_up(len(requests)), folder),
            "cache": str(given.cache),
        }
        self._options = _options(given)
        self._fastest: float | None = None
        """Seconds of the shortest run until now, load and warm-up included."""

    def _warm_up(self, count: int) -> list[Request]:
        """A few; on a card many, ragged, so that all sizes of a batch come by."""
        if self._given.device == "cpu":
            return warm_up()
        return warm_up(min(2048, 3 * count), prompt=20, out=8, more=64)

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def limits(self) -> dict[str, Any]:
        """`matrix_flops` here, in `matrix_dtype`, and on a card `copy_bytes_per_second`."""
        matrices = [*self._shape.matrices.values()]
        task = {**self._task, "requests": [], "matrices": matrices}
        return self._run("ceiling", task, self._given.limit)[0]

    def measure(self, engine: str) -> dict[str, Any]:
        """One run of an engine."""
        limit = time_limit(self._given.limit, self._given.slowest, self._fastest)
        task = {**self._task, "options": self._options.get(engine, {})}
        result, seconds = self._run(engine, task, limit)
        asked = sum(request["out"] for request in self._task["requests"])
        if result["tokens"] != asked:
            raise LeftOut(f"{result['tokens']:,} tokens instead of {asked:,}")
        self._fastest = min(self._fastest or seconds, seconds)
        return result

    def _run(self, name: str, task: dict[str, Any], limit: float) -> tuple[dict[str, Any], float]:
        """A driver's result, and the seconds from its start to its end."""
        self._wait(name)
        path, result = self._logs / f"{name}.task.json", self._logs / f"{name}.result.json"
        result.unlink(missing_ok=True)
        path.write_text(json.dumps({**task, "result": str(result)}))
        own = PEERS / name / "bin" / "python" if name in OWN_ENVIRONMENT else sys.executable
        driver = DRIVERS / f"drive_{name.replace('-', '_')}.py"
        command = [str(own), str(driver), str(path)]
        ended = processes.run(command, self._environment(name), self.log(name), limit)
        if ended.code is None:
            raise LeftOut(f"took longer than {limit:,.0f} s")
        if ended.code != 0 or not result.is_file():
            raise LeftOut(f"failed with exit code {ended.code}")
        answer: dict[str, Any] = json.loads(result.read_text())
        return {**answer, "others_cpu": round(ended.others, 3)}, ended.seconds

    def _wait(self, name: str) -> None:
        if self._given.force:
            return
        use = processes.wait_until_quiet(self._given.patience)
        if use > processes.QUIET:
            raise SystemExit(
                f"other processes use {use:.1f} cores, so {name} is not measured: end them, wait "
                "longer with --patience, or go on with --force"
            )

    def _environment(self, name: str) -> dict[str, str]:
        kept = {
            variable: value
            for variable, value in os.environ.items()
            if not variable.startswith(("NIGHTHERD_", "PYTHON", "VLLM_", "VIRTUAL_ENV"))
            and variable not in levels.VARIABLES
        }
        if name not in OWN_ENVIRONMENT:
            # A bare machine has neither us nor all of our packages among its own.
            kept["PYTHONPATH"] = os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        level = self._given.level
        if name not in NO_TORCH:
            kept |= levels.environment(level)
        if name in (OURS, WORKER) and level is not None:
            kept["NIGHTHERD_CPU_LEVEL"] = level
        return {
            **kept,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(self._given.threads),
        }


def _options(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The options of each engine: those of nightherd, and `--set`."""
    options: dict[str, dict[str, Any]] = {
        OURS: {"kind": given.kind, "budget": given.budget, "max_batch": given.max_batch},
        WORKER: {"budget": given.budget, "max_batch": given.max_batch},
    }
    for entry in given.set:
        name, _, value = entry.partition("=")
        engine, _, option = name.partition(".")
        if engine not in ENGINES or not option:
            raise SystemExit(f"--set {entry}: write ENGINE.NAME=VALUE")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        options.setdefault(engine, {})[option] = parsed
    return options
