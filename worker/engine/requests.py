"""Which requests can run, and how errors are told. No torch."""

from __future__ import annotations

import itertools

from worker.engine.interface import EngineRequest

_CUDA_OUT_OF_MEMORY = 2
"""`cudaErrorMemoryAllocation`."""
_LACKING = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""In the words of torch's allocator for the CPU, of the driver, of Triton and of cuBLAS."""


def problem_of(
    request: EngineRequest, vocab_size: int, context_length: int
) -> tuple[str, str] | None:
    """`(code, message)` of why a request cannot run, None if it can.

    Checked before a request is accepted, so that it can only fail itself.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        return "invalid_request", "the prompt is empty"
    if request.max_new_tokens < 1:
        return "invalid_request", f"max_tokens must be at least 1, got {request.max_new_tokens}"
    if len(prompt) + request.max_new_tokens > context_length:
        return "context_length_exceeded", (
            f"{len(prompt)} prompt tokens and {request.max_new_tokens} to generate do not fit "
            f"into the context of {context_length}"
        )
    if any(not word for word in request.bad_words):
        return "invalid_request", "a bad word has no tokens"
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
            return "invalid_request", (
                f"{what} has the token id {token}, which is not in the vocabulary "
                f"(0 to {vocab_size - 1})"
            )
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether less work at a time may help."""
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return True
    code = getattr(error, "error_code", None)
    if name == "AcceleratorError" and code is not None:
        # The driver's, not the allocator's: of a graph, or a kernel that is loaded.
        return bool(code == _CUDA_OUT_OF_MEMORY)
    text = str(error)
    return any(words in text for words in _LACKING)


def one_line(error: BaseException) -> str:
    """An error for a row's message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
