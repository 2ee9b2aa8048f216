"""From a stored request to what the engine takes: effective parameters, token ids, limits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.store.chunks import Claim, PendingRequest
from nightherd.errors import ParameterError, RowError
from nightherd.params import SamplingParams, effective_params, parameter_set, sample_seed
from nightherd.structured import structure_of
from nightherd.text import PROMPT_TAIL, TextProcessor
from worker.engine.interface import Engine, EngineRequest, Grammar, StopCheck
from worker.text.detokenizer import StopStringCheck
from worker.text.grammar import GrammarMaker

log = logging.getLogger("nightherd.prepare")


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request of a chunk, ready for the engine, or the reason why it cannot be."""

    index: int
    samples: tuple[int, ...]
    """Those that have no result yet; `engine_request.seeds` are theirs, in this order."""
    params: SamplingParams | None
    parameter_set: tuple[str, str] | None
    """(hash, canonical JSON); None where the parameters contradict each other."""
    prompt_tokens: int
    prompt_tail: tuple[int, ...]
    engine_request: EngineRequest | None
    error: RowError | None = None


class Preparer:
    """Prepares whole chunks for one checkpoint and one engine. Safe from any thread."""

    def __init__(self, text: TextProcessor, engine: Engine) -> None:
        self._text = text
        self._engine = engine
        self._grammars = GrammarMaker(text)

    def prepare_each(
        self, claim: Claim, pending: Sequence[PendingRequest]
    ) -> list[PreparedRequest]:
        """`prepare`, and if that breaks on something unforeseen, one by one: never raises."""
        try:
            return self.prepare(claim, pending)
        except Exception:
            log.exception("chunk %d is prepared row by row", claim.chunk_id)
        prepared = []
        for request in pending:
            try:
                prepared += self.prepare(claim, [request])
            except Exception as error:
                reason = RowError("engine_error", f"it cannot be prepared: {error!r}")
                prepared.append(_refused(request, None, 0, reason))
        return prepared

    def prepare(self, claim: Claim, pending: Sequence[PendingRequest]) -> list[PreparedRequest]:
        """Tokenises the whole chunk at once; a bad request carries its error, alone."""
        params: list[SamplingParams | ParameterError] = []
        for request in pending:
            try:
                params.append(
                    effective_params(request.params, claim.params, self._text.generation_layer)
                )
            except ParameterError as error:
                params.append(error)
        valid = [
            (request.body, given)
            for request, given in zip(pending, params, strict=True)
            if isinstance(given, SamplingParams)
        ]
        encoded = iter(self._text.prepare_many(valid))
        prepared = []
        for request, given in zip(pending, params, strict=True):
            if isinstance(given, ParameterError):
                reason = RowError("invalid_request", str(given))
                prepared.append(_refused(request, None, 0, reason))
            else:
                prepared.append(self._assemble(claim, request, given, next(encoded)))
        return prepared

    def _assemble(
        self,
        claim: Claim,
        request: PendingRequest,
        params: SamplingParams,
        token_ids: list[int] | RowError,
    ) -> PreparedRequest:
        if isinstance(token_ids, RowError):
            return _refused(request, params, 0, token_ids)
        try:
            max_new_tokens = self._max_new_tokens(
                token_ids, params, _max_tokens_given(claim, request)
            )
        except RowError as error:
            return _refused(request, params, len(token_ids), error)
        unsupported = self._engine.unsupported(params)
        if unsupported is not None:
            reason = RowError(
                "unsupported_parameter",
                f"the engine {self._engine.name} cannot honour {unsupported}",
            )
            return _refused(request, params, len(token_ids), reason)
        try:
            bad_words = self._bad_words(params)
            make_grammar = self._make_grammar(params)
        except RowError as error:
            return _refused(request, params, len(token_ids), error)
        tail = tuple(token_ids[-PROMPT_TAIL:])
        engine_request = EngineRequest(
            prompt_token_ids=tuple(token_ids),
            params=params,
            seeds=tuple(
                sample_seed(claim.seed, params.seed, request.index, sample)
                for sample in request.samples
            ),
            max_new_tokens=max_new_tokens,
            eos_token_ids=frozenset() if params.ignore_eos else frozenset(self._text.eos_token_ids),
            stop_token_ids=frozenset(params.stop_token_ids),
            bad_words=bad_words,
            make_stop_check=self._stop_checks(params, tail),
            make_grammar=make_grammar,
            priority=claim.priority,
            job=claim.job_id,
        )
        return PreparedRequest(
            index=request.index,
            samples=request.samples,
            params=params,
            parameter_set=parameter_set(params),
            prompt_tokens=len(token_ids),
            prompt_tail=tail,
            engine_request=engine_request,
        )

    def _max_new_tokens(
        self, token_ids: Sequence[int], params: SamplingParams, max_tokens_given: bool
    ) -> int:
        """How many tokens may be generated: what is asked for, cut to what the context leaves.

        `max_tokens_given`: whether the job or the request sets it; beside max_length its default
        does not count.
        """
        context = self._text.context_length
        left = context - len(token_ids)
        if left < 1:
            raise RowError(
                "context_length_exceeded",
                f"the prompt has {len(token_ids)} tokens, the checkpoint's context {context}; "
                "shorten it or set truncate_prompt_tokens",
            )
        if params.max_length is not None:
            left = min(left, params.max_length - len(token_ids))
            if left < 1:
                raise RowError(
                    "context_length_exceeded",
                    f"the prompt has {len(token_ids)} tokens, max_length allows "
                    f"{params.max_length} with the output; raise it or use max_tokens",
                )
            if not max_tokens_given:
                return left
        return min(left, params.max_tokens)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        # Within a text most words begin with a space: both spellings are meant.
        spellings = [form for word in params.bad_words for form in (word, f" {word.lstrip()}")]
        encoded = {tuple(self._text.encode(form, add_special_tokens=False)) for form in spellings}
        return tuple(sorted(ids for ids in encoded if ids))

    def _make_grammar(self, params: SamplingParams) -> Callable[[], Grammar] | None:
        """Raises `RowError` where the structure is invalid, or impossible with this tokenizer."""
        try:
            structure = structure_of(params)
            if structure is None:
                return None
            return self._grammars.factory(structure, ignore_eos=params.ignore_eos)
        except ParameterError as error:
            raise RowError("invalid_request", str(error)) from None

    def _stop_checks(
        self, params: SamplingParams, tail: tuple[int, ...]
    ) -> Callable[[], StopCheck] | None:
        if not params.stop:
            return None
        return lambda: StopStringCheck(
            self._text,
            params.stop,
            prompt_tail=tail,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )


def _max_tokens_given(claim: Claim, request: PendingRequest) -> bool:
    return "max_tokens" in claim.params or "max_tokens" in (request.params or {})


def _refused(
    request: PendingRequest, params: SamplingParams | None, prompt_tokens: int, error: RowError
) -> PreparedRequest:
    return PreparedRequest(
        index=request.index,
        samples=request.samples,
        params=params,
        parameter_set=None if params is None else parameter_set(params),
        prompt_tokens=prompt_tokens,
        prompt_tail=(),
        engine_request=None,
        error=error,
    )
