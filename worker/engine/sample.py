"""A sequence with its answer: what its new tokens mean, and when it ends. No torch."""

from __future__ import annotations

import math
import time

from worker.engine.interface import (
    FinishReason,
    Generation,
    Output,
    PositionLogprobs,
    StopCheck,
    answer,
)
from worker.engine.requests import one_line
from worker.engine.sequence import Sequence


class Sample(Sequence):
    """One sample of an accepted request, until its terminal answer."""

    __slots__ = ("check", "future", "generation", "logprobs", "started")

    def __init__(self, generation: Generation, place: int, order: int) -> None:
        super().__init__(generation.request, place, order)
        self.generation = generation
        self.future = generation.futures[place]
        self.logprobs: list[PositionLogprobs] = []
        self.check: StopCheck | None = None
        self.started = 0.0

    @property
    def done(self) -> bool:
        return self.future.done()

    def begin(self) -> None:
        """Makes what the caller wants to be asked; raises whatever the caller's factories raise."""
        request = self.request
        if request.make_stop_check is not None:
            self.check = request.make_stop_check()
        if request.make_grammar is not None:
            self.grammar = request.make_grammar()

    def take(self, token: int, best: float, logprobs: PositionLogprobs | None) -> bool:
        """Takes in a new token; true if the sample has ended, answered by then.

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
        if (self.check is not None or self.grammar is not None) and self._stops(token):
            return True
        if len(self.token_ids) - len(request.prompt_token_ids) >= request.max_new_tokens:
            self._finish("length")
            return True
        return False

    def _stops(self, token: int) -> bool:
        """Asks stop strings and grammar."""
        try:
            stopped = self.check is not None and self.check(token)
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
        asked = self.request.params.logprobs is not None
        answer(
            self.future,
            Output(
                token_ids=tuple(self.token_ids[self.prompt_length :]),
                finish_reason=reason,
                stop_reason=stop_reason,
                logprobs=tuple(self.logprobs) if asked else None,
                started=self.started,
                finished=time.monotonic(),
            ),
        )

    def fail(self, code: str, message: str) -> None:
        """Answers with an error."""
        output = Output(
            token_ids=(),
            finish_reason="error",
            error_code=code,
            error_message=message,
            started=self.started,
            finished=time.monotonic(),
        )
        answer(self.future, output)

    def abort(self) -> None:
        answer(self.future, Output((), "aborted", started=self.started, finished=time.monotonic()))
