"""Chat templates: Jinja2 in a sandbox, as transformers renders them.

Templates come with checkpoints from the Hub and are code that has not been reviewed, so they see
only plain values and cannot reach Python's internals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from nightherd.errors import CheckpointError, RowError


class _GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's words for training: here it renders them."""

    tags = {"generation"}  # noqa: RUF012  (Jinja2 declares it as an instance's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _SafeNamespace(Namespace):
    """A namespace without underscored names, which could stand in for Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No parameter is named, so that a template may call namespace(self=…), as Jinja2 has it.
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not set {name!r} on a namespace")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja2's own escapes for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatTemplate:
    """One compiled template with the checkpoint's special tokens in its context.

    Raises `CheckpointError` where the template is no Jinja2.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.globals["namespace"] = _SafeNamespace
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is not valid Jinja2: line {error.lineno}: {error.message}; "
                "give another with --chat-template"
            ) from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The chat as one text; raises `RowError` (`invalid_request`) where the template refuses.

        Keys that are None are left out of the messages: templates handle a missing key and would
        print the word None.
        """
        plain = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        try:
            return self._template.render(
                **self._special_tokens,
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            # Besides TemplateError: whatever the template's own expressions raise.
            reason = " ".join(str(error).split())
            raise RowError("invalid_request", f"the chat template refused: {reason}") from None
