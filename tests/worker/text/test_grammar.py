"""Grammars over real tokenizers: whatever is chosen under the mask, what ends is what was asked."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

import nightherd
from nightherd.errors import ParameterError
from nightherd.params import SamplingParams
from nightherd.structured import Structure, structure_of
from nightherd.text import TextProcessor
from tests.checkpoints import write_text_files
from tests.fakes import byte_text
from worker.engine.interface import Grammar, Output
from worker.text import grammar as grammar_module
from worker.text.detokenizer import to_result
from worker.text.grammar import GrammarMaker

DEMO = Path(nightherd.__file__).parent / "checkpoints" / "demo"

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "zeta": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["café", '"quoted"', "x"]},
        "count": {"type": "integer", "minimum": -3, "maximum": 120},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["zeta", "count", "list", "more"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture(scope="module", params=["demo", "byte-level", "metaspace", "bytes"])
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextProcessor:
    if request.param == "demo":
        return TextProcessor.load(DEMO)
    if request.param == "bytes":
        return byte_text()
    folder = tmp_path_factory.mktemp(request.param)
    return TextProcessor.load(write_text_files(folder, request.param))


def params_of(**given: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=given)


def structure(**given: Any) -> Structure:
    found = structure_of(params_of(**given))
    assert found is not None
    return found


def a_token(text: TextProcessor, spelled: bytes) -> int:
    """A token that is `spelled`."""
    return next(id for id in range(text.vocab_size) if text.token_bytes(id) == spelled)


def start(text: TextProcessor, *, ignore_eos: bool = False, **given: Any) -> Grammar:
    return GrammarMaker(text).factory(structure(**given), ignore_eos=ignore_eos)()


def allowed(grammar: Grammar, size: int) -> set[int]:
    """What the mask says, into an array that held something else before."""
    mask = np.full(-(-size // 32), -1, dtype=np.int32)
    grammar.fill_mask(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.nonzero(bits)[0].tolist())


def walk(text: TextProcessor, grammar: Grammar, chance: random.Random) -> list[int]:
    """Random tokens under the mask until it ends, as an engine would choose them."""
    tokens: list[int] = []
    for _ in range(600):
        may = allowed(grammar, text.vocab_size)
        ends = may & text.eos_token_ids
        assert ends in (set(), text.eos_token_ids)
        going_on = sorted(may - ends)
        if ends and (not going_on or chance.random() < 0.4):
            return tokens
        tokens.append(chance.choice(going_on))
        if grammar.advance(tokens[-1]):
            return tokens
    raise AssertionError("it does not end")


def walks(text: TextProcessor, count: int = 12, **given: Any) -> list[str]:
    """The stored texts of random outputs after a prompt."""
    make = GrammarMaker(text).factory(structure(**given))
    tail = text.encode("Label:", True)
    texts = []
    for seed in range(count):
        tokens = walk(text, make(), random.Random(seed))
        result = to_result(Output(tuple(tokens), "stop"), text, params_of(**given), tail)
        assert result.text is not None
        texts.append(result.text)
    return texts


def test_json_validates_in_the_order_of_the_schema(text: TextProcessor) -> None:
    validator = Draft202012Validator(SCHEMA)
    seen = walks(text, json=SCHEMA)
    for found in seen:
        value = json.loads(found)
        validator.validate(value)
        assert not found.startswith(" ")
        assert list(value) == [name for name in SCHEMA["properties"] if name in value]
    assert len(set(seen)) > 6


def test_json_may_begin_with_one_space(text: TextProcessor) -> None:
    space = a_token(text, b" ")
    grammar = start(text, json=SCHEMA)
    assert space in allowed(grammar, text.vocab_size)
    grammar.advance(space)
    may = allowed(grammar, text.vocab_size)
    assert space not in may
    assert all(text.token_bytes(token).startswith(b"{") for token in may)


def test_any_json_object() -> None:
    text = TextProcessor.load(DEMO)
    grammar = start(text, json_object=True)
    for token in text.encode('{"a": [1, null, "x"], "b": {}', False):
        assert token in allowed(grammar, text.vocab_size)
        assert not grammar.advance(token)
    (closing,) = text.encode("}", False)
    assert grammar.advance(closing)
    with pytest.raises(ValueError, match="cannot go on"):
        start(text, json_object=True).advance(text.encode("[", False)[0])


@pytest.mark.parametrize(
    "regex",
    [
        r"\d{3}-[a-f]{2}",
        r"(ab|a)*c?",
        "[ä-ü亜-京]{1,3}x",
        r"a|ab|abc",
        r"^[A-Z]\w{0,4}$",
        "a/b\n[^x]",
    ],
)
def test_a_regex_matches(text: TextProcessor, regex: str) -> None:
    for found in walks(text, regex=regex):
        assert re.fullmatch(regex, found), found


CHOICES = ["good", "goodness", "sehr schön", 'a "b"\\/', "tab\there", "<|end|>", "京", "(a|b)*"]


def test_a_choice_is_one_of_them(text: TextProcessor) -> None:
    seen = set(walks(text, count=80, choice=CHOICES))
    assert seen == set(CHOICES)


def test_a_choice_that_begins_with_a_space_keeps_it(text: TextProcessor) -> None:
    assert set(walks(text, count=30, choice=[" a", "a"])) == {" a", "a"}


@pytest.mark.parametrize("grammar", ['start: "a" x\nx: "b" | "c" x', 'root ::= "a" ("b" | "c")+'])
def test_a_grammar_in_either_notation(text: TextProcessor, grammar: str) -> None:
    for found in walks(text, grammar=grammar):
        assert re.fullmatch("a[bc]+", found), found


@pytest.mark.parametrize(
    ("prompt", "answer"), [("Label:", " good"), ("Label: sehr", " schön"), ("x\n", "good")]
)
def test_the_models_own_tokens_of_a_choice_are_allowed(
    text: TextProcessor, prompt: str, answer: str
) -> None:
    """As the checkpoint saw them in training: behind the colon of a few-shot prompt too."""
    before, whole = text.encode(prompt, True), text.encode(prompt + answer, True)
    assert whole[: len(before)] == before
    grammar = start(text, choice=["good", "bad", "schön"])
    for token in whole[len(before) :]:
        assert token in allowed(grammar, text.vocab_size)
        ended = grammar.advance(token)
    assert ended


def test_all_ends_are_allowed_exactly_where_it_may_end(text: TextProcessor) -> None:
    ends = set(text.eos_token_ids)
    grammar = start(text, regex="ab?c*")
    assert not allowed(grammar, text.vocab_size) & ends
    assert not grammar.advance(a_token(text, b"a"))
    assert allowed(grammar, text.vocab_size) >= ends
    grammar = start(text, regex="abc+d")
    for byte in b"abcc":
        assert not allowed(grammar, text.vocab_size) & ends
        grammar.advance(a_token(text, bytes([byte])))


def test_the_demo_has_several_ends() -> None:
    # The tests above would say nothing of several otherwise.
    assert len(TextProcessor.load(DEMO).eos_token_ids) > 1


def test_special_tokens_are_never_text(text: TextProcessor) -> None:
    special = set(text.tokenizer.get_added_tokens_decoder())
    assert special >= text.eos_token_ids
    for given in ({"regex": "(?s).*"}, {"json": {"type": "string"}}):
        grammar = start(text, **given)
        for _ in range(2):
            may = allowed(grammar, text.vocab_size)
            assert may & special in (set(), set(text.eos_token_ids))
            grammar.advance(a_token(text, b'"'))


def test_a_special_token_that_a_grammar_names_is_none() -> None:
    text = byte_text()
    grammar = start(text, grammar='start: "a" <|begin|> "b"')
    assert not grammar.advance(text.encode("a", False)[0])
    with pytest.raises(ValueError, match="allows no token") as error:
        allowed(grammar, text.vocab_size)
    assert "\n" not in str(error.value)


def test_no_nul_character(text: TextProcessor) -> None:
    may = allowed(start(text, regex="(?s).*"), text.vocab_size)
    assert not any(b"\0" in text.token_bytes(token) for token in may)
    assert any(b"\n" in text.token_bytes(token) for token in may)


@pytest.mark.parametrize("padding", [1, 32, 100])
def test_a_vocabulary_that_is_padded_stays_out(text: TextProcessor, padding: int) -> None:
    grammar = start(text, regex="(?s).*")
    exact = allowed(grammar, text.vocab_size)
    assert max(exact) < text.vocab_size
    assert allowed(grammar, text.vocab_size + padding) == exact


def test_without_ends_it_goes_on_as_long_as_it_may(text: TextProcessor) -> None:
    ends = set(text.eos_token_ids)
    letter = a_token(text, b"a")
    grammar = start(text, ignore_eos=True, regex="a{1,3}")
    for ended in (False, False, True):
        assert not allowed(grammar, text.vocab_size) & ends
        assert grammar.advance(letter) is ended
    # Where nothing else may follow there is no other way out.
    assert allowed(start(text, ignore_eos=True, regex="(?:)"), text.vocab_size) == ends


def test_an_end_may_be_taken_in_where_it_may_come(text: TextProcessor) -> None:
    end = min(text.eos_token_ids)
    grammar = start(text, regex="a*")
    assert grammar.advance(end)
    with pytest.raises(ValueError, match="cannot go on"):
        start(text, regex="a").advance(end)


def test_a_token_that_may_not_come(text: TextProcessor) -> None:
    grammar = start(text, regex="a+")
    with pytest.raises(ValueError, match="cannot go on") as error:
        grammar.advance(a_token(text, b"b"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot go on"):
        allowed(grammar, text.vocab_size)


def test_samples_do_not_touch_each_other(text: TextProcessor) -> None:
    make = GrammarMaker(text).factory(structure(regex="ab"))
    first, second = make(), make()
    before = allowed(second, text.vocab_size)
    first.advance(a_token(text, b"a"))
    assert allowed(second, text.vocab_size) == before != allowed(first, text.vocab_size)


def test_what_does_not_compile_is_one_line(text: TextProcessor) -> None:
    for given in ({"regex": "("}, {"grammar": "start: <|nothere|>"}):
        with pytest.raises(ParameterError, match="does not compile: ") as error:
            start(text, **given)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


def test_compiled_grammars_are_kept_but_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real: Callable[..., Any] = grammar_module.LLMatcher

    def counting(tokenizer: Any, grammar: str, **given: Any) -> Any:
        compiled.append(grammar)
        return real(tokenizer, grammar, **given)

    monkeypatch.setattr(grammar_module, "LLMatcher", counting)
    monkeypatch.setattr(grammar_module, "_CACHED", 2)
    maker = GrammarMaker(byte_text())
    for name in ("a", "b", "a", "c", "a"):  # c drops b, which was used least lately
        maker.factory(structure(regex=name))()
    assert len(compiled) == 3
    maker.factory(structure(regex="b"))
    assert len(compiled) == 4


def test_from_several_threads(text: TextProcessor) -> None:
    maker = GrammarMaker(text)

    def one(seed: int) -> str:
        made = maker.factory(structure(choice=CHOICES if seed % 2 else ["even"]))()
        return text.decode(walk(text, made, random.Random(seed)), text.encode(":", True)).strip()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, range(40)))
    assert all(label in (CHOICES if seed % 2 else ["even"]) for seed, label in enumerate(found))


def test_a_checkpoint_without_an_end() -> None:
    text = byte_text()
    text.eos_token_ids = frozenset()
    grammar = start(text, regex="ab?")
    assert not grammar.advance(text.encode("a", False)[0])
    assert allowed(grammar, text.vocab_size) == set(text.encode("b", False))
    assert grammar.advance(text.encode("b", False)[0])


def test_an_end_beyond_the_tokenizer() -> None:
    text = byte_text()
    text.eos_token_ids = frozenset({1, 5000})
    assert allowed(start(text, regex="(?:)"), 6000) == {1}
