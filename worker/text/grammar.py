"""Which tokens a structured output may go on with: llguidance over a checkpoint's tokenizer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from nightherd.errors import ParameterError
from nightherd.structured import Structure, grammar_text
from nightherd.text import TextProcessor
from worker.engine.interface import Grammar

_CACHED = 64
"""Compiled grammars; each may take some megabytes."""


class _Vocabulary:
    """A tokenizer as llguidance needs it; masks are int32 [ceil(vocab_size / 32)]."""

    def __init__(self, text: TextProcessor) -> None:
        size = text.vocab_size
        self.eos_token_ids = frozenset(id for id in text.eos_token_ids if id < size)
        self.words = -(-size // 32)
        try:
            self.tokenizer = LLTokenizer(
                text.tokenizer.to_str(), n_vocab=size, eos_token=sorted(self.eos_token_ids) or None
            )
        except ValueError as error:
            raise ParameterError(
                f"structured output is not possible with this checkpoint's tokenizer: {error}"
            ) from None
        self.texts = _mask(filter(lambda id: self._is_text(text, id), range(size)), self.words)
        """The tokens that may stand in an output at all."""
        self.ends = _mask(self.eos_token_ids, self.words)

    def _is_text(self, text: TextProcessor, token_id: int) -> bool:
        if token_id in self.eos_token_ids or self.tokenizer.is_special_token(token_id):
            return False
        # No database takes a NUL, and a result is what it was when it is read again.
        spelled = text.token_bytes(token_id)
        return bool(spelled) and b"\0" not in spelled


class TokenGrammar:
    """The `Grammar` of one sample. Used by one thread at a time."""

    def __init__(self, vocabulary: _Vocabulary, matcher: LLMatcher, ignore_eos: bool) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._ignore_eos = ignore_eos
        self._allowed = np.zeros(vocabulary.words, dtype=np.int32)

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Sets the bits of the tokens that may come next; those beyond the tokenizer are 0.

        Every end-of-sequence id is allowed exactly where the output may end; with `ignore_eos`
        only where nothing else may follow. Raises `ValueError` where nothing can go on.
        """
        allowed = self._allowed
        self._matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        self._raise_error()
        # llguidance allows special tokens that a grammar names, and an end where it sees one.
        allowed &= self._vocabulary.texts
        if self._matcher.is_accepting() and not (self._ignore_eos and allowed.any()):
            allowed |= self._vocabulary.ends
        if not allowed.any():
            raise ValueError("the grammar allows no token of this checkpoint here")
        words = min(len(mask), len(allowed))
        mask[:words] = allowed[:words]
        mask[words:] = 0

    def advance(self, token_id: int) -> bool:
        """Takes in a token; true where nothing more may follow, or at an end of sequence.

        Raises `ValueError` if the token may not come here.
        """
        if token_id in self._vocabulary.eos_token_ids and self._matcher.is_accepting():
            return True
        if not self._matcher.consume_token(token_id):
            self._raise_error()
            raise ValueError(f"the grammar does not allow token {token_id} here")
        if not self._matcher.is_stopped():
            return False
        if not self._matcher.is_accepting():
            raise ValueError(f"the grammar cannot go on: {self._matcher.stop_reason()}")
        return True

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().partition("\n")[0]
            raise ValueError(f"the grammar cannot go on: {reason}")


class GrammarMaker:
    """Compiles grammars for one checkpoint. Safe from any thread."""

    def __init__(self, text: TextProcessor) -> None:
        self._text = text
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def factory(self, structure: Structure, *, ignore_eos: bool = False) -> Callable[[], Grammar]:
        """What makes one grammar a sample; raises `ParameterError` if it does not compile here."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._text)
            vocabulary = self._vocabulary
            # It is never advanced: each sample gets a copy, which spares it the compilation.
            compiled = self._compile(structure, vocabulary)

        def make() -> Grammar:
            with self._lock:
                matcher = compiled.deep_copy()
            return TokenGrammar(vocabulary, matcher, ignore_eos)

        return make

    def _compile(self, structure: Structure, vocabulary: _Vocabulary) -> LLMatcher:
        key = (structure.kind, structure.text)
        matcher = self._compiled.pop(key, None)
        if matcher is None:
            matcher = LLMatcher(vocabulary.tokenizer, grammar_text(structure), log_level=0)
            if matcher.is_error():
                reason = " ".join(matcher.get_error().partition("\n")[0].split())
                raise ParameterError(f"{structure.source} does not compile: {reason:.300}")
        self._compiled[key] = matcher
        if len(self._compiled) > _CACHED:
            self._compiled.popitem(last=False)
        return matcher


def _mask(token_ids: Iterable[int], words: int) -> NDArray[np.int32]:
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    packed: Any = np.packbits(bits, bitorder="little").view("<i4")
    return packed.astype(np.int32)  # type: ignore[no-any-return]
