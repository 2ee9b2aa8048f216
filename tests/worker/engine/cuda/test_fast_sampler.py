"""Whose tokens the kernel chooses, and what the sampler of all parameters takes for the others."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nightherd.params import SamplingParams
from tests.checkpoints import tiny_llama
from tests.engines import VOCAB, ask
from tests.worker.engine.cuda.test_cuda_runner import GIVEN, SLOW, runner_of, started
from worker.engine import cuda_runner, cuda_step
from worker.engine.interface import EngineRequest, Output
from worker.engine.runner import Choices
from worker.engine.sampler import Sampler
from worker.engine.sequence import Sequence
from worker.engine.torch_runner import TorchRunner

__all__ = ["started"]

# Who is plain.


class Newer(SamplingParams):
    """With a parameter that nobody has told the kernel of."""

    xtc_probability: float = 0.0
    """Drop the likeliest tokens, sometimes."""


@dataclass(frozen=True, slots=True)
class NewerRequest(EngineRequest):
    prefix: tuple[int, ...] = ()


SLOW_PARAMS: dict[str, Any] = {
    "min_tokens": 3,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "logprobs": 0,
    "logit_bias": {3: 0.0},
    "bad_words": ("sea",),
    "allowed_token_ids": (3, 4),
}
PLAIN_PARAMS: dict[str, Any] = {
    "max_tokens": 7,
    "max_length": 90,
    "temperature": 0.0,
    "top_p": 0.5,
    "top_k": 9,
    "min_p": 0.1,
    "seed": 5,
    "n": 3,
    "stop": ("sea",),
    "stop_token_ids": (9,),
    "ignore_eos": True,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "truncate_prompt_tokens": 4,
    "add_special_tokens": False,
    # A format other than text makes a grammar, which is looked at itself.
    "response_format": {"type": "text"},
    "structured_outputs": {"regex": "a+"},
}
SLOW_FIELDS: dict[str, Any] = {"bad_words": ((3, 4),), "make_grammar": lambda: None}
PLAIN_FIELDS: dict[str, Any] = {
    "prompt_token_ids": (9, 9),
    "params": SamplingParams(temperature=0.3),
    "seeds": (77,),
    "max_new_tokens": 99,
    "eos_token_ids": frozenset({2}),
    "stop_token_ids": frozenset({9}),
    "make_stop_check": lambda: lambda token: False,
    "priority": 3,
    "job": "a job",
}


def is_plain(request: EngineRequest) -> bool:
    return cuda_step.plain(Sequence(request, 0, 0))


def with_params(params: SamplingParams) -> EngineRequest:
    return dataclasses.replace(ask(), params=params)


def test_it_is_known_of_each_field_whether_the_kernel_honours_it() -> None:
    """A new one: say it here, and in `cuda_step` if it does."""
    assert set(SamplingParams.model_fields) == SLOW_PARAMS.keys() | PLAIN_PARAMS.keys()
    fields = {field.name for field in dataclasses.fields(EngineRequest)}
    assert fields == SLOW_FIELDS.keys() | PLAIN_FIELDS.keys()


@pytest.mark.parametrize("kind", [SamplingParams, Newer])
@pytest.mark.parametrize("name", SamplingParams.model_fields)
def test_a_parameter_that_the_kernel_does_not_know_goes_another_way(
    name: str, kind: type[SamplingParams]
) -> None:
    value = {**SLOW_PARAMS, **PLAIN_PARAMS}[name]
    assert kind().model_dump()[name] != value
    assert is_plain(with_params(kind.model_validate({name: value}))) == (name in PLAIN_PARAMS)


@pytest.mark.parametrize("kind", [EngineRequest, NewerRequest])
@pytest.mark.parametrize("name", [*SLOW_FIELDS, *PLAIN_FIELDS])
def test_a_field_that_the_kernel_does_not_know_goes_another_way(
    name: str, kind: type[EngineRequest]
) -> None:
    usual = ask()
    given = {each.name: getattr(usual, each.name) for each in dataclasses.fields(usual)}
    value = {**SLOW_FIELDS, **PLAIN_FIELDS}[name]
    assert given[name] != value
    assert is_plain(kind(**{**given, name: value})) == (name in PLAIN_FIELDS)


def test_a_new_field_goes_another_way() -> None:
    assert is_plain(with_params(Newer()))
    assert not is_plain(with_params(Newer(xtc_probability=0.5)))
    given = {"prompt_token_ids": (3,), "params": Newer(), "seeds": (1,), "max_new_tokens": 5}
    assert is_plain(NewerRequest(**given))
    assert not is_plain(NewerRequest(**given, prefix=(4,)))


def test_a_grammar_goes_another_way() -> None:
    sequence = Sequence(ask(), 0, 0)
    assert cuda_step.plain(sequence)
    sequence.grammar = object()  # type: ignore[assignment]
    assert not cuda_step.plain(sequence)


# The sampler of all parameters, a part of the rows at a time.


def outputs(engine: Any, requests: list[EngineRequest]) -> list[Output]:
    generations = [engine.add(request) for request in requests]
    return [generation.futures[0].result(30) for generation in generations]


@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_it_looks_at_few_rows_at_a_time(
    at_once: int, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and log-probabilities are those of all rows at once, each with its own sequence."""
    monkeypatch.setattr(cuda_runner, "CHOSEN_AT_ONCE", at_once)
    rng = random.Random(2)
    requests = [
        ask(
            rng.choices(range(VOCAB), k=3 + 5 * (place % 4)),
            seeds=(place,),
            max_new_tokens=6 + place % 5,
            **{**(GIVEN + SLOW)[place % 12], **({"logprobs": place % 4} if place % 3 else {})},
        )
        for place in range(14)
    ]
    plain = TorchRunner(tiny_llama(), vocab_size=VOCAB, num_blocks=128)
    wanted = outputs(started(plain), requests)
    widest = 0
    choose = Sampler.choose

    def watched(self: Sampler, logits: torch.Tensor, sequences: list[Sequence]) -> Choices:
        nonlocal widest
        assert logits.shape == (len(sequences), VOCAB)
        assert logits.dtype == torch.float32
        widest = max(widest, len(sequences))
        return choose(self, logits, sequences)

    monkeypatch.setattr(Sampler, "choose", watched)
    runner = runner_of(tiny_llama())
    engine = started(runner)
    got = outputs(engine, requests)
    assert widest == min(at_once, 14)
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine.token_ids, mine.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert (mine.logprobs is None) == (theirs.logprobs is None)
        for ours, other in zip(mine.logprobs or (), theirs.logprobs or (), strict=True):
            assert ours.chosen.token_id == other.chosen.token_id
            assert ours.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)
            assert [each.token_id for each in ours.top] == [each.token_id for each in other.top]
    engine.stop(timeout=20)
    assert not any(sampler._batch.sequences for sampler in runner._samplers)


def test_its_rows_are_few_enough_for_a_card() -> None:
    """What it widens to float32 at a time, of a vocabulary of 128k tokens."""
    assert cuda_runner.CHOSEN_AT_ONCE * 128_256 * 4 < 70 << 20
