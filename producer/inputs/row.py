"""One row as a request: the shapes of a JSON row become a request's body and parameters."""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from nightherd.params import PARAMETER_NAMES, is_parameter, parse_body, parse_params
from producer.prompts.builder import RowBuilder
from producer.prompts.template import BadRowError, describe_columns, one_line, unstorable

MAX_DEPTH = 100
"""Levels of nesting in a row; what checks and stores it has limits of its own, not far above."""

ParsedRow = tuple[dict[str, Any], dict[str, Any] | None]
"""A body and its parameters, as `parse_body` and `parse_params` return them."""

_BODY_KEYS = ("prompt", "messages", "metadata")
_ROW_KEYS = (*_BODY_KEYS, "custom_id", "params")
_BATCH_KEYS = frozenset(("custom_id", "method", "url", "body"))
_BATCH_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
_BATCH_IGNORED = (
    "model",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "stream",
    "stream_options",
    "user",
)
_MAX_MODELS = 100

# What JSON's escapes can smuggle past UTF-8: NUL, and halves of surrogate pairs.
_RISKY_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise BadRowError(f"the number {one_line(literal, 40)} is too large")
    return value


def _no_constant(literal: str) -> float:
    # Python reads NaN and Infinity; JSON has no such numbers, and neither has SQL's JSON.
    raise BadRowError(f"not JSON: {literal} is no JSON number")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)


def parse_json(text: str) -> Any:
    """The JSON value that a line holds; raises `BadRowError`."""
    text = text.strip(" \t\r\n")
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise BadRowError(f"not JSON: {error.msg} at column {error.pos + 1}") from None
    except RecursionError:
        raise BadRowError(f"nested more than {MAX_DEPTH} levels deep") from None
    except ValueError:
        # The only other one that is raised: Python's limit on the digits of an integer.
        raise BadRowError("a number has more digits than can be read") from None
    if end != len(text):
        raise BadRowError(f"not JSON: more text after the value, at column {end + 1}")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if "\\u" in text and _RISKY_ESCAPE.search(text):
        _check_strings(value)
    return value


def _children(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_depth(value: object) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise BadRowError(f"nested more than {MAX_DEPTH} levels deep")


def _check_strings(value: object) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item)
        waiting.extend(_children(item))
        reason = unstorable(item) if isinstance(item, str) else None
        if reason:
            raise BadRowError(f"a string holds {reason}")


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None or isinstance(value, bool):
        return str(json.dumps(value))
    if isinstance(value, str):
        return "a string"
    if isinstance(value, int | float):
        return "a number"
    return "an object" if isinstance(value, dict) else "an array"


@functools.lru_cache(maxsize=1000)
def _close_key(name: str) -> str | None:
    """The known key that `name` may have been meant for."""
    close = difflib.get_close_matches(name[:60], (*_ROW_KEYS, *PARAMETER_NAMES), n=1, cutoff=0.75)
    return close[0] if close else None


def _no_prompt(row: Mapping[str, Any]) -> BadRowError:
    texts = [name for name, value in row.items() if isinstance(value, str) and name != "custom_id"]
    example = next((name for name in texts if name.isidentifier()), None)
    hint = f"; a template makes one: --template '{{{{ {example} }}}}'" if example else ""
    return BadRowError(f"no prompt and no messages {describe_columns(row)}{hint}")


def _has_prompt(body: Mapping[str, Any]) -> bool:
    return "prompt" in body or "messages" in body


def _check_token_ids(prompt: list[Any]) -> None:
    if not prompt:
        raise BadRowError("prompt has no token ids")
    for token in prompt:
        if type(token) is not int or token < 0:
            if isinstance(token, str | list):
                raise BadRowError("prompt holds several prompts; write a line for each")
            raise BadRowError(f"prompt must be a string or token ids from 0 up, got {token!r}")


def _check_body(body: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """As `parse_body`, at a fraction of its cost for the shapes that nearly all rows have."""
    prompt, messages = body.get("prompt"), body.get("messages")
    if type(prompt) is list:
        _check_token_ids(prompt)
    if len(body) == 1:
        if type(prompt) is str or type(prompt) is list:
            return body
        if (
            type(messages) is list
            and messages
            and all(
                type(message) is dict
                and len(message) == 2
                and type(message.get("content")) is str
                and type(message.get("role")) is str
                and message["role"]
                for message in messages
            )
        ):
            return body
    if not _has_prompt(body):
        raise _no_prompt(row)
    if prompt is not None and not isinstance(prompt, str | list):
        raise BadRowError(f"prompt must be a string or token ids, it is {kind(prompt)}")
    return parse_body(body)


class RowMaker:
    """Turns the values of rows into bodies and parameters; every method raises `BadRowError`, or
    `ParameterError` for a parameter.

    `models` collects the names that OpenAI Batch lines ask for, `unseen` holds the columns to keep
    that no row has had yet.
    """

    def __init__(
        self, keep: frozenset[str], ignore_unknown: bool, builder: RowBuilder | None
    ) -> None:
        self._keep = keep
        self._ignore_unknown = ignore_unknown
        self._builder = builder
        self._names: frozenset[str] = builder.names if builder is not None else frozenset()
        self.models: set[str] = set()
        self.unseen = set(keep)

    def from_string(self, text: str) -> ParsedRow:
        """For a line of plain text, or a row that is a bare JSON string: the column `text`."""
        builder = self._builder
        if builder is None:
            return {"prompt": text}, None
        columns = {"text": text}
        if builder.reads_columns:
            return self._with_kept(builder.from_columns(columns), columns), None
        return builder.from_request({"prompt": text}, {"prompt": text, "text": text}), None

    def from_object(self, row: dict[str, Any]) -> ParsedRow:
        """For a row that is a JSON object: columns, a request or a line of OpenAI Batch."""
        builder = self._builder
        if builder is not None and builder.reads_columns:
            return self._with_kept(builder.from_columns(row), row), None
        is_batch = "body" in row and ("url" in row or "method" in row or row.keys() <= _BATCH_KEYS)
        body, given = self._from_batch(row) if is_batch else self._from_request(row)
        if builder is not None:
            body = builder.from_request(body, row)
        # No parameters at all and only null ones are the same.
        return body, (parse_params(given) or None) if given else None

    def _from_request(self, row: dict[str, Any]) -> ParsedRow:
        body: dict[str, Any] = {}
        given: dict[str, Any] = {}
        unknown: list[str] = []
        for name, value in row.items():
            if name in _BODY_KEYS:
                if value is not None:
                    body[name] = value
            elif is_parameter(name):
                given[name] = value
            elif name not in _ROW_KEYS:
                unknown.append(name)
        nested = row.get("params")
        if nested is not None:
            if not isinstance(nested, dict):
                raise BadRowError(f"params must be an object of parameters, it is {kind(nested)}")
            for name in nested:
                if name in given:
                    raise BadRowError(f"{name} stands in the row and in its params; give one")
            given.update(nested)
        if self._builder is not None and "text" in unknown and not _has_prompt(body):
            unknown.remove("text")
            body["prompt"] = row["text"]
        self._refuse_unknown(unknown, body, row)
        return self._with_kept(_check_body(body, row), row), given

    def _from_batch(self, row: dict[str, Any]) -> ParsedRow:
        request = row["body"]
        if not isinstance(request, dict):
            raise BadRowError(f"body must be an object, it is {kind(request)}")
        method, url = row.get("method"), row.get("url")
        if method not in (None, "POST"):
            raise BadRowError(f"method must be POST, got {method!r}")
        if url is not None and (not isinstance(url, str) or url not in _BATCH_URLS):
            raise BadRowError(f"url must be {' or '.join(_BATCH_URLS)}, got {url!r}")
        if request.get("stream"):
            raise BadRowError("stream is on; a job streams nothing, leave it out of the body")
        if url is not None and request.get(_BATCH_URLS[url]) is None:
            raise BadRowError(f"the body has no {_BATCH_URLS[url]}, which {url} needs")
        model = request.get("model")
        if isinstance(model, str) and len(self.models) < _MAX_MODELS:
            self.models.add(model)
        body: dict[str, Any] = {}
        given: dict[str, Any] = {}
        unknown = [name for name in row if name not in _BATCH_KEYS]
        for name, value in request.items():
            if name in _BODY_KEYS:
                if value is not None:
                    body[name] = value
            elif is_parameter(name):
                given[name] = value
            elif name not in _BATCH_IGNORED:
                unknown.append(name)
        self._refuse_unknown(unknown, body, request)
        return self._with_kept(_check_body(body, request), {**request, **row}), given

    def _refuse_unknown(
        self, unknown: list[str], body: Mapping[str, Any], row: Mapping[str, Any]
    ) -> None:
        if self._ignore_unknown:
            return
        for name in unknown:
            if name in self._keep or name in self._names:
                continue
            close = _close_key(name)
            # Without a prompt the keys are columns, unless one is the prompt misspelt.
            if not _has_prompt(body) and close not in ("prompt", "messages"):
                raise _no_prompt(row)
            shown = one_line(name, 60)
            hint = f"; did you mean {close}?" if close else ""
            raise BadRowError(
                f"unknown key '{shown}'{hint} (--keep {shown} keeps the column in the request's "
                "metadata, --ignore-unknown drops it)"
            )

    def _with_kept(self, body: dict[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
        if not self._keep:
            return body
        kept = {name: columns[name] for name in sorted(self._keep) if name in columns}
        if not kept:
            return body
        self.unseen -= kept.keys()
        metadata = body.get("metadata") or {}
        for name in kept:
            if name in metadata:
                raise BadRowError(f"{name} is a column to keep and a key of metadata; give one")
        return {**body, "metadata": {**metadata, **kept}}
