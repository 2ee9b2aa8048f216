"""`nightherd bench`: what it measures of the demo checkpoint, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nightherd.errors import CheckpointError
from tests.commands.invoking import CommandLine
from worker.commands.bench import as_dict, bench, candidates, shown
from worker.engine import build
from worker.speed import MachineLimits, SpeedReport, SpeedTest, _Meter

LIMITS = MachineLimits(
    flops=1e9, bandwidth=1e8, weights=1_000_000, output_weights=200_000, weight_bytes=2_000_000
)


def test_of_the_demo_in_json(nightherd: CommandLine) -> None:
    outcome = nightherd(
        *("bench", "--checkpoint", "demo", "--device", "cpu", "--threads", "1"),
        *("--kv-memory", "200MiB", "--seconds", "0.4", "--json"),
        seconds=120,
    )
    assert outcome.code == 0, outcome
    assert outcome.err == "", "progress is for terminals"
    answer = json.loads(outcome.out)
    assert answer["checkpoint"] == "demo"
    assert [one["token_budget"] for one in answer["prefill"]] == [128, 256, 512]
    assert [one["batch"] for one in answer["decode"]] == [1, 16, 64, 128]
    assert all(one["tokens_per_second"] > 0 for one in answer["prefill"] + answer["decode"])
    assert answer["best"]["max_batch"] in (16, 64, 128)
    assert answer["machine"]["matrix_flops"] > 1e8


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--checkpoint", "./missing"), 1, "no such folder"),
        (("--checkpoint", "demo", "--kv-memory", "much"), 2, "--kv-memory"),
        ((), 2, "--checkpoint"),
    ],
)
def test_errors_are_one_line(
    nightherd: CommandLine, arguments: tuple[str, ...], code: int, said: str
) -> None:
    outcome = nightherd("bench", *arguments)
    assert outcome.code == code
    assert len(outcome.error_lines) == 1, outcome.err
    assert said in outcome.err


def test_an_engine_without_steps_is_refused() -> None:
    with pytest.raises(CheckpointError, match="generate"):
        SpeedTest(cast(Any, SimpleNamespace(name="transformers")), 10, 10)


def test_limits() -> None:
    assert LIMITS.decode(1) == pytest.approx(50), "held up by memory"
    assert LIMITS.decode(128) == pytest.approx(500), "held up by arithmetic"
    assert LIMITS.prefill == pytest.approx(625)


def test_the_best_is_the_smallest_that_nearly_reaches_it() -> None:
    report = SpeedReport(LIMITS, {128: 90.0, 256: 99.0, 512: 100.0}, {1: 5.0, 16: 40.0, 64: 39.0})
    assert (report.best_budget, report.best_batch) == (256, 16)
    assert as_dict(report)["best"] == {"max_batch": 16, "token_budget": 256}
    lines = shown(report).splitlines()
    assert " ".join(lines[1].split()) == "prefill, 128 tokens a step 90 625 14%"
    assert " ".join(lines[4].split()) == "decode, 1 at once 5 50 10%"
    assert "NIGHTHERD_MAX_BATCH=16 NIGHTHERD_TOKEN_BUDGET=256" in lines[-2]


def test_tokens_count_once_all_have_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0))
    monkeypatch.setattr("worker.speed.time", SimpleNamespace(perf_counter=lambda: next(times)))
    meter = _Meter(2, seconds=3.0)
    first, second = meter.make_stop_check(), meter.make_stop_check()
    ended = [first(1), first(1), second(1)]
    assert not any(ended)
    ended = [(first(1), second(1)) for _ in range(4)]
    assert ended == [(False, False)] * 3 + [(True, True)]
    assert meter.rate == pytest.approx(8 / 4)


def test_the_first_steps_of_a_size_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA: kernels are compiled, and a graph captured."""
    now = 0.0
    monkeypatch.setattr("worker.speed.time", SimpleNamespace(perf_counter=lambda: now))
    meter = _Meter(2, seconds=3.0, skipped=2)
    takes = [meter.make_stop_check(), meter.make_stop_check()]
    for took in (1.0, 9.0, 9.0, 1.0, 1.0, 1.0):
        now += took
        ended = [take(1) for take in takes]
        assert not any(ended)
    assert meter.rate == pytest.approx(2)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_defaults_are_among_what_is_tried(on_cpu: bool) -> None:
    batches, budgets = candidates(on_cpu)
    most, budget = (
        (build.CPU_SEQUENCES, build.CPU_BUDGET)
        if on_cpu
        else (build.CUDA_SEQUENCES, build.CUDA_BUDGET)
    )
    assert most in batches
    assert min(budgets) < budget < max(budgets)
    assert budget in budgets
    assert batches[0] == 1
    assert list(batches) == sorted(set(batches))
    assert min(budgets) >= max(batches), "the smallest step has room for all"
    text = " ".join((bench.help or "").split())
    assert f"{', '.join(map(str, batches[:-1]))} and {batches[-1]}" in text


def test_more_than_the_defaults_is_tried_on_a_gpu() -> None:
    batches, budgets = candidates(on_cpu=False)
    assert max(batches) > build.CUDA_SEQUENCES
    assert max(budgets) > build.CUDA_BUDGET


def test_it_is_documented() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
    assert "### nightherd bench" in page.read_text(encoding="utf-8")
