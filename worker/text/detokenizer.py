"""Token ids out of the engine, text out of the worker: stop strings, log-probabilities, results.

The engine ends a sample when its `StopStringCheck` says so, at a token; where in the text the stop
string begins is found again in the final text, by `finish_text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nightherd.errors import RowErrorCode
from nightherd.params import SamplingParams
from nightherd.structured import without_leading_space
from nightherd.text import TextProcessor
from worker.engine.interface import Output, PositionLogprobs, TokenLogprob

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 16
"""Tokens without a whole character after which they are taken for noise, not for its bytes."""

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write (as in the OpenAI API)."""


def find_stop(text: str, stops: Sequence[str], floor: int = 0) -> tuple[int, str] | None:
    """The stop string that is complete first in `text`, reading it character by character, and
    where it begins. Of two that end together the longer.

    Those that end within the first `floor` characters do not count.
    """
    best: tuple[int, int, str] | None = None
    for stop in stops:
        start = text.find(stop, max(0, floor - len(stop) + 1))
        if start >= 0:
            found = (start + len(stop), start, stop)
            best = found if best is None else min(best, found)
    return None if best is None else best[1:]


class StopStringCheck:
    """Whether a sample's text has come to a stop string: made for one sample, fed its tokens.

    It decodes only the last tokens, and keeps only so much text as the longest stop string can
    span. A stop string may begin within a token and end within another. One that is complete
    before `min_tokens` tokens are out does not end the sample, then or later.
    """

    def __init__(
        self,
        text: TextProcessor,
        stops: Sequence[str],
        *,
        prompt_tail: Sequence[int] = (),
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._text = text
        self._stops = tuple(stops)
        self._keep = max(map(len, self._stops), default=1) - 1
        self._skip_special_tokens = skip_special_tokens
        self._min_tokens = min_tokens
        # Tokens that are text already, the last few of them; and those after, which may end within
        # a character.
        self._context, self._before = text.decoding_context(prompt_tail, skip_special_tokens)
        self._pending: list[int] = []
        self._tail = ""
        """The end of the text before the pending tokens, shorter than the longest stop string."""
        self._floor = 0
        """Characters at the start of `_tail`, and of what follows, that came too early to count."""
        self._count = 0

    def __call__(self, token_id: int) -> bool:
        self._count += 1
        self._pending.append(token_id)
        fresh = self._text.decode_after(
            self._context, self._before, self._pending, self._skip_special_tokens
        )
        whole = fresh.rstrip(_REPLACEMENT)
        seen = self._tail + whole
        found = None
        if self._count >= self._min_tokens:
            found = find_stop(seen, self._stops, self._floor)
        else:
            self._floor = len(seen)
        if (fresh and whole == fresh) or len(self._pending) > _MAX_PENDING:
            self._commit_pending(fresh)
        return found is not None

    def _commit_pending(self, fresh: str) -> None:
        """The pending tokens are text now: `fresh`."""
        text = self._tail + fresh
        cut = max(0, len(text) - self._keep)
        self._tail = text[cut:]
        self._floor = max(0, self._floor - cut)
        self._context, self._before = self._text.decoding_context(
            [*self._context, *self._pending], self._skip_special_tokens
        )
        self._pending = []


def finish_text(
    text: TextProcessor,
    token_ids: Sequence[int],
    params: SamplingParams,
    prompt_tail: Sequence[int] = (),
) -> tuple[str, str | None]:
    """The final text of a sample, and the stop string that ended it, if one did.

    The stop string and what came after it in the last token are cut off; with
    `include_stop_str_in_output` only the latter. Of a choice and of JSON the leading space is cut.
    """
    skip = params.skip_special_tokens
    final = text.decode(token_ids, prompt_tail, skip)
    if not params.stop:
        return without_leading_space(params, final), None
    floor = 0
    if params.min_tokens > 1:
        early = text.decode(token_ids[: params.min_tokens - 1], prompt_tail, skip)
        floor = len(early.rstrip(_REPLACEMENT))
    found = find_stop(final, params.stop, floor)
    if found is None:
        return final, None
    start, stop = found
    end = start + len(stop) if params.include_stop_str_in_output else start
    return final[:end], stop


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What is stored for one sample, but for its index, seed and times."""

    text: str | None
    """None where there is an error."""
    finish_reason: str
    """`stop`, `length` or `error`."""
    stop_reason: int | str | None
    """The stop string or stop token id that ended it; None for the end of sequence."""
    completion_tokens: int
    logprobs: dict[str, Any] | None
    error_code: RowErrorCode | None = None
    error_message: str | None = None


def to_result(
    output: Output,
    text: TextProcessor,
    params: SamplingParams,
    prompt_tail: Sequence[int] = (),
) -> SampleResult:
    """What the engine gave for a sample, as it is stored.

    `prompt_tail` is the prompt's last few token ids (`nightherd.text.PROMPT_TAIL` are enough). An
    aborted sample has no result: raises `ValueError`.
    """
    if output.finish_reason == "aborted":
        raise ValueError("an aborted sample has no result")
    if output.finish_reason == "error":
        return SampleResult(
            text=None,
            finish_reason="error",
            stop_reason=None,
            completion_tokens=0,
            logprobs=None,
            error_code=output.error_code or "engine_error",
            error_message=output.error_message or "the engine gave no reason",
        )
    final, stop = finish_text(text, output.token_ids, params, prompt_tail)
    return SampleResult(
        text=final,
        finish_reason="stop" if stop is not None else output.finish_reason,
        stop_reason=stop if stop is not None else output.stop_reason,
        completion_tokens=len(output.token_ids),
        logprobs=None if output.logprobs is None else logprobs_json(output.logprobs, text),
    )


def logprobs_json(positions: Sequence[PositionLogprobs], text: TextProcessor) -> dict[str, Any]:
    """Log-probabilities in the form of the OpenAI chat API, one entry a token."""
    return {
        "content": [
            {
                **_token_json(position.chosen, text),
                "top_logprobs": [_token_json(token, text) for token in position.top],
            }
            for position in positions
        ]
    }


def _token_json(token: TokenLogprob, text: TextProcessor) -> dict[str, Any]:
    raw = text.token_bytes(token.token_id)
    return {
        "token": raw.decode(errors="replace"),
        "logprob": max(token.logprob, LOWEST_LOGPROB),
        "bytes": list(raw),
    }
