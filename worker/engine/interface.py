"""The engine as the worker sees it: token ids in, futures out, abort; safe from any thread.

The future of each sample of an accepted request is resolved with exactly one `Output`, if aborted
too, and never raises. A request that cannot run fails alone, by an `Output` with an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from nightherd.errors import RowErrorCode
from nightherd.params import SamplingParams

FinishReason = Literal["stop", "length", "error", "aborted"]

StopCheck = Callable[[int], bool]
"""Called with each new token of one sample, in order; true ends the sample with `stop`. The token
is kept in the output: the caller cuts the text."""


class Grammar(Protocol):
    """Restricts one sample to structured output, token by token. The engine's thread uses it."""

    def fill_mask(self, mask: Any) -> None:
        """Writes which tokens may come next into a numpy array, int32 [ceil(vocab_size / 32)].

        Bit `i % 32` of word `i // 32` is set where token i may come, an end of sequence included
        where the output may end. Raises `ValueError` if no token may come.
        """

    def advance(self, token_id: int) -> bool:
        """Advances by the chosen token, never an end of sequence. True ends the sample with `stop`:
        nothing may follow. Raises `ValueError` if the token may not come here."""


class TokenLogprob(NamedTuple):
    """A token and its natural log-probability before any processing of the logits."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token of one position, and the most likely ones, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request, ready to run: `len(seeds)` samples of one prompt."""

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    """Sampling only: lengths, stops and seeds are resolved in the fields below."""
    seeds: tuple[int, ...]
    """One a sample, 63 bits."""
    max_new_tokens: int
    """At least 1; the prompt and these fit into the context."""
    eos_token_ids: frozenset[int] = frozenset()
    """End a sample once `min_tokens` are out, and stay out of its output; empty: ignore_eos."""
    stop_token_ids: frozenset[int] = frozenset()
    """The user's: likewise, but reported as `stop_reason`."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences whose last token is never chosen after the others."""
    make_stop_check: Callable[[], StopCheck] | None = None
    """Makes one check a sample; None: no stop strings."""
    make_grammar: Callable[[], Grammar] | None = None
    """Makes one grammar a sample; None: any token may come."""
    priority: int = 0
    """Higher runs first."""
    job: str = ""
    """The job's id: lengths of its earlier outputs tell how much memory this one may need."""


@dataclass(frozen=True, slots=True)
class Output:
    """The final result of one sample."""

    token_ids: tuple[int, ...]
    """What was generated, without an ending eos or stop token."""
    finish_reason: FinishReason
    stop_reason: int | None = None
    """The stop token id that ended it; None for eos, length and stop strings."""
    logprobs: tuple[PositionLogprobs, ...] | None = None
    """One a token of `token_ids`, if `params.logprobs` is set."""
    error_code: RowErrorCode | None = None
    error_message: str | None = None
    started: float = 0.0
    """`time.monotonic()` when the first step with it began; 0 if it never ran."""
    finished: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and the current load."""

    steps: int
    running: int
    waiting: int
    prompt_tokens: int
    completion_tokens: int
    step_started: float | None
    """`time.monotonic()` when the current step began; None when idle."""
    longest_recent_step: float
    """Seconds."""


class RequestHandle:
    """The handle of one accepted request: a future a sample, and the means to abort."""

    __slots__ = ("aborted", "futures", "request")

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.futures: tuple[Future[Output], ...] = tuple(Future() for _ in request.seeds)
        self.aborted = False
        for future in self.futures:
            # Marked as running, so that it cannot be cancelled: `Engine.abort` is for that.
            future.set_running_or_notify_cancel()

    def resolve(self, output: Output) -> None:
        """Gives every sample that has no output yet this one; any thread may call it."""
        for future in self.futures:
            resolve_once(future, output)


def resolve_once(future: Future[Output], output: Output) -> None:
    """Resolves a sample's future unless it is resolved; any thread may call it, the first wins."""
    if not future.done():
        with contextlib.suppress(InvalidStateError):  # another thread was faster
            future.set_result(output)


class Engine(Protocol):
    """Generates: `engine.BatchEngine`, or transformers' own `generate` as `TransformersEngine`."""

    name: str
    """For the provenance of results."""
    broken: str | None
    """Why nothing can run any more (the device is lost, say), else None. Every request is then
    `aborted`, and the process should end and be restarted."""

    def start(self) -> None:
        """Starts the thread that owns the model. Loading has happened before."""

    def add(self, request: EngineRequest) -> RequestHandle:
        """Accepts a request, from any thread, without waiting for it."""

    def abort(self, handles: Collection[RequestHandle]) -> None:
        """Ends these at once: futures not yet done become `aborted`. Idempotent."""

    def unsupported(self, params: SamplingParams) -> str | None:
        """The name of a parameter that this engine does not support, if there is one."""

    def stats(self) -> EngineStats:
        """A snapshot, from any thread."""

    def stop(self) -> None:
        """Aborts everything and ends the thread."""
