"""Which sequences the kernel samples, and how torch's sampler samples the others."""

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
from tests.worker.engine.cuda.test_cuda_runner import (
    KERNEL_PARAMS,
    TORCH_PARAMS,
    runner_of,
    started,
)
from worker.engine.cuda import cuda_runner, step
from worker.engine.interface import EngineRequest, Output
from worker.engine.runner import Choices
from worker.engine.sequence import Sequence
from worker.engine.torch.sampler import Sampler
from worker.engine.torch.torch_runner import TorchRunner

__all__ = ["started"]

# Which sequences the kernel can sample.


class Newer(SamplingParams):
    """With a parameter that the kernel does not know."""

    xtc_probability: float = 0.0
    """Drop the likeliest tokens, sometimes."""


@dataclass(frozen=True, slots=True)
class NewerRequest(EngineRequest):
    prefix: tuple[int, ...] = ()


TORCH_PARAM_VALUES: dict[str, Any] = {
    "min_tokens": 3,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "logprobs": 0,
    "logit_bias": {3: 0.0},
    "bad_words": ("sea",),
    "allowed_token_ids": (3, 4),
}
KERNEL_PARAM_VALUES: dict[str, Any] = {
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
    # A format other than text makes a grammar, which is checked by itself.
    "response_format": {"type": "text"},
    "structured_outputs": {"regex": "a+"},
}
TORCH_FIELD_VALUES: dict[str, Any] = {"bad_words": ((3, 4),), "make_grammar": lambda: None}
KERNEL_FIELD_VALUES: dict[str, Any] = {
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


def is_gpu_samplable(request: EngineRequest) -> bool:
    return step.gpu_samplable(Sequence(request, 0, 0))


def with_params(params: SamplingParams) -> EngineRequest:
    return dataclasses.replace(ask(), params=params)


def test_each_field_is_listed_as_honoured_by_the_kernel_or_not() -> None:
    """List a new one here, and in `cuda.step` if the kernel honours it."""
    assert (
        set(SamplingParams.model_fields) == TORCH_PARAM_VALUES.keys() | KERNEL_PARAM_VALUES.keys()
    )
    fields = {field.name for field in dataclasses.fields(EngineRequest)}
    assert fields == TORCH_FIELD_VALUES.keys() | KERNEL_FIELD_VALUES.keys()


@pytest.mark.parametrize("kind", [SamplingParams, Newer])
@pytest.mark.parametrize("name", SamplingParams.model_fields)
def test_torch_samples_where_a_parameter_is_not_the_kernels(
    name: str, kind: type[SamplingParams]
) -> None:
    value = {**TORCH_PARAM_VALUES, **KERNEL_PARAM_VALUES}[name]
    assert kind().model_dump()[name] != value
    assert is_gpu_samplable(with_params(kind.model_validate({name: value}))) == (
        name in KERNEL_PARAM_VALUES
    )


@pytest.mark.parametrize("kind", [EngineRequest, NewerRequest])
@pytest.mark.parametrize("name", [*TORCH_FIELD_VALUES, *KERNEL_FIELD_VALUES])
def test_torch_samples_where_a_field_is_not_the_kernels(
    name: str, kind: type[EngineRequest]
) -> None:
    usual = ask()
    given = {each.name: getattr(usual, each.name) for each in dataclasses.fields(usual)}
    value = {**TORCH_FIELD_VALUES, **KERNEL_FIELD_VALUES}[name]
    assert given[name] != value
    assert is_gpu_samplable(kind(**{**given, name: value})) == (name in KERNEL_FIELD_VALUES)


def test_torch_samples_where_a_new_field_is_set() -> None:
    assert is_gpu_samplable(with_params(Newer()))
    assert not is_gpu_samplable(with_params(Newer(xtc_probability=0.5)))
    given = {"prompt_token_ids": (3,), "params": Newer(), "seeds": (1,), "max_new_tokens": 5}
    assert is_gpu_samplable(NewerRequest(**given))
    assert not is_gpu_samplable(NewerRequest(**given, prefix=(4,)))


def test_torch_samples_with_a_grammar() -> None:
    sequence = Sequence(ask(), 0, 0)
    assert step.gpu_samplable(sequence)
    sequence.grammar = object()  # type: ignore[assignment]
    assert not step.gpu_samplable(sequence)


# Torch's sampler, some rows at a time.


def outputs(engine: Any, requests: list[EngineRequest]) -> list[Output]:
    handles = [engine.add(request) for request in requests]
    return [handle.futures[0].result(30) for handle in handles]


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 16])
def test_torch_samples_some_rows_at_a_time(
    rows_at_a_time: int, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and log-probabilities are those of all rows at once, each with its own sequence."""
    monkeypatch.setattr(cuda_runner, "ROWS_PER_SAMPLER", rows_at_a_time)
    rng = random.Random(2)
    requests = [
        ask(
            rng.choices(range(VOCAB), k=3 + 5 * (index % 4)),
            seeds=(index,),
            max_new_tokens=6 + index % 5,
            **{
                **(KERNEL_PARAMS + TORCH_PARAMS)[index % 12],
                **({"logprobs": index % 4} if index % 3 else {}),
            },
        )
        for index in range(14)
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
    assert widest == min(rows_at_a_time, 14)
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine.token_ids, mine.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert (mine.logprobs is None) == (theirs.logprobs is None)
        for ours, other in zip(mine.logprobs or (), theirs.logprobs or (), strict=True):
            assert ours.chosen.token_id == other.chosen.token_id
            assert ours.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)
            assert [each.token_id for each in ours.top] == [each.token_id for each in other.top]
    engine.stop(timeout=20)
    assert not any(sampler._batch.sequences for sampler in runner._samplers)


def test_float32_logits_of_some_rows_fit_on_a_card() -> None:
    """Those that are sampled at a time, of a vocabulary of 128k tokens."""
    assert cuda_runner.ROWS_PER_SAMPLER * 128_256 * 4 < 70 << 20
