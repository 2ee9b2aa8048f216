"""The kernels' sampler by itself: the tokens of the torch sampler, on logits of every kind."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.engine.torch.test_sampler import CPU, GIVEN, sample_of, samples_of, some_logits
from worker.engine.cpu.compiler import CpuKernels
from worker.engine.cpu.level import levels_here
from worker.engine.cpu.library import load_library
from worker.engine.cpu.sampling import SamplingTable, chosen_rows, read_choices
from worker.engine.runner import Choices
from worker.engine.sequence import Sequence as Sample
from worker.engine.torch.sampler import Sampler

Choose = Callable[[torch.Tensor, Sequence[Sample]], Choices]


@pytest.fixture(params=levels_here())
def choose(kernels: Path, request: pytest.FixtureRequest) -> Choose:
    """As `Sampler.choose`, by the kernels of each level."""
    library = load_library(CpuKernels(kernels, request.param))

    def by_kernels(logits: torch.Tensor, samples: Sequence[Sample]) -> Choices:
        rows = logits.clone().contiguous()
        table, chosen = SamplingTable(len(samples), rows.shape[1]), chosen_rows(len(samples))
        for index, sample in enumerate(samples):
            row = table.row_of(sample)
            assert not library.nightherd_choose(
                ctypes.c_void_p(rows[index].data_ptr()),
                rows.shape[1],
                table.rows[row : row + 1].ctypes.data,
                chosen[index : index + 1].ctypes.data,
            )
        choices = read_choices(chosen, list(samples))
        for sample in samples:
            table.forget(sample)
        return choices

    return by_kernels


@pytest.mark.parametrize("vocab", [2048, 2051, 500])
def test_every_parameter_gives_the_token_of_the_torch_sampler(vocab: int, choose: Choose) -> None:
    given = [{**one, "eos_token_ids": frozenset({1})} for one in GIVEN]
    for seed in range(20):
        logits = some_logits(len(given), vocab, seed)
        wanted = Sampler(vocab, CPU).choose(logits.clone(), samples_of(given))
        got = choose(logits, samples_of(given))
        assert got.token_ids == wanted.token_ids
        assert sorted(got.logprobs) == sorted(wanted.logprobs) != []
        for index, position in wanted.logprobs.items():
            for mine, theirs in zip(
                (got.logprobs[index].chosen, *got.logprobs[index].top),
                (position.chosen, *position.top),
                strict=True,
            ):
                assert mine.token_id == theirs.token_id
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("spread", [0.02, 0.5, 3.0, 12.0])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0, "top_p": 0.3},
        {"temperature": 1.0, "top_p": 0.7, "min_p": 0.02},
        {"temperature": 2.0, "top_k": 90, "top_p": 0.8},
    ],
)
def test_flat_and_sharp_logits(sampling: dict[str, Any], spread: float, choose: Choose) -> None:
    """Noise that is never computed, and nuclei that are never sought, change no token."""
    rows, vocab = 300, 5003
    logits = some_logits(rows, vocab) / 3 * spread
    fresh = [[sample_of(sampling, order=order) for order in range(rows)] for _ in range(2)]
    wanted = Sampler(vocab, CPU).choose(logits.clone(), fresh[0])
    assert choose(logits, fresh[1]).token_ids == wanted.token_ids


def test_ties_at_the_edge_of_the_nucleus(choose: Choose) -> None:
    """All that are as likely as the last one stay; what is less likely goes."""
    logits = torch.zeros(1, 64)
    logits[0, :8] = 4.0
    logits[0, 40:] = -9.0
    for top_p, left in ((0.1, 8), (0.95, 40)):
        seen = {
            choose(logits, [sample_of({"temperature": 1.0, "top_p": top_p}, order=seed)]).token_ids[
                0
            ]
            for seed in range(6000)
        }
        assert max(seen) < left
        assert len(seen) == left
