"""Structured output: one form for all spellings, and what does not compile is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from nightherd.errors import ParameterError
from nightherd.params import SamplingParams, effective_params, parse_params
from nightherd.structured import (
    check_structure,
    grammar_text,
    structure_of,
    without_leading_space,
)

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"type": "string"}}}


def params(**given: Any) -> SamplingParams:
    return effective_params(parse_params(given))


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json", '{"type":"object"}'),
        ({"structured_outputs": {"json_object": True}}, "json", '{"type":"object"}'),
        ({"structured_outputs": {"json": SCHEMA}}, "json", None),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json", None),
        ({"guided_json": SCHEMA}, "json", None),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            "json",
            None,
        ),
        ({"structured_outputs": {"regex": "a+", "json": None}}, "regex", "a+"),
        ({"guided_choice": ["yes", "nö"]}, "choice", '["yes", "nö"]'),
        ({"guided_grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        (
            {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
            "regex",
            "a",
        ),
    ],
)
def test_all_spellings_have_one_form(given: dict[str, Any], kind: str, text: str | None) -> None:
    structure = structure_of(params(**given))
    assert structure is not None
    # The order of the schema is the order of the output.
    expected = json.dumps(SCHEMA, separators=(",", ":")) if text is None else text
    assert (structure.kind, structure.text) == (kind, expected)
    assert grammar_text(structure)


@pytest.mark.parametrize(
    "given", [{}, {"response_format": {"type": "text"}}, {"stop": ["x"], "stop_token_ids": [3]}]
)
def test_any_text_will_do(given: dict[str, Any]) -> None:
    assert structure_of(params(**given)) is None
    check_structure(params(**given))


FORMAT = "response_format"
OUTPUTS = "structured_outputs"

BAD: list[tuple[dict[str, Any], str]] = [
    ({FORMAT: {}}, "response_format.type must be 'text', 'json_object' or 'json_schema', got None"),
    ({FORMAT: {"type": "xml"}}, "got 'xml'"),
    ({FORMAT: {"type": "json_object", "schema": {}}}, "response_format has no key 'schema'"),
    ({FORMAT: {"type": "json_schema"}}, "response_format.json_schema must be an object with a"),
    ({FORMAT: {"type": "json_schema", "json_schema": {"name": "x"}}}, "an object with a schema"),
    (
        {FORMAT: {"type": "json_schema", "json_schema": {"schema": {}, "shema": 1}}},
        "response_format.json_schema has no key 'shema'",
    ),
    (
        {FORMAT: {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}},
        "response_format.json_schema.schema does not compile: Invalid type: objekt",
    ),
    ({OUTPUTS: {}}, "exactly one of json, regex, choice, grammar, json_object, got none"),
    ({OUTPUTS: {"json": {}, "regex": "a"}}, "got json and regex"),
    ({OUTPUTS: {"xml": "a"}}, "structured_outputs has no key 'xml'"),
    ({OUTPUTS: {"json": "{"}}, "structured_outputs.json is not JSON: "),
    ({OUTPUTS: {"json": [1]}}, "structured_outputs.json must be a JSON schema, an object, got [1]"),
    ({OUTPUTS: {"json": {"minimum": float("nan")}}}, "'minimum', got null"),
    ({OUTPUTS: {"json": {"uniqueItems": True, "type": "array"}}}, 'keys: ["uniqueItems"]'),
    (
        {OUTPUTS: {"json": {"uniqueItems": True, "x-guidance": {"lenient": True}}}},
        'structured_outputs.json does not compile: Unimplemented keys: ["uniqueItems"]',
    ),
    ({OUTPUTS: {"json": {"$ref": "http://example.com/x"}}}, "example.com"),
    ({OUTPUTS: {"json": {"enum": []}}}, "Unsatisfiable"),
    ({OUTPUTS: {"json_object": False}}, "structured_outputs.json_object must be true, got False"),
    ({OUTPUTS: {"regex": "("}}, "structured_outputs.regex does not compile: unclosed group"),
    ({OUTPUTS: {"regex": r"(a)\1"}}, "does not compile: backreferences are not supported"),
    ({OUTPUTS: {"regex": r"\bfoo"}}, "lookarounds not supported"),
    ({OUTPUTS: {"regex": ""}}, "structured_outputs.regex must be a text that is not empty, got ''"),
    ({OUTPUTS: {"regex": "a" + 3 * "\\"}}, "does not compile: it ends with a backslash"),
    ({OUTPUTS: {"regex": ["a"]}}, "structured_outputs.regex must be a text"),
    ({OUTPUTS: {"regex": "\ud800"}}, "structured_outputs.regex does not compile: "),
    ({OUTPUTS: {"grammar": "start: nothere"}}, 'line 1: unknown name: "nothere"'),
    ({OUTPUTS: {"grammar": "foo ::= bar"}}, "structured_outputs.grammar does not compile: "),
    ({OUTPUTS: {"choice": []}}, "structured_outputs.choice must be a list of texts"),
    ({OUTPUTS: {"choice": ["a", ""]}}, "not empty, got ['a', '']"),
    ({OUTPUTS: {"choice": "ab"}}, "got 'ab'"),
    (
        {OUTPUTS: {"regex": "a"}, FORMAT: {"type": "json_object"}},
        "response_format and structured_outputs are both given; give one",
    ),
    ({OUTPUTS: {"regex": "a"}, "stop": "x"}, "stop would end the output before it is what"),
    ({OUTPUTS: {"regex": "a"}, "stop_token_ids": [1]}, "stop_token_ids would end the output"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[str(given) for given, _ in BAD])
def test_what_is_wrong_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError) as error:
        check_structure(params(**given))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_schema_of_any_depth_is_an_answer() -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(ParameterError, match="recursion limit exceeded"):
        check_structure(SamplingParams(structured_outputs={"json": schema}))


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import llguidance

    good, bad = {"regex": "compiled once"}, {"regex": "compiled once("}
    check_structure(params(structured_outputs=good))
    with pytest.raises(ParameterError):
        check_structure(params(structured_outputs=bad))
    monkeypatch.delattr(llguidance, "LLMatcher")
    check_structure(params(structured_outputs=good))
    with pytest.raises(ParameterError, match="unclosed group"):
        check_structure(params(structured_outputs=bad))


@pytest.mark.parametrize(
    ("given", "text", "expected"),
    [
        ({"choice": ["a b"]}, " a b", "a b"),
        ({"choice": ["a b"]}, "a b", "a b"),
        ({"choice": [" a", "a"]}, " a", " a"),
        ({"json": {}}, ' {"a": 1}', '{"a": 1}'),
        ({"regex": " a"}, " a", " a"),
        (None, " a", " a"),
    ],
)
def test_the_space_that_a_few_shot_prompt_calls_for(
    given: dict[str, Any] | None, text: str, expected: str
) -> None:
    assert without_leading_space(SamplingParams(structured_outputs=given), text) == expected


def test_llguidance_is_imported_only_for_a_structure() -> None:
    code = (
        "import sys, producer.jobs.create, producer.tasks, nightherd.structured as s\n"
        "from nightherd.params import SamplingParams\n"
        "s.check_structure(SamplingParams())\n"
        "assert 'llguidance' not in sys.modules\n"
        "s.check_structure(SamplingParams(structured_outputs={'regex': 'a'}))\n"
        "assert 'llguidance' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
