from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from nightherd.params import SamplingParams
from nightherd.text import TextProcessor
from tests.checkpoints import CORPUS, write_text_files
from worker.engine.interface import Output, PositionLogprobs, TokenLogprob
from worker.text.detokenizer import (
    LOWEST_LOGPROB,
    StopStringCheck,
    find_stop,
    finish_text,
    to_result,
)

KINDS = ("byte-level", "metaspace")


@pytest.fixture(scope="module", params=KINDS)
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextProcessor:
    return TextProcessor.load(
        write_text_files(tmp_path_factory.mktemp(request.param), request.param)
    )


def params(**given: Any) -> SamplingParams:
    return SamplingParams.model_validate(given)


def continuation(text: TextProcessor, prompt: str, more: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what follows it."""
    before = text.encode(prompt, True)
    whole = text.encode(prompt + more, True)
    assert whole[: len(before)] == before
    return before, whole[len(before) :]


def run_check(
    text: TextProcessor, prompt: list[int], ids: list[int], given: SamplingParams
) -> list[int]:
    """What of `ids` is generated until the check ends it."""
    check = StopStringCheck(
        text,
        given.stop,
        prompt_tail=prompt[-4:],
        skip_special_tokens=given.skip_special_tokens,
        min_tokens=given.min_tokens,
    )
    for place, token in enumerate(ids):
        if check(token):
            return ids[: place + 1]
    return ids


@pytest.mark.parametrize(
    ("given", "stops", "floor", "found"),
    [
        ("abcd", ["cd", "bc"], 0, (1, "bc")),
        ("abcd", ["bcd", "cd"], 0, (1, "bcd")),
        ("abcabc", ["abc"], 3, (3, "abc")),
        ("abcabc", ["abc"], 2, (0, "abc")),
        ("aaa", ["aa"], 2, (1, "aa")),
        ("abcd", ["x"], 0, None),
        ("abcd", [], 0, None),
        ("", ["x"], 0, None),
    ],
)
def test_the_stop_string_that_is_complete_first(
    given: str, stops: list[str], floor: int, found: tuple[int, str] | None
) -> None:
    assert find_stop(given, stops, floor) == found


@pytest.mark.parametrize("stop", [".", " on and on", "until the m", "ship sail", "n and", " the "])
def test_stops_within_and_across_tokens(text: TextProcessor, stop: str) -> None:
    prompt, ids = continuation(text, "the the the", CORPUS[3].removeprefix("the the the") + ".")
    more = text.decode(ids, prompt)
    given = params(stop=stop)
    generated = run_check(text, prompt, ids, given)
    final, reason = finish_text(text, generated, given, prompt)
    assert final == more[: more.index(stop)]
    assert reason == stop
    # Not one token more than it takes.
    assert stop not in text.decode(generated[:-1], prompt)
    kept, _ = finish_text(
        text, generated, params(stop=stop, include_stop_str_in_output=True), prompt
    )
    assert kept == final + stop


def test_a_stop_string_that_never_comes(text: TextProcessor) -> None:
    prompt, ids = continuation(text, "the the the", CORPUS[3].removeprefix("the the the"))
    given = params(stop=["\n", "Ada"])
    assert run_check(text, prompt, ids, given) == ids
    assert finish_text(text, ids, given, prompt) == (text.decode(ids, prompt), None)


def test_a_stop_string_in_the_prompt_alone_does_not_end(text: TextProcessor) -> None:
    prompt, ids = continuation(text, "the the the", " ship sailed")
    assert run_check(text, prompt, ids, params(stop="the")) == ids
    # Nor one that begins in the prompt.
    assert run_check(text, prompt, ids, params(stop="the ship")) == ids


def test_stop_strings_of_several_bytes_a_character(text: TextProcessor) -> None:
    prompt, ids = continuation(text, "Größe, façade,", " naïve, 東京, здравствуйте, emoji 🎉 and")
    for stop in ("京", "東京, з", "🎉", "ïve", "\u0432\u0443\u0439"):
        given = params(stop=stop)
        generated = run_check(text, prompt, ids, given)
        final, reason = finish_text(text, generated, given, prompt)
        assert reason == stop
        assert stop not in text.decode(generated[:-1], prompt)
        assert text.decode(ids, prompt).startswith(final + stop)


def test_a_stop_string_beside_an_unfinished_character_ends_at_once(text: TextProcessor) -> None:
    raw = {text.token_bytes(token): token for token in range(text.vocab_size)}
    half = [raw[bytes([byte])] for byte in "東".encode()[:2]]
    check = StopStringCheck(text, ["ship"], prompt_tail=text.encode("the", True))
    _, ids = continuation(text, "the", " ship")
    assert [check(token) for token in [*half, *ids]].index(True) == len(half + ids) - 1


def test_noise_of_bytes_does_not_grow_the_window(text: TextProcessor) -> None:
    raw = {text.token_bytes(token): token for token in range(text.vocab_size)}
    check = StopStringCheck(text, ["ship"])
    assert not any(check(raw[b"\xff"]) for _ in range(200))
    assert len(check._pending) + len(check._context) < 40
    _, ids = continuation(text, "the", " ship")
    assert [check(token) for token in ids][-1]


def test_before_min_tokens_a_stop_string_does_not_end(text: TextProcessor) -> None:
    prompt, ids = continuation(text, "the", " ship sailed on and on and on and on")
    wanted = text.decode(ids, prompt)
    for minimum in range(1, len(ids) + 1):
        given = params(stop=" on", min_tokens=minimum)
        generated = run_check(text, prompt, ids, given)
        assert len(generated) >= minimum
        final, reason = finish_text(text, generated, given, prompt)
        early = text.decode(ids[: minimum - 1], prompt)
        found = find_stop(wanted, [" on"], len(early))
        if found is None:
            assert (final, reason) == (wanted, None)
        else:
            assert (final, reason) == (wanted[: found[0]], " on")


def test_special_tokens_hide_from_stop_strings_as_from_the_text(text: TextProcessor) -> None:
    eos = text.special_tokens["eos_token"]
    (token,) = text.eos_token_ids
    prompt, ids = continuation(text, "the", " ship")
    assert run_check(text, prompt, [*ids, token, *ids], params(stop=eos)) == [*ids, token, *ids]
    shown = params(stop=eos, skip_special_tokens=False)
    assert run_check(text, prompt, [*ids, token, *ids], shown) == [*ids, token]
    assert finish_text(text, [*ids, token], shown, prompt) == (" ship", eos)


def test_random_tokens_are_cut_where_the_whole_text_says(text: TextProcessor) -> None:
    """Against the obvious way: decode everything after each token, and search it."""
    chance = random.Random(7)
    prompt = text.encode("the ship", True)
    found = 0
    for _ in range(150):
        ids = [chance.randrange(3, text.vocab_size) for _ in range(30)]
        stops = chance.sample(["e", "th", " a", "an", ", ", "o", "ll", "s t", "\n"], 2)
        given = params(stop=stops, min_tokens=chance.choice([0, 0, 5]))
        generated = run_check(text, prompt, ids, given)
        floor = len(text.decode(ids[: max(0, given.min_tokens - 1)], prompt).rstrip("\ufffd"))
        for length in range(max(1, given.min_tokens), len(ids) + 1):
            plain = find_stop(text.decode(ids[:length], prompt), stops, floor)
            if plain is not None:
                break
        assert len(generated) == length
        found += plain is not None
        final, reason = finish_text(text, generated, given, prompt)
        assert stops.count(reason or "") == (plain is not None)
        assert final == text.decode(generated, prompt)[: plain[0] if plain else None]
    assert found > 50


def output(ids: list[int], **given: Any) -> Output:
    return Output(**{"token_ids": tuple(ids), "finish_reason": "length", **given})


def test_results(text: TextProcessor) -> None:
    prompt, ids = continuation(text, "the", " ship sailed")
    plain = to_result(output(ids), text, params(), prompt)
    assert (plain.text, plain.finish_reason, plain.stop_reason) == (" ship sailed", "length", None)
    assert (plain.completion_tokens, plain.logprobs) == (len(ids), None)

    ended = to_result(output(ids, finish_reason="stop", stop_reason=9), text, params(), prompt)
    assert (ended.finish_reason, ended.stop_reason) == ("stop", 9)

    cut = to_result(output(ids, finish_reason="stop"), text, params(stop="sail"), prompt)
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (" ship ", "stop", "sail")

    failed = to_result(
        output([], finish_reason="error", error_code="out_of_memory", error_message="no more"),
        text,
        params(),
    )
    assert (failed.text, failed.finish_reason) == (None, "error")
    assert (failed.error_code, failed.error_message) == ("out_of_memory", "no more")

    with pytest.raises(ValueError, match="aborted"):
        to_result(output([], finish_reason="aborted"), text, params())


def test_logprobs_have_the_shape_of_the_chat_api(text: TextProcessor) -> None:
    prompt, ids = continuation(text, "the", " ship 東")
    positions = tuple(
        PositionLogprobs(
            chosen=TokenLogprob(token, -0.5),
            top=(TokenLogprob(token, -0.5), TokenLogprob(3, -math.inf)),
        )
        for token in ids
    )
    result = to_result(output(ids, logprobs=positions), text, params(logprobs=2), prompt)
    assert result.logprobs is not None
    content = result.logprobs["content"]
    assert len(content) == len(ids)
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == " ship 東"
    assert content[0]["logprob"] == -0.5
    assert content[0]["top_logprobs"][0] == {
        key: content[0][key] for key in ("token", "logprob", "bytes")
    }
    assert content[0]["top_logprobs"][1]["logprob"] == LOWEST_LOGPROB
    json.loads(json.dumps(result.logprobs, allow_nan=False))


def test_the_folder_is_all_it_takes(tmp_path: Path) -> None:
    text = TextProcessor.load(write_text_files(tmp_path))
    assert finish_text(text, text.encode("the ship", False), params()) == ("the ship", None)
