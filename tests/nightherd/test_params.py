"""Parameters: names, aliases, ranges, layers; bodies; seeds."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightherd.errors import ParameterError
from nightherd.params import (
    DEFAULT_MAX_TOKENS,
    PARAMETER_NAMES,
    SamplingParams,
    effective_params,
    generation_config_layer,
    is_parameter,
    parameter_set,
    parse_body,
    parse_params,
    sample_seed,
)


@pytest.mark.parametrize(
    ("given_params", "expected"),
    [
        ({"max_new_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"num_return_sequences": 3}, {"n": 3}),
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": True}, {}),
        ({"max_length": 50}, {"max_length": 50}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": False}, {}),
        ({"logit_bias": {"3": -5}}, {"logit_bias": {"3": -5.0}}),
        ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"temperature": None, "top_k": 3}, {"top_k": 3}),
    ],
)
def test_names_that_people_know(given_params: dict[str, Any], expected: dict[str, Any]) -> None:
    assert parse_params(given_params) == expected


@pytest.mark.parametrize(
    ("given_params", "message"),
    [
        ({"temprature": 1}, "unknown parameter 'temprature'; did you mean temperature?"),
        ({"best_of": 2}, "unknown parameter 'best_of'"),
        ({"temperature": -1}, "temperature must be greater than or equal to 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_p": 3}, "top_p must be less than or equal to 1, got 3"),
        ({"max_tokens": 0}, "max_tokens must be greater than or equal to 1, got 0"),
        ({"max_tokens": True}, "max_tokens must be a valid integer, got True"),
        ({"n": 0}, "n must be greater than or equal to 1, got 0"),
        ({"do_sample": "no"}, "do_sample must be true or false, got 'no'"),
        ({"do_sample": False, "temperature": 1}, "contradict"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "contradict"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens (5) is greater than max_tokens (2)"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_what_is_wrong_is_said_by_name(given_params: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        parse_params(given_params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_layer_that_sets_a_name_wins() -> None:
    request, job, checkpoint = (
        {"top_k": 1},
        {"top_k": 2, "top_p": 0.2},
        {"top_p": 0.3, "min_p": 0.1},
    )
    params = effective_params(request, job, checkpoint)
    assert (params.top_k, params.top_p, params.min_p) == (1, 0.2, 0.1)
    assert (params.temperature, params.max_tokens) == (1.0, DEFAULT_MAX_TOKENS)


def test_max_length_takes_the_place_of_the_default() -> None:
    assert effective_params({"max_length": 50}).max_tokens == 50
    assert effective_params({"max_length": 50, "max_tokens": 5}).max_tokens == 5


def test_min_tokens_above_the_default_raises_the_default() -> None:
    assert effective_params({"min_tokens": 1000}).max_tokens == 1000


def test_only_some_names_come_from_the_generation_config() -> None:
    config = {"temperature": 0.6, "top_p": 0.9, "max_length": 20, "do_sample": True, "top_k": None}
    assert generation_config_layer(config) == {"temperature": 0.6, "top_p": 0.9}


def test_equal_parameters_have_one_set_whatever_the_seed() -> None:
    same = {parameter_set(effective_params({"top_k": 5, "seed": seed}))[0] for seed in (1, 2, None)}
    assert len(same) == 1
    assert parameter_set(effective_params({"top_k": 6}))[0] not in same
    assert "seed" not in parameter_set(effective_params({}))[1]


def test_every_name_is_a_parameter_and_nothing_else() -> None:
    assert all(is_parameter(name) for name in PARAMETER_NAMES)
    assert is_parameter("max_new_tokens")
    assert not is_parameter("question")


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**7), st.integers(0, 10**4))
def test_seeds_are_63_bits_and_depend_on_index_and_sample(
    job: int, index: int, sample: int
) -> None:
    seed = sample_seed(job, None, index, sample)
    assert 0 <= seed < 2**63
    assert seed == sample_seed(job, None, index, sample)
    assert seed != sample_seed(job, None, index, sample + 1)
    assert seed != sample_seed(job, None, index + 1, sample)


def test_a_requests_own_seed_makes_it_independent_of_its_index() -> None:
    assert sample_seed(1, 42, 0, 0) == sample_seed(2, 42, 7, 0)


def test_bodies() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_body({"messages": [{"role": "user", "content": parts}]}) == {
        "messages": [{"role": "user", "content": "ab"}]
    }
    assert parse_body({"prompt": [1, 2]}) == {"prompt": [1, 2]}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": 3},
        {"prompt": []},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"prompt": "a", "question": 1},
    ],
    ids=repr,
)
def test_bodies_that_ask_nothing_or_too_much(body: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        parse_body(body)


@pytest.mark.parametrize("name", PARAMETER_NAMES)
def test_every_parameter_is_described_in_whole_sentences(name: str) -> None:
    text = SamplingParams.model_fields[name].description
    assert text is not None
    assert re.fullmatch(r"\S.*\.", text, re.DOTALL)
    assert text.count("(") == text.count(")")
