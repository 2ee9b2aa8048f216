"""nightherd's engine against its peers, and against what this machine could do at most.

    make peers
    .venv/bin/python benchmarks/engine.py --shape M --workload W1 --requests 128

Each engine runs in a process and an environment of its own, engine after engine, round after round.
Prints a table, then one line of JSON with all numbers. README.md beside this file says what they
mean.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import levels
import processes
import runner
from card import breakdown
from report import Measured, report
from runner import DTYPES, ENGINES, OURS, PEER_NAMES, ROOT, WORKER, LeftOut, Runner, say
from shapes import SHAPES, checkpoint
from workloads import WORKLOADS, as_text, workload

_CPU_ONLY = ("openvino",)
_NEED_FILES = (WORKER, "vllm", "openvino")
"""Others can make random weights by themselves."""
_NO_SCHEMA = (WORKER, "transformers", "transformers-cb")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="M")
    add("--workload", choices=WORKLOADS, default="W1")
    add("--requests", type=int, default=128, metavar="N")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--engines", default=",".join((OURS, *PEER_NAMES)), metavar="NAME,…")
    add("--rounds", type=int, default=3)
    add("--device", default="cpu", help="cpu or cuda")
    add("--level", choices=levels.LEVELS, help="of the CPU, at most (all that it has)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add(
        "--kv-memory",
        type=float,
        metavar="GIB",
        help="of every engine (2 on a CPU, its own choice on a card)",
    )
    add("--random", action="store_true", help="weights made in each process, as on a card")
    add("--profile", type=int, default=0, metavar="N", help="on a card: then N again, by kernel")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--json-schema", action="store_true", help="every output keeps to a JSON schema")
    add("--data", type=Path, help="a file of GSM8K's problems")
    add("--cache", type=Path, default=ROOT / "build" / "benchmarks", help="checkpoints and logs")
    add("--budget", type=int, help="nightherd's: rows of a step")
    add("--max-batch", type=int, help="nightherd's: sequences at once")
    add("--kind", default="auto", choices=("auto", "cpu", "cuda", "torch", "transformers"))
    add("--set", action="append", default=[], metavar="ENGINE.NAME=JSON", help="a peer's option")
    add("--limit", type=float, default=900.0, metavar="SECONDS", help="of one run of one engine")
    add(
        "--slowest",
        type=float,
        default=30.0,
        metavar="N",
        help="also its limit: N times as long as the fastest until then",
    )
    add("--patience", type=float, default=120.0, metavar="SECONDS", help="wait for a quiet machine")
    add("--force", action="store_true", help="measure on a busy machine too")
    given = parser.parse_args()
    if given.kv_memory is None:
        given.kv_memory = 2.0 if given.device == "cpu" else 0.0
    if given.profile and given.device == "cpu":
        raise SystemExit("--profile: only what runs on a card can be told apart")
    if given.level is not None and levels.is_lower(levels.of_this_cpu(), given.level):
        raise SystemExit(
            f"--level {given.level}: this CPU has no such instructions, only {levels.of_this_cpu()}"
        )
    return given


def main() -> None:
    given = arguments()
    processes.end_in_order()
    given.cache = given.cache.resolve()
    given.cache.mkdir(parents=True, exist_ok=True)
    measured = Measured()
    engines = available(given, measured)
    shape, dtype = SHAPES[given.shape], DTYPES[given.dtype]
    say(f"checkpoint {given.shape} in {dtype}")
    given.random = (given.random or given.device != "cpu") and not {*engines} & {*_NEED_FILES}
    folder = checkpoint(given.shape, dtype, given.cache, weights=not given.random)
    data = given.data or _default_data(given.cache)
    requests = workload(given.workload, given.requests, folder, data)
    if WORKER in engines:
        requests = as_text(requests, folder)
    try:
        rounds(given, Runner(given, shape, folder, requests), engines, measured)
    except BaseException as error:
        measured.stopped = str(error) or type(error).__name__
        raise
    finally:
        # What has been measured is worth its table, whatever came then.
        if measured.runs or (measured.limits and measured.stopped is None):
            report(given, shape, requests, measured)
    if not measured.runs:
        raise SystemExit("nothing was measured")


def rounds(
    given: argparse.Namespace, drivers: Runner, engines: list[str], measured: Measured
) -> None:
    """Measures engine by engine, round by round; what cannot go on is left out from then on."""
    engines = list(engines)
    for number in range(1, given.rounds + 1):
        if not engines:
            break
        try:
            measured.limits.append(drivers.limits())
        except LeftOut as reason:
            if not measured.limits:
                raise SystemExit(
                    f"the ceiling cannot be measured: {reason}; see {drivers.log('ceiling')}"
                ) from None
            say(f"round {number}: no ceiling, so that of other rounds counts: {reason}")
        for engine in list(engines):
            try:
                result = drivers.measure(engine)
            except LeftOut as reason:
                say(f"{engine}: {reason}, left out; see {drivers.log(engine)}")
                measured.left_out[engine] = str(reason)
                engines.remove(engine)
                continue
            measured.runs.setdefault(engine, []).append(result)
            say(f"round {number}: {engine} {result['tokens_per_second']:,.0f} tokens/s")
            if "profile" in result:
                say(f"  {breakdown(result['profile'])}")


def available(given: argparse.Namespace, measured: Measured) -> list[str]:
    """The engines that are asked for and can run; a line for each of the others."""
    names = [name.strip() for name in given.engines.split(",") if name.strip()]
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise SystemExit(f"no engine {unknown[0]!r}; there are {', '.join(ENGINES)}")
    for name in names:
        why = _why_not(name, given)
        if why is not None:
            say(f"{name}: {why}, skipped")
            measured.left_out[name] = why
    able = [name for name in names if name not in measured.left_out]
    if not able:
        raise SystemExit("nothing to measure")
    return able


def _why_not(name: str, given: argparse.Namespace) -> str | None:
    if name in runner.OWN_ENVIRONMENT and not (runner.PEERS / name / ".installed").is_file():
        return "not installed (make peers)"
    if name in _CPU_ONLY and given.device != "cpu":
        return f"not on {given.device}"
    if name in _NO_SCHEMA and given.json_schema:
        return "knows no JSON schema"
    if name in runner.NO_TORCH and given.level is not None:
        own = levels.of_this_cpu()
        if levels.is_lower(given.level, own):
            return f"cannot be held to {given.level}, this CPU has {own}"
    return None


def _default_data(cache: Path) -> Path:
    """GSM8K beside the checkpoints, or where the project's shared data lies."""
    paths = (cache / "gsm8k_200.jsonl", ROOT.parent / "shared" / "data" / "gsm8k_200.jsonl")
    return next((path for path in paths if path.is_file()), paths[0])


if __name__ == "__main__":
    main()
