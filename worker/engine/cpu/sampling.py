"""Sampling parameters for the C kernels: one row of an array for each running sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from worker.engine.cpu.library import CHOSEN, SAMPLING
from worker.engine.interface import PositionLogprobs, TokenLogprob
from worker.engine.runner import Choices
from worker.engine.sequence import Sequence


class _RowState:
    """A sequence's row in the table, and the arrays that the row points at."""

    __slots__ = ("arrays", "counts", "mask", "position", "row", "seen", "varies")

    def __init__(self, row: int) -> None:
        self.row = row
        self.arrays: dict[str, Any] = {}
        self.varies = False
        """Whether more than the position changes from token to token."""
        self.position = 0
        """How many of the output's tokens are in `seen` and `counts`."""
        self.seen: set[int] | None = None
        self.counts: dict[int, int] | None = None
        self.mask: Any = None


class SamplingTable:
    """The rows of all running sequences. A row stays with its sequence until `forget`."""

    def __init__(self, size: int, vocab_size: int) -> None:
        self.rows = np.zeros(size, SAMPLING)
        self._free = list(range(size - 1, -1, -1))
        self._vocab_size = vocab_size

    def row_of(self, sequence: Sequence) -> int:
        """The row of a sequence that chooses its next token, after updating it."""
        state: _RowState = sequence.sampling or self._begin(sequence)
        self.rows["position"][state.row] = sequence.generated
        if state.varies:
            self._update(sequence, state)
        return state.row

    def forget(self, sequence: Sequence) -> None:
        if sequence.sampling is not None:
            self._free.append(sequence.sampling.row)
            sequence.sampling = None

    def _begin(self, sequence: Sequence) -> _RowState:
        request, params = sequence.request, sequence.request.params
        if not self._free:  # a preempted sequence keeps its row: there may be many
            more = len(self.rows)
            self.rows = np.concatenate([self.rows, np.zeros(more, SAMPLING)])
            self._free = list(range(2 * more - 1, more - 1, -1))
        state = _RowState(self._free.pop())
        row = self.rows[state.row]
        self.rows[state.row] = np.zeros((), SAMPLING)
        row["seed"] = request.seeds[sequence.index] & 0xFFFFFFFFFFFFFFFF
        row["temperature"] = params.temperature
        row["top_k"] = max(0, params.top_k)
        row["top_p"], row["min_p"] = params.top_p, params.min_p
        row["repetition"] = params.repetition_penalty
        row["presence"], row["frequency"] = params.presence_penalty, params.frequency_penalty
        row["logprobs"] = -1 if params.logprobs is None else params.logprobs
        if params.logit_bias:
            self._point(state, "bias_ids", np.array(list(params.logit_bias), np.int32), "bias_size")
            self._point(state, "bias", np.array(list(params.logit_bias.values()), np.float32))
        if params.allowed_token_ids is not None:
            allowed = np.unique(np.array(params.allowed_token_ids, np.int32))
            self._point(state, "allowed", allowed, "allowed_size")
        if params.repetition_penalty != 1:
            state.seen = set(request.prompt_token_ids)
        if params.presence_penalty or params.frequency_penalty:
            state.counts = {}
        if sequence.grammar is not None:
            state.mask = np.zeros(-(-self._vocab_size // 32), np.int32)
            self._point(state, "mask", state.mask)
        state.varies = bool(
            state.seen is not None
            or state.counts is not None
            or state.mask is not None
            or request.bad_words
            or params.min_tokens
        )
        sequence.sampling = state
        return state

    def _update(self, sequence: Sequence, state: _RowState) -> None:
        new = sequence.token_ids[sequence.prompt_length + state.position :]
        state.position += len(new)
        if state.seen is not None:
            before = len(state.seen)
            state.seen.update(new)
            if len(state.seen) != before or "seen" not in state.arrays:
                ids = np.fromiter(state.seen, np.int32, len(state.seen))
                self._point(state, "seen", ids, "seen_size")
        if state.counts is not None:
            for token in new:
                state.counts[token] = state.counts.get(token, 0) + 1
            size = len(state.counts)
            ids = np.fromiter(state.counts, np.int32, size)
            self._point(state, "counted", ids, "counted_size")
            self._point(state, "counts", np.fromiter(state.counts.values(), np.int32, size))
        if sequence.request.bad_words or sequence.request.params.min_tokens:
            banned = np.array(self._banned(sequence), np.int32)
            self._point(state, "banned", banned, "banned_size")
        if state.mask is not None and sequence.grammar is not None:
            try:
                sequence.grammar.fill_mask(state.mask)
            except ValueError:
                state.mask.fill(0)  # no token may come: the row has nothing to choose

    def _banned(self, sequence: Sequence) -> list[int]:
        request = sequence.request
        banned = [
            word[-1]
            for word in request.bad_words
            if len(word) == 1 or tuple(sequence.token_ids[1 - len(word) :]) == word[:-1]
        ]
        if sequence.generated < request.params.min_tokens:
            ends = request.eos_token_ids | request.stop_token_ids
            banned += [token for token in ends if 0 <= token < self._vocab_size]
        return banned

    def _point(self, state: _RowState, name: str, array: Any, size: str | None = None) -> None:
        state.arrays[name] = array  # keeps it alive
        self.rows[name][state.row] = array.ctypes.data
        if size is not None:
            self.rows[size][state.row] = len(array)


def read_choices(chosen: Any, sequences: list[Sequence]) -> Choices:
    """`chosen` is an array of `CHOSEN`, one for each sequence."""
    choices = Choices(chosen["token"].tolist(), chosen["best"].tolist())
    for index, sequence in enumerate(sequences):
        count = sequence.request.params.logprobs
        if count is not None:
            row = chosen[index]
            ids, values = row["top"].tolist(), row["logprob"].tolist()
            top = tuple(
                TokenLogprob(token, value)
                for token, value in zip(ids[1 : 1 + count], values[1 : 1 + count], strict=True)
                if token >= 0
            )
            choices.logprobs[index] = PositionLogprobs(TokenLogprob(ids[0], values[0]), top)
    return choices


def chosen_rows(size: int) -> Any:
    """An array of `CHOSEN` for the choices of a step."""
    return np.zeros(size, CHOSEN)
