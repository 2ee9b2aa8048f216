"""The sampler against the reference engine's logits, transformers' processors, and the law."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.engines import ask
from worker.engine.interface import RequestHandle
from worker.engine.noise import gumbel_noise, noise_key
from worker.engine.runner import Choices
from worker.engine.sequence import Sequence as Sample
from worker.engine.torch.sampler import Sampler, _NarrowRows, _noise_at
from worker.engine.transformers.batch_logits import BatchLogits, BatchRow

CPU = torch.device("cpu")
PROMPT = (5, 9, 33, 71, 20)
OUTPUT = (9, 9, 40, 5, 9)

# Each alone and all in one batch.
GIVEN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 1e-6, "top_k": 3},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 63},
    {"temperature": 1.0, "top_k": 200},
    {"temperature": 1.0, "top_k": 1500, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 100_000},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 20.0, "top_p": 0.9},  # spills: 0.9 of 2,000 tokens
    {"temperature": 20.0, "min_p": 0.9},
    {"temperature": 90.0, "min_p": 0.9},  # spills
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.1, "top_k": 700, "top_p": 0.9, "min_p": 0.001},
    {"repetition_penalty": 1.5, "temperature": 1.0},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.5, "temperature": 0.8},
    {"frequency_penalty": -1.0, "presence_penalty": 0.3, "repetition_penalty": 1.2},
    {"logit_bias": {7: 100, 8: 99}, "temperature": 1.0},
    {"logit_bias": {9: -100.0, 1: 2.5}, "min_tokens": 6, "eos_token_ids": frozenset({1, 2050})},
    {"allowed_token_ids": [3, 4, 5, 6, 9], "temperature": 1.0, "repetition_penalty": 3.0},
    {"bad_words": ((5,), (9, 33), (5, 9, 34), (8, 9, 35)), "temperature": 1.0},
    {"min_tokens": 5, "eos_token_ids": frozenset({1}), "stop_token_ids": frozenset({2})},
    {"min_tokens": 6, "eos_token_ids": frozenset({1}), "stop_token_ids": frozenset({2})},
    {"logprobs": 3, "temperature": 1.0},
    {"logprobs": 0},
    {"logprobs": 20, "logit_bias": {7: 100}},
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def some_logits(rows: int, vocab: int = 2048, seed: int = 4) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sample_of(given: dict[str, Any], output: Sequence[int] = OUTPUT, order: int = 0) -> Sample:
    sample = Sample(ask(PROMPT, **{"seeds": (order,), **given}), 0, order)
    sample.token_ids += output
    return sample


def samples_of(given: Sequence[dict[str, Any]]) -> list[Sample]:
    return [sample_of(each, order=order) for order, each in enumerate(given)]


def reference(
    logits: torch.Tensor, samples: Sequence[Sample], vocab_size: int
) -> tuple[torch.Tensor, BatchLogits]:
    """Processed logits with noise, of the reference engine."""
    rows = [BatchRow(RequestHandle(sample.request), sample.index) for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        row.tokens = sample.token_ids[sample.prompt_length :]
    batch = BatchLogits(rows, len(PROMPT), vocab_size, CPU)
    ids: Any = torch.tensor([sample.token_ids for sample in samples])
    scores: Any = logits.clone()
    return batch(ids, scores), batch


def chosen_logits(
    sampler: Sampler, logits: torch.Tensor, samples: list[Sample]
) -> tuple[Choices, torch.Tensor]:
    """The choices, and the processed logits without those that cannot be chosen, without noise."""
    logits = logits.clone()
    choices = sampler.choose(logits, samples)
    for narrow in sampler._batch.narrow:
        rows = logits[narrow.rows]
        window = rows.sort(descending=True).values[:, : narrow.window]
        least, enough = narrow.least(rows, window)
        for index, row in enumerate(narrow.rows):
            floor = least[index]
            if not enough[index]:
                whole = _NarrowRows([row], sampler.vocab_size, sampler._batch.states, sampler)
                alone = rows[index : index + 1]
                floor = whole.least(alone, alone.sort(descending=True).values)[0][0]
            logits[row] = rows[index].masked_fill(rows[index] < floor, -torch.inf)
    return choices, logits


@pytest.mark.parametrize("vocab_size", [2048, 2000, 500, 90])
def test_logits_and_tokens_are_those_of_the_reference_engine(vocab_size: int) -> None:
    given = [
        one if vocab_size == 2048 else {**one, "eos_token_ids": frozenset({1})} for one in GIVEN
    ]
    samples = samples_of(given)
    logits = some_logits(len(samples))
    wanted, batch = reference(logits, samples, vocab_size)
    logits = logits[:, :vocab_size].contiguous()
    choices, got = chosen_logits(Sampler(vocab_size, CPU), logits, samples)
    for r, sample in enumerate(samples):
        if sample.request.params.temperature >= 1e-5:
            keys = [noise_key(sample.request.seeds[0], len(OUTPUT))]
            got[r] += gumbel_noise(keys, vocab_size, CPU)[0]
        differing = (got[r] != wanted[r]).nonzero()[:, 0]
        assert len(differing) == 0, (given[r], differing[:5], got[r][differing][:5])
    assert choices.token_ids == wanted.argmax(-1).tolist()
    assert choices.best == batch.best
    assert choices.logprobs == batch.take_logprobs(choices.token_ids)
    assert sorted(choices.logprobs) == [30, 31, 32]


def test_the_same_as_transformers_processors() -> None:
    """Of a few parameters by themselves, without the reference engine between."""
    warpers: list[tuple[dict[str, Any], list[Any]]] = [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 9}, [TopKLogitsWarper(9)]),
        ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
        (
            {"bad_words": ((5,), (9, 33))},
            [NoBadWordsLogitsProcessor([[5], [9, 33]], eos_token_id=None)],
        ),
    ]
    samples = samples_of([given for given, _ in warpers])
    logits = some_logits(len(warpers))
    _, got = chosen_logits(Sampler(2048, CPU), logits, samples)
    for r, (given, processors) in enumerate(warpers):
        row: Any = logits[r : r + 1].clone()
        for processor in processors:
            row = processor(torch.tensor([samples[r].token_ids]), row)
        assert torch.equal(got[r], row[0]), given
        assert not torch.equal(got[r], logits[r]), given


def test_equal_logits_at_the_edge_are_all_kept() -> None:
    """Also where there are more of them than the window holds."""
    logits = torch.zeros(4, 3000)
    logits[:, 17] = 1.0
    given = [
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 2000, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.0001},
    ]
    samples = samples_of(given)
    _, got = chosen_logits(Sampler(3000, CPU), logits, samples)
    assert got.isfinite().sum(-1).tolist() == [3000, 1, 3000, 1]
    kept = set()
    for seed in range(40):
        fresh = [sample_of({**one, "seeds": (seed,)}) for one in given]
        tokens = Sampler(3000, CPU).choose(logits.clone(), fresh).token_ids
        assert tokens[1] == tokens[3] == 17
        kept.add(tokens[0])
    assert len(kept) > 30


def test_noise_of_some_ids_is_that_of_all() -> None:
    keys = [noise_key(seed, 3) for seed in (0, 1, 2**62)]
    ids = torch.randint(0, 4000, (3, 100))
    assert torch.equal(_noise_at(keys, ids), gumbel_noise(keys, 4000, CPU).gather(1, ids))


def test_a_choice_is_batch_invariant(threads: int) -> None:
    """Bit by bit, logprobs and best included; also in the same sampler as before.
    The vocabulary is so large that torch splits the sum over a single row among threads."""
    logits = some_logits(len(GIVEN), 40_000)
    sampler = Sampler(40_000, CPU)
    together = sampler.choose(logits.clone(), samples_of(GIVEN))
    backwards = sampler.choose(logits.flip(0), samples_of(GIVEN)[::-1])
    assert backwards.token_ids == together.token_ids[::-1]
    assert backwards.best == together.best[::-1]
    for r, sample in enumerate(samples_of(GIVEN)):
        alone = Sampler(40_000, CPU).choose(logits[r : r + 1].clone(), [sample])
        assert (alone.token_ids[0], alone.best[0]) == (together.token_ids[r], together.best[r])
        assert alone.logprobs.get(0) == together.logprobs.get(r)


def test_penalties_follow_the_tokens() -> None:
    """Step by step with one sampler, against a new one each step; the state may be lost."""
    given = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}
    running = [sample_of({**given, "temperature": 1.0}, (), order) for order in range(3)]
    sampler = Sampler(300, CPU)
    for step in range(150):
        logits = some_logits(3, 300, step)
        tokens = sampler.choose(logits.clone(), running).token_ids
        if step % 25 == 0:
            fresh = [
                sample_of({**given, "temperature": 1.0}, s.token_ids[5:], s.order) for s in running
            ]
            wanted, _ = reference(logits, fresh, 300)
            assert tokens == wanted.argmax(-1).tolist()
            assert Sampler(300, CPU).choose(logits.clone(), fresh).token_ids == tokens
        if step == 60:
            sampler.forget(running[1])
            assert running[1].sampling is None
        for sample, token in zip(running, tokens, strict=True):
            sample.token_ids.append(token)
    assert any(len(sample.sampling.index_of) > 64 for sample in running)


class Words:
    """A grammar that lets `ids` come, or nothing."""

    def __init__(self, ids: Sequence[int] | None) -> None:
        self.ids = ids

    def fill_mask(self, mask: Any) -> None:
        assert mask.dtype == np.int32
        assert mask.shape == (16,)
        if self.ids is None:
            mask[:] = -1
            raise ValueError("nothing can go on")
        bits = np.zeros(512, bool)
        bits[list(self.ids)] = True
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def advance(self, token_id: int) -> bool:
        return False


def test_grammars() -> None:
    samples = samples_of([{}, {}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {}])
    logits = some_logits(5, 500)
    free = Sampler(500, CPU).choose(logits.clone(), samples)
    samples[1].grammar = Words([31, 32, 499])
    samples[2].grammar = Words(None)
    samples[3].grammar = Words([63])
    # Bits beyond the vocabulary mean nothing.
    samples[4].grammar = Words([505])
    got = Sampler(500, CPU).choose(logits.clone(), samples)
    assert got.token_ids[0] == free.token_ids[0]
    likeliest = max([31, 32, 499], key=lambda token: float(logits[1, token]))
    assert got.token_ids[1] == likeliest
    assert got.token_ids[3] == 63
    assert got.best[1] == float(logits[1, likeliest])
    assert [got.best[2], got.best[4]] == [-math.inf, -math.inf]


def test_a_grammar_may_come_later() -> None:
    """The engine may compile it while the sequence is known already."""
    (sample,) = samples = samples_of([{}])
    sampler = Sampler(500, CPU)
    logits = some_logits(1, 500)
    assert sampler.choose(logits.clone(), samples).token_ids != [44]
    sample.grammar = Words([44])
    assert sampler.choose(logits.clone(), samples).token_ids == [44]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
    ],
)
def test_rows_that_cannot_choose_fail_alone(sampling: dict[str, Any]) -> None:
    samples = samples_of(
        [
            {**sampling, "allowed_token_ids": [1], "min_tokens": 9, "eos_token_ids": {1}},
            sampling,
            sampling,
            sampling,
        ]
    )
    logits = some_logits(4)
    wanted = Sampler(2048, CPU).choose(logits[3:].clone(), samples[3:])
    logits[1, 77] = math.nan
    logits[2, 78] = math.inf
    got = Sampler(2048, CPU).choose(logits, samples)
    assert got.best[0] == -math.inf
    assert math.isnan(got.best[1])
    assert got.best[2] == math.inf
    assert (got.token_ids[3], got.best[3]) == (wanted.token_ids[0], wanted.best[0])
    assert all(0 <= token < 2048 for token in got.token_ids)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 6},
        {"temperature": 1.0, "top_p": 0.7},
    ],
)
def test_tokens_come_as_often_as_they_should(sampling: dict[str, Any]) -> None:
    """Pearson's chi-square over 8,000 seeds: beyond the limit once in 10,000 samplers."""
    count, vocab = 8000, 12
    logits = torch.linspace(1.5, -1.5, vocab)
    samples = [sample_of({**sampling, "seeds": (seed,)}) for seed in range(count)]
    tokens = Sampler(vocab, CPU).choose(logits.repeat(count, 1), samples).token_ids

    law = torch.softmax(logits / sampling["temperature"], 0).double()
    if "top_k" in sampling:
        law[sampling["top_k"] :] = 0
    if "top_p" in sampling:
        law[law.cumsum(0) - law >= sampling["top_p"]] = 0
    law /= law.sum()
    observed = torch.bincount(torch.tensor(tokens), minlength=vocab)
    kept = law > 0
    assert observed[~kept].sum() == 0
    expected = law[kept] * count
    assert expected.min() > 5
    freedom = int(kept.sum()) - 1
    chi = float(((observed[kept] - expected) ** 2 / expected).sum())
    # Wilson and Hilferty's approximation of the quantile 0.9999.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi < limit
    # It would see a distribution that is slightly off.
    tilted = law[kept] * torch.linspace(0.85, 1.15, freedom + 1)
    wrong = tilted / tilted.sum() * count
    assert float(((observed[kept] - wrong) ** 2 / wrong).sum()) > limit
