"""A sequence with its future: when its new tokens end it, and with what output. No torch."""

from __future__ import annotations

import math
import time

from nightherd.errors import RowErrorCode
from worker.engine.interface import (
    FinishReason,
    Output,
    PositionLogprobs,
    RequestHandle,
    StopCheck,
    resolve_once,
)
from worker.engine.sequence import Sequence
from worker.engine.validation import one_line


class Sample(Sequence):
    """One sample of an accepted request, until its future is resolved."""

    __slots__ = ("future", "handle", "logprobs", "started", "stop_check")

    def __init__(self, handle: RequestHandle, index: int, order: int) -> None:
        super().__init__(handle.request, index, order)
        self.handle = handle
        self.future = handle.futures[index]
        self.logprobs: list[PositionLogprobs] = []
        self.stop_check: StopCheck | None = None
        self.started = 0.0

    @property
    def done(self) -> bool:
        return self.future.done()

    def begin(self) -> None:
        """Makes the stop check and the grammar; raises whatever the request's factories raise."""
        request = self.request
        if request.make_stop_check is not None:
            self.stop_check = request.make_stop_check()
        if request.make_grammar is not None:
            self.grammar = request.make_grammar()

    def take_token(self, token: int, best: float, logprobs: PositionLogprobs | None) -> bool:
        """Adds a new token; true if that ends the sample, whose future is resolved then.

        `best` is the greatest of the processed logits that it was chosen from.
        """
        if self.future.done():  # aborted
            return True
        request = self.request
        if not math.isfinite(best):
            self._fail_without_choice(best)
            return True
        if token in request.eos_token_ids:
            self._finish("stop")
            return True
        if token in request.stop_token_ids:
            self._finish("stop", stop_reason=token)
            return True
        self.token_ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if (self.stop_check is not None or self.grammar is not None) and self._stops(token):
            return True
        if len(self.token_ids) - len(request.prompt_token_ids) >= request.max_new_tokens:
            self._finish("length")
            return True
        return False

    def _stops(self, token: int) -> bool:
        """Whether the stop check or the grammar ends the sample."""
        try:
            stopped = self.stop_check is not None and self.stop_check(token)
        except Exception as error:  # the caller's stop check
            self.fail("engine_error", one_line(error))
            return True
        try:
            stopped = (self.grammar is not None and self.grammar.advance(token)) or stopped
        except ValueError as error:
            self.fail("invalid_request", f"the output format cannot go on: {error}")
            return True
        if stopped:
            self._finish("stop")
        return stopped

    def _fail_without_choice(self, best: float) -> None:
        if best != -math.inf:
            self.fail("engine_error", "the model's logits are not finite")
        elif self.grammar is not None:
            self.fail("invalid_request", "parameters and output format leave no token to choose")
        else:
            self.fail("invalid_request", "the parameters leave no token to choose")

    def _finish(self, reason: FinishReason, stop_reason: int | None = None) -> None:
        wants_logprobs = self.request.params.logprobs is not None
        resolve_once(
            self.future,
            Output(
                token_ids=tuple(self.token_ids[self.prompt_length :]),
                finish_reason=reason,
                stop_reason=stop_reason,
                logprobs=tuple(self.logprobs) if wants_logprobs else None,
                started=self.started,
                finished=time.monotonic(),
            ),
        )

    def fail(self, code: RowErrorCode, message: str) -> None:
        """Resolves the future with an error."""
        output = Output(
            token_ids=(),
            finish_reason="error",
            error_code=code,
            error_message=message,
            started=self.started,
            finished=time.monotonic(),
        )
        resolve_once(self.future, output)

    def abort(self) -> None:
        resolve_once(
            self.future, Output((), "aborted", started=self.started, finished=time.monotonic())
        )
