"""What `build_engine` does for a card, without one: kernels tried, memory measured, cache made."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from nightherd.errors import CheckpointError
from tests.checkpoints import tiny_llama
from tests.engines import VOCAB
from tests.worker.engine.cuda.test_cuda_runner import fake_capture
from worker.engine import build, cuda_graphs, cuda_kernels, cuda_memory
from worker.engine.build import EngineOptions
from worker.engine.cuda_kernels import BLOCK, Case, KernelError
from worker.engine.cuda_memory import Use
from worker.engine.cuda_runner import CudaRunner
from worker.engine.triton_kernels import reference

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """What kernels were tried for; a card that has 100 blocks to spare."""
    cases: list[Case] = []

    def kernels_for(case: Case) -> Any:
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

    monkeypatch.setattr(cuda_kernels, "kernels_for", kernels_for)
    monkeypatch.setattr(cuda_memory, "measure", measure)
    monkeypatch.setattr(cuda_graphs, "cuda_capture", lambda device: fake_capture)
    return cases


def made(sequences: int = 64, budget: int = 128, **options: Any) -> CudaRunner | None:
    runner = build._cuda_runner(
        tiny_llama(), VOCAB, 256, CPU, GIB, sequences, budget, EngineOptions(**options)
    )
    assert runner is None or isinstance(runner, CudaRunner)
    return runner


def test_kernels_are_tried_for_the_model_and_the_cache_gets_the_rest(tried: list[Case]) -> None:
    runner = made()
    assert runner is not None
    assert runner.num_blocks == 100
    (case,) = tried
    assert case == Case(runner._model.shape, torch.float32, CPU, head_norms=False)


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize(("sequences", "budget"), [(1, 1), (1, 512), (8, 8192), (3, 4), (64, 64)])
def test_any_sizes_can_be_measured(sequences: int, budget: int) -> None:
    runner = made(sequences, budget)
    assert runner is not None
    # No more than so many whole contexts.
    assert runner.num_blocks == min(100, 4 * sequences)


@pytest.mark.usefixtures("tried")
def test_who_says_how_much_memory_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_memory, "measure", None)
    runner = made(kv_memory=1 << 20)
    assert runner is not None
    shape = runner._model.shape
    assert runner.num_blocks == (1 << 20) // (2 * shape.layers * shape.kv_width * BLOCK * 4)


@pytest.mark.usefixtures("tried")
def test_without_a_kernel_that_it_needs_plain_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(case: Case) -> Any:
        raise KernelError("decode_attention: OutOfResources: shared memory")

    monkeypatch.setattr(cuda_kernels, "kernels_for", fail)
    with caplog.at_level(logging.WARNING, "nightherd.engine"):
        assert made() is None
    (record,) = caplog.records
    assert "decode_attention: OutOfResources" in record.getMessage()
    assert "plain torch computes" in record.getMessage()
    with pytest.raises(CheckpointError, match="the kernels cannot be used: decode_attention"):
        made(kind="kernels")


def test_a_card_that_is_full_is_one_line(
    tried: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Use(total=GIB, used=GIB, prefill=0, decode=0, choose=0)
    monkeypatch.setattr(cuda_memory, "measure", lambda runner, device: full)
    with pytest.raises(CheckpointError, match="holds 0 tokens"):
        made()
    assert len(tried) == 1
