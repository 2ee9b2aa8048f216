"""The stages of a card's minutes: what each runs, for how long at most, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from card import breakdown

GPU = "benchmarks/gpu"
ENGINES = "benchmarks/engine.py"
LARGE_CARD = 100 << 30
"""Bytes of memory. 1,024 sequences of 768 positions fit from there on; in less, 576 of them do
without being preempted."""


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    """Of its log and its JSON too."""
    limit: float
    """Seconds; less if all of them together have less left."""
    script: str
    arguments: tuple[str, ...] = ()
    needed: bool = False
    """Whether nothing after it is worth its time if this fails."""


FIRST = ("smoke", "figure", "decode", "tests")
"""Of the first call."""


def prepare(site: Path, wheels: Path, dry: bool) -> Stage:
    """Before all others, always."""
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

    def of_card(name: str, limit: float, script: str, *arguments: str) -> Stage:
        tried = ("--dry",) if dry else ()
        given = ("--name", name, *arguments, *tried)
        return Stage(name, limit, f"{GPU}/{script}", given, name == "smoke")

    def engines(name: str, limit: float, *arguments: str) -> Stage:
        tried = ("--shape", "T", "--device", "cpu", "--requests", "8", "--kv-memory", "0.1")
        card = ("--device", "cuda", "--max-batch", f"{sequences}", "--budget", "8192")
        always = ("--rounds", "1", "--patience", "1", "--force")
        mine = arguments[:4] if dry else arguments  # workload and engines
        return Stage(name, limit, ENGINES, (*mine, *always, *(tried if dry else card)))

    large_peer = ("--shape", "8B", "--requests", "1024", "--limit", "250", "--profile", "64")
    small_peer = ("--shape", "L", "--requests", "1024", "--limit", "170", "--profile", "64")
    worker = ("--shape", "L", "--requests", "1024", "--limit", "120")
    continuous = "nightherd,transformers-cb"
    return {
        "smoke": [of_card("smoke", 60, "smoke.py")],
        "figure": [of_card("figure", 200, "figure.py", *figure)],
        "decode": [of_card("decode", 110, "decode.py", "--tests", "0", "--batches", batches)],
        "tests": [of_card("tests", 120, "kernel_tests.py")],
        "prefix": [
            of_card("prefix", 120, "figure.py", *samples, "--profile", "16"),
            of_card("prefix-alone", 110, "figure.py", *samples, "--profile", "0", "--groups", "0"),
        ],
        "kernels": [of_card("kernels", 120, "kernels.py", "--sweep", "0")],
        "sweep": [of_card("sweep", 300, "kernels.py", "--sweep", "1")],
        "accuracy": [of_card("accuracy", 90, "decode.py", "--batches", "1")],
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


def key_figures(made: dict[str, Any]) -> str:
    """One line of what a result says, whatever of it is there."""
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
