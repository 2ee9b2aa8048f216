"""Structured output: `response_format` and `structured_outputs` as a grammar of llguidance.

llguidance (Microsoft) turns a JSON schema, a regular expression or a context-free grammar into the
set of tokens that may come next. Here the grammars are made and checked, for which no checkpoint is
needed; `worker.text.grammar` runs them. A keyword of JSON schema that cannot be enforced is an
error, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from nightherd.errors import ParameterError
from nightherd.params import SamplingParams

Kind = Literal["json", "regex", "choice", "grammar"]

_WHITESPACE = r"[ \n\r\t]{1,32}"
"""White space between the parts of JSON: bounded, or a weak model spends all its tokens on it."""
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_MESSAGE_CHARS = 300
_CACHED = 512


@dataclass(frozen=True, slots=True)
class Structure:
    """What an output must be, in one form whichever parameter asked for it."""

    kind: Kind
    text: str
    """The JSON schema or the list of choices as JSON, the regex, or the grammar."""
    source: str
    """The parameter that it came from, for messages."""


def structure_of(params: SamplingParams) -> Structure | None:
    """The structure that `params` ask for; None where the output may be any text.

    Raises `ParameterError` for an unknown form, for two at once, and for stop strings and
    stop tokens beside it: they would end the output before it is whole.
    """
    found = [
        structure
        for structure in (
            _from_response_format(params.response_format),
            _from_structured_outputs(params.structured_outputs),
        )
        if structure is not None
    ]
    if not found:
        return None
    if len(found) > 1:
        raise ParameterError("response_format and structured_outputs are both given; give one")
    for name in ("stop", "stop_token_ids"):
        if getattr(params, name):
            raise ParameterError(
                f"{name} would end the output before it is what {found[0].source} asks for; "
                "leave it out"
            )
    return found[0]


def check_structure(params: SamplingParams) -> None:
    """Raises `ParameterError` where `structure_of` does, or where its grammar does not compile."""
    structure = structure_of(params)
    if structure is not None:
        grammar_text(structure)


def grammar_text(structure: Structure) -> str:
    """llguidance's grammar, checked; raises `ParameterError` with one line if it does not compile.

    Answers are cached: ten million rows may share one schema.
    """
    grammar, problem = _compile(structure)
    if problem is not None:
        raise ParameterError(f"{structure.source} does not compile: {problem}")
    return grammar


def without_leading_space(params: SamplingParams, text: str) -> str:
    """`text` without the one space that a choice or JSON may begin with.

    A few-shot prompt ends with a colon, after which most tokenizers have the space at the head of
    the next word's token: without it the likeliest tokens would be out of reach.
    """
    if not text.startswith(" "):
        return text
    structure = structure_of(params)
    return text[1:] if structure is not None and _may_begin_with_space(structure) else text


def _from_response_format(given: Mapping[str, Any] | None) -> Structure | None:
    if given is None:
        return None
    kind = given.get("type")
    known = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if kind not in ("text", "json_object", "json_schema"):
        raise ParameterError(
            f"response_format.type must be 'text', 'json_object' or 'json_schema', got {kind!r}"
        )
    _refuse_unknown("response_format", given, known)
    if kind == "text":
        return None
    if kind == "json_object":
        return _json({"type": "object"}, "response_format")
    inner = given.get("json_schema")
    if not isinstance(inner, Mapping) or inner.get("schema") is None:
        raise ParameterError("response_format.json_schema must be an object with a schema")
    _refuse_unknown(
        "response_format.json_schema", inner, {"name", "description", "schema", "strict"}
    )
    return _json(inner["schema"], "response_format.json_schema.schema")


def _from_structured_outputs(given: Mapping[str, Any] | None) -> Structure | None:
    if given is None:
        return None
    given = {name: value for name, value in given.items() if value is not None}
    _refuse_unknown("structured_outputs", given, _KINDS)
    if len(given) != 1:
        got = " and ".join(given) if given else "none"
        raise ParameterError(
            f"structured_outputs must have exactly one of {', '.join(_KINDS)}, got {got}"
        )
    ((kind, value),) = given.items()
    source = f"structured_outputs.{kind}"
    if kind == "json":
        return _json(value, source)
    if kind == "json_object":
        if value is not True:
            raise ParameterError(f"{source} must be true, got {value!r}")
        return _json({"type": "object"}, source)
    if kind == "choice":
        return _choice(value, source)
    if not isinstance(value, str) or not value:
        raise ParameterError(f"{source} must be a text that is not empty, got {value!r}")
    return Structure("regex" if kind == "regex" else "grammar", value, source)


def _refuse_unknown(
    parameter: str, given: Mapping[str, Any], known: set[str] | tuple[str, ...]
) -> None:
    for name in given:
        if name not in known:
            raise ParameterError(f"{parameter} has no key {name!r} (it takes: {', '.join(known)})")


def _json(schema: object, source: str) -> Structure:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ParameterError(f"{source} is not JSON: {_one_line(str(error))}") from None
    if not isinstance(schema, Mapping):
        raise ParameterError(f"{source} must be a JSON schema, an object, got {schema!r:.80}")
    try:
        # In the order of its keys: the output has its properties in this order.
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"{source} is not JSON: {_one_line(str(error))}") from None
    return Structure("json", text, source)


def _choice(value: object, source: str) -> Structure:
    good = isinstance(value, list | tuple) and len(value) > 0
    if not good or not all(isinstance(item, str) and item for item in value):  # type: ignore[attr-defined]
        raise ParameterError(
            f"{source} must be a list of texts that are not empty, got {value!r:.80}"
        )
    return Structure("choice", json.dumps(value, ensure_ascii=False), source)


def _may_begin_with_space(structure: Structure) -> bool:
    if structure.kind == "choice":
        return not any(item.startswith(" ") for item in json.loads(structure.text))
    return structure.kind == "json"


@lru_cache(maxsize=_CACHED)
def _compile(structure: Structure) -> tuple[str, str | None]:
    """The grammar, and why it does not compile, if so."""
    # Not at the top: `nightherd submit --help` has no need of it.
    from llguidance import LLMatcher

    try:
        grammar = _to_grammar(structure)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    except (ValueError, RecursionError) as error:
        return "", _one_line(str(error))
    return grammar, _short_message(structure.kind, messages[0]) if failed else None


def _to_grammar(structure: Structure) -> str:
    """The structure as a grammar of llguidance; raises `ValueError`."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    if structure.kind == "json":
        return _json_grammar(json.loads(structure.text))
    if structure.kind == "choice":
        space = " ?" if _may_begin_with_space(structure) else ""
        choices = "|".join(map(_regex_escaped, json.loads(structure.text)))
        return LLMatcher.grammar_from_regex(f"{space}(?:{choices})")
    if structure.kind == "regex":
        if re.search(r"(?<!\\)(\\\\)*\\$", structure.text):
            raise ValueError("it ends with a backslash")  # llguidance would drop it
        # \d and \w are ASCII, as in a schema's `pattern`: every other engine agrees on those.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(structure.text, 'dw')}/")
    try:
        # Lark in llguidance's dialect, or GBNF where there is a `::=`.
        return grammar_from("grammar", structure.text)
    except Exception as error:
        # Its converter from GBNF parses the user's text in Python, and raises any exception.
        raise ValueError(str(error)) from None


def _json_grammar(schema: dict[str, Any]) -> str:
    # The user's own options could loosen it: `lenient` ignores keywords, separators break JSON.
    options = {"lenient": False, "coerce_one_of": False, "whitespace_pattern": _WHITESPACE}
    start = {"name": "start", "lark_grammar": 'start: " "? @value'}
    value = {"name": "value", "json_schema": {**schema, "x-guidance": options}}
    return json.dumps({"grammars": [start, value]}, ensure_ascii=False)


def _regex_escaped(text: str) -> str:
    """`text` as a regex that matches it alone."""
    return "".join(
        char if char.isalnum() or ord(char) >= 0x80 else f"\\x{{{ord(char):X}}}" for char in text
    )


def _short_message(kind: Kind, message: str) -> str:
    """The line of llguidance's message that says what is wrong, without the grammar it quotes."""
    if kind == "regex":
        inner = re.search(r"^error: (.+)$", message, re.MULTILINE)
        if inner is not None:
            return _one_line(inner[1])
        message = message.partition("(in regex): ")[2] or message
    first = message.strip().partition("\n")[0]
    location = re.match(r"(?:at )?(\d+)\((\d+)\): ", first)
    if location is None:
        return _one_line(first)
    rest = first[location.end() :]
    return _one_line(f"line {location[1]}: {rest}" if kind == "grammar" else rest)


def _one_line(text: str) -> str:
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= _MESSAGE_CHARS else f"{text[: _MESSAGE_CHARS - 1]}…"
