"""What a checkpoint can take, checked while a job is submitted: its context, template, vocabulary.

All of it is checked again by the worker, as a row's own error. Here it costs the user a line
instead of a night, wherever the checkpoint's folder is on this machine: `demo`, a path, or a
repository in the Hub's cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nightherd.catalogue import cached_folder
from nightherd.errors import CheckpointError, ParameterError, RowError
from nightherd.params import SamplingParams
from nightherd.text import TextProcessor, context_length, find_template
from nightherd.tokenizer import read_json

log = logging.getLogger("nightherd.submit")

_SPARE_BYTES = 64
"""Tokens that a tokenizer may add to a text of so many bytes: bos, eos, a space before it."""

CheckedRow = tuple[Mapping[str, Any], SamplingParams]
"""A request's body and its effective parameters."""


class CheckpointLimits:
    """The limits of the checkpoint in one folder. Its tokenizer is loaded when first needed."""

    def __init__(self, folder: Path, key: str, home: Path, template_elsewhere: bool) -> None:
        """`template_elsewhere`: a worker serves it already, maybe with a template of its own.

        Raises `CheckpointError` where the folder's configuration cannot be read.
        """
        self._folder, self._key, self._home = folder, key, home
        self._template_elsewhere = template_elsewhere
        try:
            self.context = context_length(read_json(folder, "config.json"))
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {key}: {error}") from None
        """Prompt and generated tokens together, at most."""
        settings = read_json(folder, "tokenizer_config.json")
        self._has_template = find_template(folder, settings) is not None

    @cached_property
    def _text(self) -> TextProcessor | None:
        try:
            return TextProcessor.load(self._folder, home=self._home)
        except CheckpointError as error:
            log.warning(
                "the rows are not measured against %s's context and vocabulary here, its workers "
                "fail those that are beyond: %s",
                self._key,
                error,
            )
            return None

    def check_params(self, given: Mapping[str, Any]) -> None:
        """Raises `ParameterError` where one layer of parameters is beyond what the model has."""
        for name in ("max_tokens", "max_length", "min_tokens"):
            if (value := given.get(name)) is not None and value > self.context:
                raise ParameterError(
                    f"{name} {value:,} is beyond the context of {self._key}, {self.context:,} "
                    "tokens with the prompt; lower it"
                )
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            ids = [int(token) for token in given.get(name) or ()]
            if ids and self._text is not None and max(ids) >= self._text.vocab_size:
                raise ParameterError(
                    f"{name} has the token id {max(ids)}, which is not in the vocabulary of "
                    f"{self._key} (0 to {self._text.vocab_size - 1})"
                )

    def problems(self, rows: Sequence[CheckedRow]) -> list[str | None]:
        """Why this checkpoint cannot answer each row; None where it can.

        A row is only tokenised where its bytes could be more tokens than the context.
        """
        found: list[str | None] = [None] * len(rows)
        doubtful = []
        for index, (body, params) in enumerate(rows):
            if self._is_chat_without_template(body):
                found[index] = (
                    f"a chat, but {self._key} has no chat template: ask with prompts, or first "
                    f"start nightherd worker --checkpoint {self._key} --chat-template FILE"
                )
            elif self._may_be_too_long(body, params):
                doubtful.append(index)
        if doubtful and self._text is not None:
            prepared = self._text.prepare_many([rows[index] for index in doubtful])
            for index, outcome in zip(doubtful, prepared, strict=True):
                found[index] = self._prompt_problem(outcome)
        return found

    def _prompt_problem(self, outcome: list[int] | RowError) -> str | None:
        if isinstance(outcome, RowError):
            return outcome.message
        if len(outcome) < self.context:
            return None
        return (
            f"the prompt has {len(outcome):,} tokens, which leaves no room in the context of "
            f"{self._key}, {self.context:,} tokens; shorten it or set truncate_prompt_tokens"
        )

    def _is_chat_without_template(self, body: Mapping[str, Any]) -> bool:
        if self._has_template or self._template_elsewhere:
            return False
        return body.get("messages") is not None and body.get("prompt") is None

    def _may_be_too_long(self, body: Mapping[str, Any], params: SamplingParams) -> bool:
        messages = body.get("messages")
        if messages is not None and (self._has_template or "prompt" not in body):
            if not self._has_template:
                return False  # nobody here knows the template
            size = sum(_size(message["content"]) for message in messages)
            size += self._template_bytes * (len(messages) + 1)
        elif isinstance(prompt := body.get("prompt"), str):
            size = _size(prompt)
        else:
            return True  # token ids: all of them are looked at
        keep = params.truncate_prompt_tokens
        return size + _SPARE_BYTES >= self.context and (keep is None or keep >= self.context)

    @cached_property
    def _template_bytes(self) -> int:
        """What the template writes around one message, at most: all it writes for an empty one."""
        if self._text is None:
            return 0
        try:
            return _size(self._text.render_chat([{"role": "user", "content": ""}]))
        except RowError:
            return self.context  # it refuses this chat: render each one


def _size(text: str) -> int:
    """Bytes of UTF-8, which are never fewer than the tokens, or a bound on them where it is low."""
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def cached_limits(key: str, home: Path, serving: Iterable[str] = ()) -> CheckpointLimits | None:
    """The limits of a checkpoint key, None where its folder is not on this machine.

    `serving` are the live workers that serve it.
    """
    folder = cached_folder(key)
    if folder is None:
        return None
    return CheckpointLimits(folder, key, home, template_elsewhere=any(serving))
