"""Validates requests, and classifies and formats errors. No torch."""

from __future__ import annotations

import itertools

from nightherd.errors import RowError
from worker.engine.interface import EngineRequest

_CUDA_OUT_OF_MEMORY = 2
"""`cudaErrorMemoryAllocation`."""
_OOM_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""Parts of messages: of torch's allocator for the CPU, of the driver, of Triton and of cuBLAS."""


def validate_request(request: EngineRequest, vocab_size: int, context_length: int) -> None:
    """Raises `RowError` if a request cannot run.

    Checked before a request is accepted, so that it can only fail itself.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        raise RowError("invalid_request", "the prompt is empty")
    if request.max_new_tokens < 1:
        raise RowError(
            "invalid_request", f"max_tokens must be at least 1, got {request.max_new_tokens}"
        )
    if len(prompt) + request.max_new_tokens > context_length:
        raise RowError(
            "context_length_exceeded",
            f"{len(prompt)} prompt tokens and {request.max_new_tokens} to generate do not fit "
            f"into the context of {context_length}",
        )
    if any(not word for word in request.bad_words):
        raise RowError("invalid_request", "a bad word has no tokens")
    params = request.params
    for what, ids in (
        ("prompt", prompt),
        ("logit_bias", tuple(params.logit_bias)),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_words", tuple(itertools.chain(*request.bad_words))),
        ("stop_token_ids", tuple(request.stop_token_ids)),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            token = next(token for token in ids if not 0 <= token < vocab_size)
            raise RowError(
                "invalid_request",
                f"{what} has the token id {token}, which is not in the vocabulary "
                f"(0 to {vocab_size - 1})",
            )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, so that smaller steps may help."""
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return True
    code = getattr(error, "error_code", None)
    if name == "AcceleratorError" and code is not None:
        # The driver's, not the allocator's: of a graph, or a kernel that is loaded.
        return bool(code == _CUDA_OUT_OF_MEMORY)
    text = str(error)
    return any(words in text for words in _OOM_TEXTS)


def one_line(error: BaseException) -> str:
    """An error as one line, for the message of a result."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
