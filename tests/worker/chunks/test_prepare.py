from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nightherd.params import sample_seed
from tests.fakes import FakeEngine, byte_text
from tests.worker.harness import SEED, make_claim, make_request
from worker.chunks.prepare import PreparedRequest, Preparer


def _prepare(
    *requests: Any, job: dict[str, Any] | None = None, **given: Any
) -> list[PreparedRequest]:
    engine = given.pop("engine", None) or FakeEngine()
    text = given.pop("text", None) or byte_text(given.pop("context_length", 256))
    return Preparer(text, engine).prepare_each(make_claim(params=job or {}, **given), requests)


def _prepare_one(prompt: object = "a prompt", **given: Any) -> PreparedRequest:
    request = {name: given.pop(name) for name in ("samples", "params") if name in given}
    (prepared,) = _prepare(make_request(3, prompt, **request), **given)
    return prepared


def _code(prepared: PreparedRequest) -> str | None:
    assert (prepared.error is None) == (prepared.engine_request is not None)
    return None if prepared.error is None else prepared.error.code


def test_a_prompt_becomes_its_tokens_with_a_seed_for_each_sample() -> None:
    prepared = _prepare_one("a prompt", samples=(0, 1, 2))
    request = prepared.engine_request
    assert request is not None
    assert request.prompt_token_ids == tuple(byte_text().encode("a prompt", True))
    assert request.seeds == tuple(sample_seed(SEED, None, 3, sample) for sample in range(3))
    assert prepared.prompt_tokens == len("a prompt")


def test_only_samples_without_a_result_are_asked_for_with_the_seeds_they_always_have() -> None:
    request = _prepare_one(samples=(1, 4)).engine_request
    assert request is not None
    assert request.seeds == (sample_seed(SEED, None, 3, 1), sample_seed(SEED, None, 3, 4))


def test_a_requests_own_seed_does_not_depend_on_where_it_stands() -> None:
    first, second = (
        prepared.engine_request
        for prepared in _prepare(
            make_request(0, "x", params={"seed": 5}), make_request(9, "x", params={"seed": 5})
        )
    )
    assert first is not None
    assert second is not None
    assert first.seeds == second.seeds


def test_the_request_goes_before_the_job_and_the_job_before_the_checkpoint() -> None:
    text = byte_text()
    text.generation_layer = {"temperature": 0.1, "top_p": 0.2, "top_k": 3}
    prepared = _prepare_one(
        params={"temperature": 0.9}, job={"temperature": 0.5, "top_p": 0.6}, text=text
    ).params
    assert prepared is not None
    assert (prepared.temperature, prepared.top_p, prepared.top_k) == (0.9, 0.6, 3)


def test_requests_of_equal_parameters_share_a_set_whatever_their_seeds() -> None:
    same, other, different = _prepare(
        make_request(0),
        make_request(1, params={"seed": 9}),
        make_request(2, params={"temperature": 0.3}),
    )
    assert same.parameter_set is not None
    assert same.parameter_set == other.parameter_set
    assert different.parameter_set is not None
    assert same.parameter_set[0] != different.parameter_set[0]


@pytest.mark.parametrize(
    ("job", "max_new_tokens"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 200}, 90),
        ({}, 90),
        ({"max_length": 30}, 20),
        ({"max_length": 300}, 90),
        ({"max_length": 30, "max_tokens": 7}, 7),
        ({"max_length": 30, "max_tokens": 70}, 20),
    ],
)
def test_what_may_be_generated_is_cut_to_what_the_context_leaves(
    job: dict[str, int], max_new_tokens: int
) -> None:
    request = _prepare_one("0123456789", job=job, context_length=100).engine_request
    assert request is not None
    assert request.max_new_tokens == max_new_tokens


def test_the_default_of_max_tokens_does_not_cut_what_max_length_allows() -> None:
    request = _prepare_one(
        "0123456789", job={"max_length": 1000}, context_length=2000
    ).engine_request
    assert request is not None
    assert request.max_new_tokens == 990


def test_a_prompt_beyond_the_context_fails_and_says_both_lengths() -> None:
    prepared = _prepare_one("x" * 100, context_length=100)
    assert _code(prepared) == "context_length_exceeded"
    assert "100 tokens" in str(prepared.error)
    assert prepared.prompt_tokens == 100
    assert prepared.parameter_set is not None
    assert (
        _code(_prepare_one("x" * 100, context_length=100, job={"truncate_prompt_tokens": 50}))
        is None
    )


def test_a_prompt_beyond_max_length_fails() -> None:
    prepared = _prepare_one("x" * 30, job={"max_length": 30})
    assert _code(prepared) == "context_length_exceeded"
    assert "max_length" in str(prepared.error)


def test_bad_requests_fail_alone() -> None:
    prepared = _prepare(
        make_request(0, "good"),
        make_request(1, "half a \ud800 pair"),
        make_request(2, "contradiction", params={"min_tokens": 9, "max_tokens": 3}),
        make_request(3, "bad words", params={"bad_words": ["\ud800"]}),
        make_request(4, "x" * 300),
        make_request(5, [99999]),
        make_request(6, "good too"),
    )
    assert [_code(one) for one in prepared] == [
        None,
        *["invalid_request"] * 3,
        "context_length_exceeded",
        "invalid_request",
        None,
    ]
    assert [one.index for one in prepared] == list(range(7))


def test_a_parameter_that_the_engine_cannot_honour_is_named() -> None:
    engine = FakeEngine()
    engine.refuses = "structured_outputs"
    prepared = _prepare_one(engine=engine)
    assert _code(prepared) == "unsupported_parameter"
    assert "fake cannot honour structured_outputs" in str(prepared.error)


def test_something_unforeseen_fails_its_row_alone(caplog: pytest.LogCaptureFixture) -> None:
    text = byte_text()
    encode = text.prepare_many

    def fragile(items: Any) -> Any:
        if any(body["prompt"] == "boom" for body, _ in items):
            raise ZeroDivisionError("tokenizer")
        return encode(items)

    text.prepare_many = fragile  # type: ignore[method-assign]
    prepared = _prepare(
        make_request(0, "a"), make_request(1, "boom"), make_request(2, "c"), text=text
    )
    assert [_code(one) for one in prepared] == [None, "engine_error", None]
    assert "tokenizer" in str(prepared[1].error)


def test_ends_of_sequence_count_unless_they_are_ignored() -> None:
    request = _prepare_one().engine_request
    ignoring = _prepare_one(job={"ignore_eos": True, "stop_token_ids": [7]}).engine_request
    assert request is not None
    assert ignoring is not None
    assert request.eos_token_ids == byte_text().eos_token_ids
    assert ignoring.eos_token_ids == frozenset()
    assert ignoring.stop_token_ids == {7}


def test_a_bad_word_is_meant_with_and_without_a_space() -> None:
    request = _prepare_one(job={"bad_words": ["cat"]}).engine_request
    assert request is not None
    encode = byte_text().encode
    assert set(request.bad_words) == {tuple(encode("cat", False)), tuple(encode(" cat", False))}


def test_each_sample_has_its_own_check_for_stop_strings() -> None:
    request = _prepare_one(job={"stop": ["ab"]}).engine_request
    assert request is not None
    assert request.make_stop_check is not None
    first, second = request.make_stop_check(), request.make_stop_check()
    a, b = byte_text().encode("ab", False)
    assert [first(a), first(b)] == [False, True]
    assert second(b) is False
    assert _prepare_one().engine_request.make_stop_check is None  # type: ignore[union-attr]


def test_the_job_and_its_priority_go_with_its_requests() -> None:
    request = _prepare_one(priority=5, job_id="0job").engine_request
    assert request is not None
    assert request.priority == 5
    assert request.job == "0job"


def test_a_structure_becomes_a_grammar_for_each_sample() -> None:
    text = byte_text()
    prepared = _prepare_one(
        samples=(0, 1), text=text, params={"structured_outputs": {"choice": ["a"]}}
    )
    assert prepared.engine_request is not None
    make = prepared.engine_request.make_grammar
    assert make is not None
    first, second = make(), make()
    (letter,) = text.encode("a", False)
    assert first.advance(letter)
    assert second.advance(letter)
    with pytest.raises(ValueError, match="cannot go on"):
        make().advance(text.encode("b", False)[0])


@pytest.mark.parametrize("params", [{}, {"response_format": {"type": "text"}}])
def test_without_a_structure_there_is_no_grammar(params: dict[str, Any]) -> None:
    request = _prepare_one(params=params).engine_request
    assert request is not None
    assert request.make_grammar is None


def test_an_invalid_structure_fails_its_row_alone() -> None:
    prepared = _prepare(
        make_request(0, "x", params={"structured_outputs": {"regex": "("}}),
        make_request(1, "x", params={"structured_outputs": {"grammar": "start: <|nothere|>"}}),
        make_request(2, "x", params={"response_format": {"type": "json_object"}, "stop": ["x"]}),
        make_request(3, "x", params={"response_format": {"type": "json_object"}}),
    )
    assert [_code(one) for one in prepared] == [*["invalid_request"] * 3, None]
    messages = [str(one.error) for one in prepared]
    assert "unclosed group" in messages[0]
    # Only the tokenizer tells which special tokens there are.
    assert "nothere" in messages[1]
    assert "stop would end" in messages[2]
    assert all("\n" not in message for message in messages)


def test_ignore_eos_reaches_the_grammar() -> None:
    text = byte_text()
    ends = []
    for ignore_eos in (False, True):
        params = {"structured_outputs": {"regex": "a*"}, "ignore_eos": ignore_eos}
        request = _prepare_one(text=text, params=params).engine_request
        assert request is not None
        assert request.make_grammar is not None
        mask = np.zeros(-(-text.vocab_size // 32), dtype=np.int32)
        request.make_grammar().fill_mask(mask)
        (end,) = text.eos_token_ids
        ends.append(bool(mask[end // 32] >> end % 32 & 1))
    assert ends == [True, False]
