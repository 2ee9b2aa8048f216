"""How the reference engine processes logits: each row of a batch by its own request's parameters.

Where transformers has a class for a step, that class does it, on the rows that share its value, so
that the engine can be trusted as a reference. The order: allowed ids, bad words, bias, minimum
length, penalties; then, for rows that sample, temperature, top-k, top-p, min-p and noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nightherd.errors import RowErrorCode
from worker.engine.interface import (
    EngineRequest,
    FinishReason,
    Output,
    PositionLogprobs,
    RequestHandle,
    StopCheck,
    TokenLogprob,
    resolve_once,
)
from worker.engine.noise import gumbel_noise, noise_key

GREEDY_BELOW = 1e-5
"""A lower temperature is taken for 0: dividing by it would overflow."""


class BatchRow:
    """One sample of an accepted request: a row of a batch."""

    __slots__ = ("future", "logprobs", "request", "seed", "started", "stop_check", "tokens")

    def __init__(self, handle: RequestHandle, sample: int) -> None:
        self.request: EngineRequest = handle.request
        self.future: Future[Output] = handle.futures[sample]
        self.seed = handle.request.seeds[sample]
        self.tokens: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.stop_check: StopCheck | None = None
        self.started = 0.0

    @property
    def done(self) -> bool:
        return self.future.done()

    def restart(self) -> None:
        """Forgets what was generated, for a first or another attempt."""
        self.tokens = []
        self.logprobs = []
        make = self.request.make_stop_check
        self.stop_check = None if make is None else make()

    def finish(self, reason: FinishReason, stop_reason: int | None = None) -> None:
        """Resolves the future with what was generated."""
        wants_logprobs = self.request.params.logprobs is not None
        resolve_once(
            self.future,
            Output(
                token_ids=tuple(self.tokens),
                finish_reason=reason,
                stop_reason=stop_reason,
                logprobs=tuple(self.logprobs) if wants_logprobs else None,
                started=self.started,
                finished=time.monotonic(),
            ),
        )

    def fail(self, code: RowErrorCode, message: str) -> None:
        """Resolves the future with an error."""
        resolve_once(
            self.future,
            Output(
                token_ids=(),
                finish_reason="error",
                error_code=code,
                error_message=message,
                started=self.started,
                finished=time.monotonic(),
            ),
        )

    def abort(self) -> None:
        resolve_once(
            self.future,
            Output((), "aborted", started=self.started, finished=time.monotonic()),
        )


_Key = TypeVar("_Key", bound=Hashable)
_Warper = Callable[[torch.LongTensor, torch.FloatTensor], torch.Tensor]


class BatchLogits(LogitsProcessor):
    """The logits processor of one left-padded batch, `rows[r]` at row r of its tensors."""

    def __init__(
        self, rows: Sequence[BatchRow], width: int, vocab_size: int, device: torch.device
    ) -> None:
        """`width` is the padded length of the prompts. Ids from `vocab_size` on are never chosen:
        they pad the model's vocabulary and stand for no text."""
        self._rows = rows
        self._width = width
        self._vocab_size = vocab_size
        self._device = device
        self.best: list[float] = []
        """The greatest processed logit of each row, after the latest call; minus infinity where no
        token was left to choose, NaN where the model's logits were not finite."""
        self._raw: torch.Tensor | None = None

        params = [row.request.params for row in rows]
        self._logprob_rows = [r for r, p in enumerate(params) if p.logprobs is not None]
        self._allowed = {
            r: self._forbidden_mask(p.allowed_token_ids)
            for r, p in enumerate(params)
            if p.allowed_token_ids is not None
        }
        self._bias = {
            r: (self._tensor(list(p.logit_bias)), self._tensor(list(p.logit_bias.values())))
            for r, p in enumerate(params)
            if p.logit_bias
        }
        self._ends = {
            r: self._tensor(sorted(token for token in ends if token < vocab_size))
            for r, ends in enumerate(
                row.request.eos_token_ids | row.request.stop_token_ids for row in rows
            )
            if params[r].min_tokens > 0
        }
        self._counted = [
            r for r, p in enumerate(params) if p.presence_penalty or p.frequency_penalty
        ]
        self._repetition = self._repetition_groups()
        self._sampled = [r for r, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
        self._warpers = self._warper_groups()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Processed logits with noise, `[rows, vocab_size]`; their argmax is each row's sample.

        `input_ids` is `[rows, width + generated]`, `scores` the logits, float32, of the model's
        whole vocabulary; they are overwritten.
        """
        step = input_ids.shape[1] - self._width
        logits = scores[:, : self._vocab_size]
        if self._logprob_rows:
            self._raw = torch.log_softmax(logits[self._logprob_rows], dim=-1)
        self._constrain(logits, step)
        self._penalise(logits, input_ids)
        for index, warpers in self._warpers:
            part = logits[index]
            for warper in warpers:
                part = warper(input_ids, part)  # type: ignore[arg-type]
            logits[index] = part
        self.best = logits.amax(dim=-1).tolist()
        active = [r for r in self._sampled if not self._rows[r].done]
        if active:
            keys = [noise_key(self._rows[r].seed, step) for r in active]
            logits[active] += gumbel_noise(keys, self._vocab_size, self._device)
        return logits  # type: ignore[return-value]

    def take_logprobs(self, tokens: Sequence[int]) -> dict[int, PositionLogprobs]:
        """Of the latest call, by row, for the rows whose requests want them; `tokens` were chosen.

        Natural logarithms of the softmax over the ids below `vocab_size`, before any processing.
        """
        if not self._logprob_rows or self._raw is None:
            return {}
        rows = self._logprob_rows
        chosen = self._raw.gather(1, self._tensor([tokens[r] for r in rows])[:, None])
        counts = [self._rows[r].request.params.logprobs or 0 for r in rows]
        top = self._raw.topk(min(max(counts), self._vocab_size), dim=-1)
        values, ids = top.values.tolist(), top.indices.tolist()
        return {
            r: PositionLogprobs(
                chosen=TokenLogprob(tokens[r], float(chosen[index])),
                top=tuple(
                    TokenLogprob(token, value)
                    for token, value in zip(ids[index][:k], values[index][:k], strict=True)
                ),
            )
            for index, (r, k) in enumerate(zip(rows, counts, strict=True))
        }

    def _constrain(self, logits: torch.Tensor, step: int) -> None:
        for r, mask in self._allowed.items():
            logits[r].masked_fill_(mask, -torch.inf)
        for r, row in enumerate(self._rows):
            for word in row.request.bad_words:
                if not row.done and _ends_with(row, word[:-1]):
                    logits[r, word[-1]] = -torch.inf
        for r, (ids, values) in self._bias.items():
            logits[r].index_add_(0, ids, values)
        for r, ids in self._ends.items():
            if step < self._rows[r].request.params.min_tokens:
                logits[r].index_fill_(0, ids, -torch.inf)

    def _penalise(self, logits: torch.Tensor, input_ids: torch.Tensor) -> None:
        for index, penalty in self._repetition:
            logits[index] = penalty(input_ids[index], logits[index])
        for r in self._counted:
            # As vLLM and the OpenAI API have it: over generated tokens alone.
            generated = input_ids[r, self._width :]
            counts = torch.bincount(generated, minlength=self._vocab_size)[: self._vocab_size]
            params = self._rows[r].request.params
            logits[r] -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)

    def _repetition_groups(self) -> list[tuple[torch.Tensor, RepetitionPenaltyLogitsProcessor]]:
        """Rows by penalty, over prompt and generated tokens but never over the padding."""
        groups = _groups(
            {
                r: row.request.params.repetition_penalty
                for r, row in enumerate(self._rows)
                if row.request.params.repetition_penalty != 1
            }
        )
        return [
            (
                self._tensor(rows),
                RepetitionPenaltyLogitsProcessor(
                    penalty,
                    prompt_ignore_length=self._tensor(
                        [self._width - len(self._rows[r].request.prompt_token_ids) for r in rows]
                    ),
                ),
            )
            for penalty, rows in groups.items()
        ]

    def _warper_groups(self) -> list[tuple[torch.Tensor, list[_Warper]]]:
        """Sampled rows by their four values, with transformers' warpers in transformers' order."""
        groups = _groups(
            {
                r: (p.temperature, p.top_k, p.top_p, p.min_p)
                for r, p in ((r, self._rows[r].request.params) for r in self._sampled)
            }
        )
        out: list[tuple[torch.Tensor, list[_Warper]]] = []
        for (temperature, top_k, top_p, min_p), rows in groups.items():
            warpers: list[_Warper] = []
            if temperature != 1:
                warpers.append(TemperatureLogitsWarper(temperature))
            if top_k > 0:
                warpers.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                warpers.append(TopPLogitsWarper(top_p))
            if min_p > 0:
                warpers.append(MinPLogitsWarper(min_p))
            if warpers:
                out.append((self._tensor(rows), warpers))
        return out

    def _forbidden_mask(self, allowed: Sequence[int]) -> torch.Tensor:
        mask = torch.ones(self._vocab_size, dtype=torch.bool, device=self._device)
        mask[self._tensor(list(allowed))] = False
        return mask

    def _tensor(self, values: Sequence[int] | Sequence[float]) -> torch.Tensor:
        whole = all(isinstance(value, int) for value in values)
        return torch.tensor(
            values, dtype=torch.int64 if whole else torch.float32, device=self._device
        )


def _groups(keys: dict[int, _Key]) -> dict[_Key, list[int]]:
    groups: dict[_Key, list[int]] = {}
    for row, key in keys.items():
        groups.setdefault(key, []).append(row)
    return groups


def _ends_with(row: BatchRow, tokens: Sequence[int]) -> bool:
    """Whether prompt and generated tokens together end with `tokens`."""
    wanted = len(tokens)
    if not wanted:
        return True
    last = (*row.request.prompt_token_ids[-wanted:], *row.tokens[-wanted:])[-wanted:]
    return last == tuple(tokens)
