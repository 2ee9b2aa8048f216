"""The stages of `run.py`: what each runs, for how long at most, and its result in one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from card import breakdown

GPU = "benchmarks/gpu"
ENGINES = "benchmarks/engine.py"
LARGE_CARD = 100 << 30
"""Bytes of memory from which 1,024 sequences of 768 positions fit; on smaller cards 576 of them fit
without being preempted."""


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    """Also that of its log and its JSON file."""
    limit: float
    """Seconds; less where the call has less left."""
    script: str
    arguments: tuple[str, ...] = ()
    needed: bool = False
    """Whether the stages after it are skipped if it fails."""


FIRST_CALL = ("smoke", "figure", "decode", "tests")
"""The stages that run unless others are asked for."""


def prepare(site: Path, wheels: Path, dry: bool) -> Stage:
    """The stage that always runs before all others."""
    given = ("--site", str(site), "--wheels", str(wheels), *(["--dry"] if dry else []))
    return Stage("prepare", 90, f"{GPU}/prepare.py", given, needed=True)


def plan(names: list[str], memory: int | None, dry: bool) -> list[Stage]:
    """The stages of those names, for a card of so much memory. Raises `KeyError`."""
    made = _stages(memory is None or memory >= LARGE_CARD, dry)
    return [stage for name in names for stage in made[name]]


def names() -> list[str]:
    return [*_stages(True, False)]


def _stages(large: bool, dry: bool) -> dict[str, list[Stage]]:
    sequences = 1024 if large else 576
    figure = ("--sequences", f"{sequences}", "--requests", f"{2 * sequences}", "--rounds", "1")
    batches = "256,1024" if large else "256,512"
    samples = (
        *("--shape", "L", "--requests", "128", "--samples", "64", "--temperature", "1"),
        *("--rounds", "1"),
    )

    def on_gpu(name: str, limit: float, script: str, *arguments: str) -> Stage:
        """A script of this folder."""
        dry_options = ("--dry",) if dry else ()
        given = ("--name", name, *arguments, *dry_options)
        return Stage(name, limit, f"{GPU}/{script}", given, name == "smoke")

    def engines(name: str, limit: float, *arguments: str) -> Stage:
        """`benchmarks/engine.py`: our engine beside others."""
        dry_options = ("--shape", "T", "--device", "cpu", "--requests", "8", "--kv-memory", "0.1")
        card = ("--device", "cuda", "--max-batch", f"{sequences}", "--budget", "8192")
        always = ("--rounds", "1", "--patience", "1", "--force")
        mine = arguments[:4] if dry else arguments  # workload and engines
        return Stage(name, limit, ENGINES, (*mine, *always, *(dry_options if dry else card)))

    large_peer = ("--shape", "8B", "--requests", "1024", "--limit", "250", "--profile", "64")
    small_peer = ("--shape", "L", "--requests", "1024", "--limit", "170", "--profile", "64")
    worker = ("--shape", "L", "--requests", "1024", "--limit", "120")
    continuous = "nightherd,transformers-cb"
    return {
        "smoke": [on_gpu("smoke", 60, "smoke.py")],
        "figure": [on_gpu("figure", 200, "figure.py", *figure)],
        "decode": [on_gpu("decode", 110, "decode.py", "--tests", "0", "--batches", batches)],
        "tests": [on_gpu("tests", 120, "kernel_tests.py")],
        "prefix": [
            on_gpu("prefix", 120, "figure.py", *samples, "--profile", "16"),
            on_gpu("prefix-alone", 110, "figure.py", *samples, "--profile", "0", "--groups", "0"),
        ],
        "kernels": [on_gpu("kernels", 120, "kernels.py", "--sweep", "0")],
        "sweep": [on_gpu("sweep", 300, "kernels.py", "--sweep", "1")],
        "accuracy": [on_gpu("accuracy", 90, "decode.py", "--batches", "1")],
        "peer": [
            engines("peer", 400, "--workload", "W1", "--engines", f"{continuous},transformers",
                    *small_peer)
        ],
        "peer-8B": [
            engines("peer-8B", 500, "--workload", "fixed", "--engines", continuous, *large_peer)
        ],
        "worker": [
            engines("worker", 300, "--workload", "W1", "--engines", "nightherd,nightherd-worker",
                    *worker)
        ],
    }  # fmt: skip


def summary_line(made: dict[str, Any]) -> str:
    """A result in one line: whatever is there of what it may have."""
    said = []
    if made.get("script") == "prepare":
        said += [f"{made.get('card', 'no card')}", f"{made.get('wheels', 0)} wheels"]
    if "tokens_equal" in made:
        said.append(f"{made['tokens_equal']:.0%} of tokens equal")
    if "regret" in made.get("bfloat16", {}):
        said.append(f"bf16 {made['bfloat16']['regret']:.2f} off")
    if "float32_tokens_equal" in made:
        said.append(f"{made['float32_tokens_equal']:.0%} of tokens equal")
    if "mean_ratio" in made.get("bf16_error", {}):
        said.append(f"bf16 errors {made['bf16_error']['mean_ratio']:.2f} of transformers'")
    if made.get("rates"):
        said.append(f"{max(made['rates']):,.0f} tokens/s")
    if "share_of_floor" in made:
        said.append(f"{made['share_of_floor']:.0%} of the floor")
    said += [f"{one['batch']}: {one['graph']:.1f} ms (eager {one['eager']:.1f}, least "
             f"{one['least']:.1f}{'' if one.get('captured') else ', NO GRAPH'})"
             for one in made.get("steps", [])]  # fmt: skip
    said += [f"{kind} {made[kind].get('passed', 0)} passed, {made[kind].get('failed', 0)} failed"
             for kind in ("bf16", "rest") if kind in made]  # fmt: skip
    if isinstance(made.get("tokens_per_second"), dict):
        said += [f"{name} {speed:,.0f} tokens/s" for name, speed in
                 made["tokens_per_second"].items()]  # fmt: skip
        said += [f"without {name}" for name in made.get("left_out") or {}]
    if made.get("script") == "kernels":
        said += [f"decode {one['batch']}: {one['of_copy']:.0%} of a copy"
                 for one in made.get("decode", [])[:4]]  # fmt: skip
    for name, what in (
        ("num_blocks", "blocks"),
        ("graphs", "graphs"),
        ("preemptions", "preempted"),
    ):
        if name in made:
            said.append(f"{made[name]:,} {what}")
    if made.get("lacks"):
        said.append(f"WITHOUT {', '.join(made['lacks'])}")
    if made.get("warnings"):
        said.append(f"{len(made['warnings'])} WARNINGS")
    if made.get("profile"):
        said.append(breakdown(made["profile"]))
    return ", ".join(said)
