"""Chooses the next tokens of a step: every row by its own parameters, all rows at once.

The order is that of the reference engine: grammar and allowed ids, bad words, bias, minimum length,
penalties; then, for rows that sample, temperature, top-k, top-p, min-p and noise. Each parameter is
one indexed operation over all rows that have it. The vocabulary is not sorted: a row with top-k,
top-p or min-p looks at a window of its likeliest tokens, whose width depends on these, and at all
of them only if tokens beyond the window may be chosen.

Where transformers' top-p drops some of several tokens of equal logit, this keeps all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from worker.engine import noise
from worker.engine.interface import PositionLogprobs, TokenLogprob
from worker.engine.runner import Choices
from worker.engine.sequence import Sequence

GREEDY_BELOW = 1e-5
"""A lower temperature is taken for 0: dividing by it would overflow."""
WINDOWS = (64, 1024)
"""Likeliest tokens that a row with top-k, top-p or min-p looks at first."""
NOISE_NUMBERS = 2**19
"""Noise numbers that are made at a time: as many as fit into the processor's cache."""

_Ints = npt.NDArray[np.int64]


class _SamplerState:
    """A sequence's sampling state. All of it follows from the request and the tokens."""

    __slots__ = (
        "allowed",
        "bias_ids",
        "bias_values",
        "counted",
        "counts",
        "ends",
        "index_of",
        "params",
        "penalised",
        "seed",
        "seen",
        "window",
    )

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        request = sequence.request
        params = request.params
        self.params = params
        self.seed = request.seeds[sequence.index]
        self.window = _window(params.top_k, params.top_p, params.min_p, vocab_size)
        """The number of likeliest tokens looked at first; 0: all tokens may be chosen."""
        self.allowed = None if params.allowed_token_ids is None else _ids(params.allowed_token_ids)
        self.bias_ids = _ids(params.logit_bias)
        self.bias_values = np.array(list(params.logit_bias.values()), np.float32)
        ends = request.eos_token_ids | request.stop_token_ids
        self.ends = _ids(sorted(token for token in ends if token < vocab_size))
        self.penalised = (
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        # The sequence's tokens [0, counted) are in `seen` and `counts`.
        prompt = 0 if params.repetition_penalty != 1 else sequence.prompt_length
        self.counted = prompt
        self.index_of: dict[int, int] = {}
        self.seen = np.empty(64, np.int64)
        """The distinct tokens so far; the prompt's only with a repetition penalty."""
        self.counts = np.zeros(64, np.float32)
        """How often each of them was generated."""

    def count(self, sequence: Sequence) -> tuple[_Ints, npt.NDArray[np.float32]]:
        """The tokens that penalties apply to, and how often each was generated."""
        prompt = sequence.prompt_length
        for position in range(self.counted, sequence.length):
            token = sequence.token_ids[position]
            index = self.index_of.setdefault(token, len(self.index_of))
            if index == len(self.seen):
                self.seen = np.concatenate([self.seen, np.empty_like(self.seen)])
                self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
            self.seen[index] = token
            self.counts[index] += position >= prompt
        self.counted = sequence.length
        return self.seen[: len(self.index_of)], self.counts[: len(self.index_of)]


class _Batch:
    """What stays the same from step to step while the same sequences choose, in the same order."""

    def __init__(self, sequences: list[Sequence], sampler: Sampler) -> None:
        self.sequences = sequences
        self.states = states = [sampler.state(sequence) for sequence in sequences]
        params = [state.params for state in states]
        self.bad_words = [r for r, s in enumerate(sequences) if s.request.bad_words]
        self.min_tokens = [r for r, p in enumerate(params) if p.min_tokens]
        self.penalised = [r for r, state in enumerate(states) if state.penalised]
        self.logprobs = [r for r, p in enumerate(params) if p.logprobs is not None]

        self.allowed = [r for r, state in enumerate(states) if state.allowed is not None]
        self.allowed_ids = sampler.flat(
            list(range(len(self.allowed))),
            [state.allowed for state in states if state.allowed is not None],
        )
        biased = [r for r, state in enumerate(states) if len(state.bias_ids)]
        self.biased_ids = sampler.flat(biased, [states[r].bias_ids for r in biased])
        self.biases = sampler.tensor(
            np.concatenate([np.empty(0, np.float32), *(states[r].bias_values for r in biased)])
        )

        sampled = [r for r, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
        self.any_sampled = bool(sampled)
        self.temperatures = sampler.floats(
            [p.temperature if p.temperature >= GREEDY_BELOW else 1 for p in params]
        )[:, None]
        self.wide = [r for r in sampled if not states[r].window]
        self.narrow = [
            _NarrowRows([r for r in sampled if states[r].window == window], window, states, sampler)
            for window in sorted({states[r].window for r in sampled} - {0})
        ]


class _NarrowRows:
    """Rows that choose within a window of their likeliest tokens; parameters are [rows, 1]."""

    def __init__(
        self, rows: list[int], window: int, states: list[_SamplerState], sampler: Sampler
    ) -> None:
        self.rows = rows
        self.window = window
        params = [states[r].params for r in rows]
        # `top_k` of all tokens is the same as no `top_k`.
        everything = sampler.vocab_size
        top_k = [p.top_k if 0 < p.top_k < everything else everything for p in params]
        self.top_k = sampler.tensor(_ids(top_k))[:, None]
        self.top_p = sampler.floats([p.top_p for p in params])[:, None]
        self.log_min_p = sampler.floats(
            [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
        )[:, None]
        self.nucleus = any(p.top_p < 1 for p in params)
        # Only these need the mass of the whole vocabulary.
        self.whole = self.nucleus and any(
            k == everything and p.top_p < 1 for k, p in zip(top_k, params, strict=True)
        )

    def least(
        self, logits: torch.Tensor, window: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The least logit that each row may choose, and if the window suffices; [rows, 1] each.

        `logits` is [rows, vocab], `window` the greatest of them, descending. It does not suffice if
        tokens beyond it may be chosen, or equal one that top-k keeps.
        """
        indices = torch.arange(window.shape[1], device=window.device)
        last = torch.clamp(self.top_k, max=window.shape[1]) - 1
        least = window.gather(1, last)
        end_of_window = window[:, -1:]
        enough = (self.top_k == logits.shape[1]) | (end_of_window < least)
        if self.nucleus:
            weights = (window - window[:, :1]).exp_().masked_fill_(window < least, 0)
            # Sequential on a CPU, so that the zeros at the end change nothing.
            mass = weights.cumsum(1)
            total = mass[:, -1:]
            if self.whole:
                # A row's own, and not torch.logsumexp: that sums a single row in another order.
                first = torch.log_softmax(logits, dim=-1).amax(-1, keepdim=True)
                total = torch.where(self.top_k < logits.shape[1], total, (-first).exp_())
            inside = (mass - weights < self.top_p * total) & (window >= least)
            end = torch.where(inside, indices, 0).amax(1, keepdim=True)
            nucleus = window.gather(1, end)
            least = torch.where(self.top_p < 1, torch.maximum(least, nucleus), least)
        least = torch.maximum(least, window[:, :1] + self.log_min_p)
        return least, enough & (end_of_window < least)


class Sampler:
    """Chooses tokens below `vocab_size`."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._device = device
        self._batch = _Batch([], self)

    def choose(self, logits: torch.Tensor, sequences: list[Sequence]) -> Choices:
        """`logits` is [sequences, vocab_size], float32, and is overwritten."""
        if self._batch.sequences != sequences:
            self._batch = _Batch(list(sequences), self)
        batch = self._batch
        raw = torch.log_softmax(logits[batch.logprobs], dim=-1) if batch.logprobs else None
        logits = logits.contiguous()
        self._process(logits, sequences)
        if batch.any_sampled:
            logits = logits.div_(batch.temperatures)
        tokens = logits.argmax(dim=-1)
        # NaN is the greatest to argmax, so that it is seen here.
        best = logits.gather(1, tokens[:, None])[:, 0].tolist()
        for narrow in batch.narrow:
            tokens[narrow.rows] = self._sample_narrow(logits, narrow)
        if batch.wide:
            tokens[batch.wide] = self._sample_wide(self._rows(logits, batch.wide), batch.wide)
        chosen = tokens.tolist()
        return Choices(chosen, best, {} if raw is None else self._logprobs(raw, chosen))

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        sequence.sampling = None
        if sequence in self._batch.sequences:
            self._batch = _Batch([], self)

    def state(self, sequence: Sequence) -> _SamplerState:
        if not isinstance(sequence.sampling, _SamplerState):
            sequence.sampling = _SamplerState(sequence, self.vocab_size)
        return sequence.sampling

    def _process(self, logits: torch.Tensor, sequences: list[Sequence]) -> None:
        """Everything but sampling, in place; `logits` as for `choose`, contiguous."""
        batch = self._batch
        values = logits.view(-1)
        self._forbid_ungrammatical(logits, sequences)
        if batch.allowed:
            forbidden = torch.ones(
                len(batch.allowed), self.vocab_size, dtype=torch.bool, device=self._device
            )
            forbidden.view(-1)[batch.allowed_ids] = False
            logits[batch.allowed] = logits[batch.allowed].masked_fill_(forbidden, -torch.inf)
        words = [
            (r, word[-1])
            for r in batch.bad_words
            for word in sequences[r].request.bad_words
            if _ends_with(sequences[r], word[:-1])
        ]
        if words:
            flat = self.flat([r for r, _ in words], [_ids([token]) for _, token in words])
            values[flat] = -torch.inf
        if len(batch.biased_ids):
            values[batch.biased_ids] += batch.biases
        short = [
            r
            for r in batch.min_tokens
            if sequences[r].generated < batch.states[r].params.min_tokens
        ]
        if short:
            values[self.flat(short, [batch.states[r].ends for r in short])] = -torch.inf
        if batch.penalised:
            self._penalise(values, sequences)

    def _forbid_ungrammatical(self, logits: torch.Tensor, sequences: list[Sequence]) -> None:
        rows = [r for r, sequence in enumerate(sequences) if sequence.grammar is not None]
        if not rows:
            return
        masks = np.zeros((len(rows), -(-self.vocab_size // 32)), np.int32)
        for mask, r in zip(masks, rows, strict=True):
            grammar = sequences[r].grammar
            try:
                if grammar is not None:
                    grammar.fill_mask(mask)
            except ValueError:
                mask[:] = 0  # no token may come: this row alone has nothing to choose
        self.forbid(logits, rows, masks)

    def forbid(self, logits: torch.Tensor, rows: list[int], masks: npt.NDArray[np.int32]) -> None:
        """Minus infinity, in place, where the bits of `masks`, a row for each of `rows`, are 0."""
        bits = self.tensor(masks)[:, :, None] >> torch.arange(32, device=self._device)
        allowed = (bits & 1).view(len(rows), -1)[:, : self.vocab_size].bool()
        logits[rows] = logits[rows].masked_fill_(~allowed, -torch.inf)

    def _penalise(self, values: torch.Tensor, sequences: list[Sequence]) -> None:
        """Repetition over prompt and output (Keskar et al. 2019, as transformers has it);
        frequency and presence over the output alone, as vLLM and the OpenAI API have them."""
        rows = self._batch.penalised
        states = [self._batch.states[r] for r in rows]
        parts = [state.count(sequences[r]) for r, state in zip(rows, states, strict=True)]
        flat = self.flat(rows, [seen for seen, _ in parts])
        counts = self.tensor(np.concatenate([count for _, count in parts]))
        lengths = [len(seen) for seen, _ in parts]
        repetition, frequency, presence = (
            self.tensor(np.repeat(np.array(given, np.float32), lengths))
            for given in zip(
                *(
                    (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
                    for p in (state.params for state in states)
                ),
                strict=True,
            )
        )
        old = values[flat]
        new = torch.where(old < 0, old * repetition, old / repetition)
        values[flat] = new - (frequency * counts + presence * (counts > 0))

    def _sample_narrow(self, logits: torch.Tensor, narrow: _NarrowRows) -> torch.Tensor:
        """Token ids, [rows of `narrow`]."""
        logits = self._rows(logits, narrow.rows)
        values, ids = logits.topk(narrow.window, dim=-1)
        least, enough = narrow.least(logits, values)
        keys = self._keys(narrow.rows)
        scores = values.masked_fill(values < least, -torch.inf) + _noise_at(keys, ids)
        tokens = ids.gather(1, scores.argmax(1, keepdim=True))[:, 0]
        if narrow.window == self.vocab_size:
            return tokens
        overflow = (~enough).nonzero()[:, 0].tolist()
        if overflow:
            whole = _NarrowRows(
                [narrow.rows[r] for r in overflow], self.vocab_size, self._batch.states, self
            )
            overflow_logits = logits[overflow]
            least, _ = whole.least(overflow_logits, overflow_logits.sort(descending=True).values)
            overflow_logits.masked_fill_(overflow_logits < least, -torch.inf)
            tokens[overflow] = self._sample_wide(overflow_logits, whole.rows)
        return tokens

    def _sample_wide(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Token ids of the batch's `rows`, whose processed logits these are."""
        keys = self._keys(rows)
        step = max(1, NOISE_NUMBERS // self.vocab_size)
        parts = []
        for first in range(0, len(rows), step):
            some = slice(first, first + step)
            added = noise.gumbel_noise(keys[some], self.vocab_size, self._device)
            parts.append((added + logits[some]).argmax(1))
        return torch.cat(parts)

    def _keys(self, rows: list[int]) -> list[int]:
        batch = self._batch
        return [noise.noise_key(batch.states[r].seed, batch.sequences[r].generated) for r in rows]

    def _logprobs(self, raw: torch.Tensor, chosen: list[int]) -> dict[int, PositionLogprobs]:
        """`raw` is the log-softmax of the unprocessed logits of the rows whose requests want it."""
        rows = self._batch.logprobs
        tokens = [chosen[r] for r in rows]
        own = raw.gather(1, self.tensor(_ids(tokens))[:, None])[:, 0].tolist()
        counts = [self._batch.states[r].params.logprobs or 0 for r in rows]
        top = raw.topk(min(max(counts), self.vocab_size), dim=-1)
        values, ids = top.values.tolist(), top.indices.tolist()
        return {
            r: PositionLogprobs(
                chosen=TokenLogprob(tokens[index], own[index]),
                top=tuple(map(TokenLogprob, ids[index][:k], values[index][:k])),
            )
            for index, (r, k) in enumerate(zip(rows, counts, strict=True))
        }

    def _rows(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        return logits if len(rows) == len(logits) else logits[rows]

    def flat(self, rows: list[int], ids: Iterable[_Ints]) -> torch.Tensor:
        """The indices in flattened logits of the tokens `ids[i]` of `rows[i]`."""
        firsts = np.repeat(_ids(rows) * self.vocab_size, [len(part) for part in ids])
        return self.tensor(firsts + np.concatenate([_ids([]), *ids]))

    def floats(self, values: list[float]) -> torch.Tensor:
        return self.tensor(np.array(values, np.float32))

    def tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def _noise_at(keys: list[int], ids: torch.Tensor) -> torch.Tensor:
    """`gumbel_noise` of some token ids only: [rows, window], row r for `keys[r]`."""
    start = torch.tensor([noise._signed(key) for key in keys], device=ids.device)
    state = start[:, None] + (ids + 1) * noise._signed(noise._GOLDEN)
    scratch = torch.empty_like(state)
    noise._xor_shifted(state, 30, scratch)
    state *= noise._signed(noise._FIRST)
    noise._xor_shifted(state, 27, scratch)
    state *= noise._signed(noise._SECOND)
    noise._xor_shifted(state, 31, scratch)
    state >>= 64 - noise._BITS
    state &= (1 << noise._BITS) - 1
    state += 1
    uniform = state.to(torch.float32).mul_(2.0**-noise._BITS).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _window(top_k: int, top_p: float, min_p: float, vocab_size: int) -> int:
    """How many of its likeliest tokens a row looks at first; 0 if it may choose any. It depends on
    the row's own parameters alone, so that sampling is batch invariant."""
    few = 0 < top_k < vocab_size
    if not few and top_p == 1 and min_p == 0:
        return 0
    # One more than top-k keeps, to see whether the next one has the same logit.
    window = WINDOWS[0] if few and top_k < WINDOWS[0] else WINDOWS[1]
    return min(window, vocab_size)


def _ids(values: Any) -> _Ints:
    return np.fromiter(values, np.int64, len(values))


def _ends_with(sequence: Sequence, tokens: tuple[int, ...]) -> bool:
    """Whether prompt and generated tokens together end with `tokens`."""
    return not tokens or tuple(sequence.token_ids[-len(tokens) :]) == tokens
