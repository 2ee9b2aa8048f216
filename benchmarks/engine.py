"""nightherd's engine against its peers, and against what this machine could do at most.

    make peers
    .venv/bin/python benchmarks/engine.py --shape M --workload W1 --requests 128

Each engine runs in a process and an environment of its own, engine after engine, round after round.
Prints a table, then one line of JSON with all numbers. README.md beside this file says what they
mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from card import breakdown, least_seconds, linear_flops
from shapes import CONTEXT, SHAPES, Shape, checkpoint
from workloads import WORKLOADS, Request, as_text, warm_up, workload

ROOT = Path(__file__).resolve().parents[1]
DRIVERS = Path(__file__).resolve().parent / "peers"
PEERS = ROOT / "build" / "peers"
OURS, WORKER = "nightherd", "nightherd-worker"
PEER_NAMES = ("vllm", "openvino", "transformers", "transformers-cb")
ENGINES = (OURS, WORKER, *PEER_NAMES)
_OWN_ENVIRONMENT = ("vllm", "openvino")
_CPU_ONLY = ("openvino",)
_NEED_FILES = (WORKER, "vllm", "openvino")
"""Others can make random weights by themselves."""
_NO_SCHEMA = (WORKER, "transformers", "transformers-cb")
_DTYPES = {"bf16": "bfloat16", "float32": "float32"}
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="M")
    add("--workload", choices=WORKLOADS, default="W1")
    add("--requests", type=int, default=128, metavar="N")
    add("--dtype", choices=_DTYPES, default="bf16")
    add("--engines", default=",".join((OURS, *PEER_NAMES)), metavar="NAME,…")
    add("--rounds", type=int, default=3)
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add(
        "--kv-memory",
        type=float,
        metavar="GIB",
        help="of every engine (2 on a CPU, its own choice on a card)",
    )
    add("--random", action="store_true", help="weights made in each process, as on a card")
    add("--profile", type=int, default=0, metavar="N", help="then N requests again, by kernel")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--json-schema", action="store_true", help="every output keeps to a JSON schema")
    add("--data", type=Path, help="a file of GSM8K's problems")
    add("--cache", type=Path, default=ROOT / "build" / "benchmarks", help="checkpoints and logs")
    add("--budget", type=int, help="nightherd's: rows of a step")
    add("--max-batch", type=int, help="nightherd's: sequences at once")
    add("--kind", default="auto", choices=("auto", "kernels", "torch", "generate"))
    add("--set", action="append", default=[], metavar="ENGINE.NAME=JSON", help="a peer's option")
    add("--limit", type=float, default=900.0, metavar="SECONDS", help="of one run of one engine")
    add("--patience", type=float, default=120.0, metavar="SECONDS", help="wait for a quiet machine")
    add("--force", action="store_true", help="measure on a busy machine too")
    given = parser.parse_args()
    if given.kv_memory is None:
        given.kv_memory = 2.0 if given.device == "cpu" else 0.0
    return given


def main() -> None:
    given = arguments()
    given.cache = given.cache.resolve()
    given.cache.mkdir(parents=True, exist_ok=True)
    engines = available(given)
    shape, dtype = SHAPES[given.shape], _DTYPES[given.dtype]
    say(f"checkpoint {given.shape} in {dtype}")
    given.random = (given.random or given.device != "cpu") and not {*engines} & {*_NEED_FILES}
    folder = checkpoint(given.shape, dtype, given.cache, weights=not given.random)
    data = given.data or _default_data(given.cache)
    requests = workload(given.workload, given.requests, folder, data)
    if WORKER in engines:
        requests = as_text(requests, folder)
    runner = Runner(given, shape, folder, requests)
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    rates: list[dict[str, float]] = []
    for number in range(1, given.rounds + 1):
        rates.append(runner.limits())
        for engine in list(engines):
            result = runner.measure(engine)
            if result is None:
                engines.remove(engine)
                continue
            runs[engine].append(result)
            say(f"round {number}: {engine} {result['tokens_per_second']:,.0f} tokens/s")
            if "profile" in result:
                say(f"  {breakdown(result['profile'])}")
    report(given, shape, requests, {name: of for name, of in runs.items() if of}, rates)


def available(given: argparse.Namespace) -> list[str]:
    """The engines that are asked for and can run; a line for each of the others."""
    names = [name.strip() for name in given.engines.split(",") if name.strip()]
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise SystemExit(f"no engine {unknown[0]!r}; there are {', '.join(ENGINES)}")
    able = []
    for name in names:
        if name in _OWN_ENVIRONMENT and not (PEERS / name / ".installed").is_file():
            say(f"{name}: not installed (make peers), skipped")
        elif name in _CPU_ONLY and given.device != "cpu":
            say(f"{name}: not on {given.device}, skipped")
        elif name in _NO_SCHEMA and given.json_schema:
            say(f"{name}: knows no JSON schema, skipped")
        else:
            able.append(name)
    if not able:
        raise SystemExit("nothing to measure")
    return able


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _default_data(cache: Path) -> Path:
    """GSM8K beside the checkpoints, or where the project's shared data lies."""
    places = (cache / "gsm8k_200.jsonl", ROOT.parent / "shared" / "data" / "gsm8k_200.jsonl")
    return next((place for place in places if place.is_file()), places[0])


class Runner:
    """Runs drivers, each in its environment, on a quiet machine."""

    def __init__(
        self, given: argparse.Namespace, shape: Shape, folder: Path, requests: list[Request]
    ) -> None:
        self._given = given
        self._shape = shape
        self._logs = given.cache / "logs"
        self._logs.mkdir(exist_ok=True)
        dtype = _DTYPES[given.dtype]
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

    def _warm_up(self, count: int) -> list[Request]:
        """A few; on a card many, ragged, so that all sizes of a batch come by."""
        if self._given.device == "cpu":
            return warm_up()
        return warm_up(min(2048, 3 * count), prompt=20, out=8, more=64)

    def limits(self) -> dict[str, float]:
        """`matrix_flops` here, and on a card `copy_bytes_per_second`."""
        matrices = [*self._shape.matrices.values()]
        result = self._run("ceiling", {**self._task, "requests": [], "matrices": matrices})
        if result is None:
            raise SystemExit("the ceiling cannot be measured")
        return result

    def measure(self, engine: str) -> dict[str, Any] | None:
        """One run of an engine; None if it failed, with a line that says where to read why."""
        result = self._run(engine, {**self._task, "options": self._options.get(engine, {})})
        if result is None:
            return None
        asked = sum(request["out"] for request in self._task["requests"])
        if result["tokens"] != asked:
            say(f"{engine}: {result['tokens']:,} tokens instead of {asked:,}, left out")
            return None
        return result

    def _run(self, name: str, task: dict[str, Any]) -> dict[str, Any] | None:
        self._wait(name)
        log, path = self._logs / f"{name}.log", self._logs / f"{name}.task.json"
        result = self._logs / f"{name}.result.json"
        result.unlink(missing_ok=True)
        path.write_text(json.dumps({**task, "result": str(result)}))
        own = PEERS / name / "bin" / "python" if name in _OWN_ENVIRONMENT else sys.executable
        driver = DRIVERS / f"drive_{name.replace('-', '_')}.py"
        ended = machine.run(
            [str(own), str(driver), str(path)], self._environment(name), log, self._given.limit
        )
        if ended.code != 0 or not result.is_file():
            why = "took too long" if ended.code is None else f"failed with exit code {ended.code}"
            say(f"{name}: {why}, left out; see {log}")
            return None
        answer: dict[str, Any] = json.loads(result.read_text())
        return {**answer, "others_cpu": round(ended.others, 3)}

    def _wait(self, name: str) -> None:
        if self._given.force:
            return
        use = machine.wait_until_quiet(self._given.patience)
        if use > machine.QUIET:
            raise SystemExit(
                f"other processes use {use:.1f} cores, so {name} is not measured: end them, wait "
                "longer with --patience, or go on with --force"
            )

    def _environment(self, name: str) -> dict[str, str]:
        kept = {
            variable: value
            for variable, value in os.environ.items()
            if not variable.startswith(("NIGHTHERD_", "PYTHON", "VLLM_", "VIRTUAL_ENV"))
        }
        if name not in _OWN_ENVIRONMENT:
            # A bare machine has neither us nor all of our packages among its own.
            kept["PYTHONPATH"] = os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
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


def report(
    given: argparse.Namespace,
    shape: Shape,
    requests: list[Request],
    runs: dict[str, list[dict[str, Any]]],
    rates: list[dict[str, float]],
) -> None:
    """Prints the table and the line of JSON."""
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
    what = f"{given.shape} {given.workload} {given.dtype} {given.device}"
    print(
        f"{what}, {len(requests)} requests, {tokens:,} tokens, {given.threads} threads; "
        f"ceiling {ceiling:,.0f} tokens/s at {matrix_flops / 1e9:,.0f} GFLOP/s"
        + "".join(
            f" and a copy of {rate / 1e9:,.0f} GB/s"
            for name, rate in best_rates.items()
            if name == "copy_bytes_per_second"
        )
    )
    for line in _table(runs, speeds, best, ceiling):
        print(line)
    noisy = sum(run["others_cpu"] > machine.QUIET for of in runs.values() for run in of)
    if noisy:
        print(f"{noisy} runs were disturbed by other processes: measure again")
    summary = {
        "shape": given.shape,
        "workload": given.workload,
        "requests": len(requests),
        "tokens": tokens,
        "dtype": given.dtype,
        "device": given.device,
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
        "share_of_ceiling": None if ours is None else ours / ceiling,
        "limits": rates,
        "random_weights": given.random,
        "disturbed_runs": noisy,
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


if __name__ == "__main__":
    main()
