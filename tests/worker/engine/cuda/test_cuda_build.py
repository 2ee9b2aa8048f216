"""What `build_engine` does for a card, without one: kernels tested, memory measured, cache made."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from nightherd.errors import CheckpointError
from tests.checkpoints import tiny_llama
from tests.engines import VOCAB
from tests.worker.engine.cuda.test_cuda_runner import fake_capture
from worker.engine import build
from worker.engine.build import EngineOptions
from worker.engine.cuda import graphs, kernel_selection, memory
from worker.engine.cuda.cuda_runner import CudaRunner
from worker.engine.cuda.kernel_selection import BLOCK, KernelError, TrialCase
from worker.engine.cuda.kernels import reference
from worker.engine.cuda.memory import MemoryProfile

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def trial_cases(monkeypatch: pytest.MonkeyPatch) -> list[TrialCase]:
    """What kernels were tested for; a card with memory for 100 blocks."""
    cases: list[TrialCase] = []

    def select_kernels(case: TrialCase) -> Any:
        cases.append(case)
        return reference

    def measure(runner: CudaRunner, device: torch.device) -> Any:
        runner.largest_prefill()
        runner.largest_decode()
        assert runner.num_blocks == build._PROFILE_BLOCKS
        shape = runner._model.shape
        size = 2 * shape.layers * shape.kv_width * BLOCK * 4

        class Measured:
            cache = 100 * size + 7

        return Measured()

    monkeypatch.setattr(kernel_selection, "select_kernels", select_kernels)
    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(graphs, "cuda_capture", lambda device: fake_capture)
    return cases


def made(sequences: int = 64, budget: int = 128, **options: Any) -> CudaRunner | None:
    runner = build._cuda_runner(
        tiny_llama(), VOCAB, 256, CPU, GIB, sequences, budget, EngineOptions(**options)
    )
    assert runner is None or isinstance(runner, CudaRunner)
    return runner


def test_kernels_are_tested_for_the_model_and_the_cache_gets_the_rest(
    trial_cases: list[TrialCase],
) -> None:
    runner = made()
    assert runner is not None
    assert runner.num_blocks == 100
    (case,) = trial_cases
    assert case == TrialCase(runner._model.shape, torch.float32, CPU, head_norms=False)


@pytest.mark.usefixtures("trial_cases")
@pytest.mark.parametrize(("sequences", "budget"), [(1, 1), (1, 512), (8, 8192), (3, 4), (64, 64)])
def test_any_sizes_can_be_measured(sequences: int, budget: int) -> None:
    runner = made(sequences, budget)
    assert runner is not None
    # No more than so many whole contexts.
    assert runner.num_blocks == min(100, 4 * sequences)


@pytest.mark.usefixtures("trial_cases")
def test_with_kv_memory_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", None)
    runner = made(kv_memory=1 << 20)
    assert runner is not None
    shape = runner._model.shape
    assert runner.num_blocks == (1 << 20) // (2 * shape.layers * shape.kv_width * BLOCK * 4)


@pytest.mark.usefixtures("trial_cases")
def test_without_a_kernel_that_it_needs_plain_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(case: TrialCase) -> Any:
        raise KernelError("decode_attention: OutOfResources: shared memory")

    monkeypatch.setattr(kernel_selection, "select_kernels", fail)
    with caplog.at_level(logging.WARNING, "nightherd.engine"):
        assert made() is None
    (record,) = caplog.records
    assert "decode_attention: OutOfResources" in record.getMessage()
    assert "plain torch computes" in record.getMessage()
    with pytest.raises(CheckpointError, match="the kernels cannot be used: decode_attention"):
        made(kind="cuda")


def test_a_card_that_is_full_is_one_line(
    trial_cases: list[TrialCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = MemoryProfile(total=GIB, used=GIB, prefill=0, decode=0, sampling=0)
    monkeypatch.setattr(memory, "measure", lambda runner, device: full)
    with pytest.raises(CheckpointError, match="holds 0 tokens"):
        made()
    assert len(trial_cases) == 1
