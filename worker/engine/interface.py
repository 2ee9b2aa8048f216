"""What the worker knows of an engine: token ids in, futures out, abort; safe from any thread.

Every sample of an accepted request gets exactly one `Output`, aborted ones included; futures never
raise. A request that cannot be run fails alone, by an `Output` with an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from nightherd.params import SamplingParams

FinishReason = Literal["stop", "length", "error", "aborted"]

StopCheck = Callable[[int], bool]
"""Fed each new token of one sample, in order; true ends the sample with `stop` (the token is kept
in the output: who made the check knows what to cut)."""


class Grammar(Protocol):
    """What one sample may say: structured output, token by token. The engine's thread uses it."""

    def fill_mask(self, mask: Any) -> None:
        """Writes which tokens may come next into a numpy array, int32 [ceil(vocab_size / 32)].

        Bit `i % 32` of word `i // 32` is set where token i may come, an end of sequence included
        where the output may end. Raises `ValueError` where nothing can go on.
        """

    def advance(self, token_id: int) -> bool:
        """Takes in the token that was chosen, but no end of sequence; true where nothing more may
        follow, which ends the sample with `stop`. Raises `ValueError` if it may not come here."""


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
    """Asked for by the user: likewise, but reported as `stop_reason`."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences whose last token is never chosen after the others."""
    make_stop_check: Callable[[], StopCheck] | None = None
    """Makes one check a sample; None: no stop strings."""
    make_grammar: Callable[[], Grammar] | None = None
    """Makes one grammar a sample; None: any token may come."""
    priority: int = 0
    """Higher runs first."""
    job: str = ""
    """Whose outputs are of like length: what those were tells how much memory this one may need."""


@dataclass(frozen=True, slots=True)
class Output:
    """The terminal answer to one sample."""

    token_ids: tuple[int, ...]
    """What was generated, without an ending eos or stop token."""
    finish_reason: FinishReason
    stop_reason: int | None = None
    """The stop token id that ended it; None for eos, length and stop strings."""
    logprobs: tuple[PositionLogprobs, ...] | None = None
    """One a token of `token_ids`, if asked for."""
    error_code: str | None = None
    error_message: str | None = None
    started: float = 0.0
    """`time.monotonic()` when the first step with it began; 0 if it never ran."""
    finished: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and what is going on now."""

    steps: int
    running: int
    waiting: int
    prompt_tokens: int
    completion_tokens: int
    step_started: float | None
    """`time.monotonic()` of the step under way; None when idle."""
    longest_recent_step: float
    """Seconds."""


class Generation:
    """The handle of one accepted request: a future a sample, and the means to abort."""

    __slots__ = ("aborted", "futures", "request")

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.futures: tuple[Future[Output], ...] = tuple(Future() for _ in request.seeds)
        self.aborted = False


def answer(future: Future[Output], output: Output) -> None:
    """Sets a sample's terminal answer, unless it has one: the first counts, from any thread."""
    if not future.done():
        with contextlib.suppress(InvalidStateError):  # another thread was faster
            future.set_result(output)


class Engine(Protocol):
    """Anything that generates; `worker.engine.reference.GenerateEngine` is the plain one."""

    name: str
    """For the provenance of results."""
    broken: str | None
    """Why nothing can run any more (the device is lost, say); every request is then `aborted`, and
    the process should end, to be started anew."""

    def start(self) -> None:
        """Starts the thread that owns the model. Loading has happened before."""

    def add(self, request: EngineRequest) -> Generation:
        """Accepts a request, from any thread, without waiting for it."""

    def abort(self, generations: Sequence[Generation]) -> None:
        """Ends these at once: futures not yet done become `aborted`. Idempotent."""

    def unsupported(self, params: SamplingParams) -> str | None:
        """The name of a parameter that this engine cannot honour, if there is one."""

    def stats(self) -> EngineStats:
        """A snapshot, from any thread."""

    def stop(self) -> None:
        """Aborts everything and ends the thread."""
