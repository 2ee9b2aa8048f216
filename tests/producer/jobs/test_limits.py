"""What a checkpoint can take, found out before anything is stored."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nightherd.errors import CheckpointError, ParameterError
from nightherd.params import SamplingParams, effective_params
from nightherd.text import TextProcessor
from producer.jobs.limits import CheckpointLimits, cached_limits
from tests.checkpoints import write_text_files

CONTEXT = 256
PLAIN = effective_params()


@pytest.fixture(params=["byte-level", "metaspace"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint with a context of 256 tokens, with each kind of tokenizer in turn."""
    return write_text_files(tmp_path / "checkpoint", request.param)


def limits_of(folder: Path, serving: tuple[str, ...] = ()) -> CheckpointLimits:
    found = cached_limits(str(folder), folder.parent, serving)
    assert found is not None
    return found


def problem(folder: Path, body: dict[str, Any], params: SamplingParams = PLAIN) -> str | None:
    (found,) = limits_of(folder).problems([(body, params)])
    return found


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def test_the_longest_prompt_that_fits_and_the_next(folder: Path) -> None:
    text = TextProcessor.load(folder)
    word = "é"  # more bytes than one, fewer characters than tokens in both vocabularies
    for make in (
        lambda n: {"prompt": word * n},
        lambda n: chat(word * n),
        lambda n: chat("a", word * n),
    ):
        lengths = [len(text.prepare(make(n), PLAIN)) for n in range(CONTEXT + 1)]
        longest = max(n for n, length in enumerate(lengths) if length < CONTEXT)
        assert problem(folder, make(longest)) is None
        message = problem(folder, make(longest + 1))
        assert message is not None
        assert f"{lengths[longest + 1]:,} tokens" in message
        assert "context" in message


def test_what_is_sure_to_fit_is_not_tokenised(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = limits_of(folder)

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the tokenizer was loaded")

    monkeypatch.setattr(TextProcessor, "load", load)
    assert limits.problems([({"prompt": "a" * 150}, PLAIN)]) == [None]
    with pytest.raises(AssertionError, match="loaded"):
        limits.problems([({"prompt": "a" * 260}, PLAIN)])


def test_each_row_has_its_own_problem(folder: Path) -> None:
    words = " ".join(f"{n} east" for n in range(300))
    rows = [{"prompt": "a"}, {"prompt": words}, chat("b"), chat(words), {"prompt": [3, 4]}]
    found = limits_of(folder).problems([(row, PLAIN) for row in rows])
    assert [message is not None for message in found] == [False, True, False, True, False]


def test_a_prompt_that_is_cut_fits(folder: Path) -> None:
    words = " ".join(f"{n} east" for n in range(300))
    for keep, fits in ((CONTEXT - 1, True), (CONTEXT, False)):
        params = effective_params({"truncate_prompt_tokens": keep})
        assert (problem(folder, {"prompt": words}, params) is None) == fits


def test_token_ids_outside_the_vocabulary(folder: Path) -> None:
    size = TextProcessor.load(folder).vocab_size
    assert problem(folder, {"prompt": [size - 1]}) is None
    assert f"token id {size} is not in the vocabulary" in str(problem(folder, {"prompt": [size]}))
    limits = limits_of(folder)
    for name, good, bad in (
        ("stop_token_ids", [size - 1], [3, size]),
        ("allowed_token_ids", [size - 1], [size]),
        ("logit_bias", {str(size - 1): 1}, {str(size): 1}),
    ):
        limits.check_params({name: good})
        with pytest.raises(ParameterError, match=rf"{name} has the token id {size}\b"):
            limits.check_params({name: bad})


@pytest.mark.parametrize("name", ["max_tokens", "max_length", "min_tokens"])
def test_lengths_beyond_the_context(folder: Path, name: str) -> None:
    limits = limits_of(folder)
    limits.check_params({name: CONTEXT})
    with pytest.raises(ParameterError, match=f"{name} 257 is beyond the context .* 256 tokens"):
        limits.check_params({name: CONTEXT + 1})


def test_a_chat_needs_a_template_or_a_worker_that_may_have_one(tmp_path: Path) -> None:
    folder = write_text_files(tmp_path / "base", template=None)
    row = (chat("a" * 1000), PLAIN)
    (message,) = limits_of(folder).problems([row])
    assert message is not None
    assert "--chat-template" in message
    assert limits_of(folder, ("some-worker",)).problems([row]) == [None]
    both = {**chat("a"), "prompt": "a"}
    assert limits_of(folder).problems([(both, PLAIN)]) == [None]


def test_a_tokenizer_that_is_not_there_is_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "tokenizer.json").unlink()
    limits = limits_of(folder)
    with caplog.at_level(logging.WARNING, "nightherd.submit"):
        for _ in range(2):
            assert limits.problems([({"prompt": "a" * 1000}, PLAIN)]) == [None]
            limits.check_params({"stop_token_ids": [10**6]})
    (record,) = caplog.records
    assert "not measured" in record.message


def test_a_checkpoint_that_is_elsewhere_has_no_limits(tmp_path: Path) -> None:
    assert cached_limits(str(tmp_path / "none"), tmp_path) is None


def test_a_configuration_without_a_context(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        limits_of(folder)
