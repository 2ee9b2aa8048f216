"""The C kernels' library and structures, for ctypes, which releases the GIL in each call."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_size_t, c_void_p
from functools import cache

import numpy as np

from worker.engine.cpu.compiler import CpuKernels, LibraryError
from worker.engine.cpu.level import may_use_amx

BLOCK = 32
"""Positions of a block of the KV cache, as the kernels have it."""
MAX_LOGPROBS = 20


class Layer(ctypes.Structure):
    """Pointers to one layer's weights and KV cache."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            *("input_norm", "qkv_bias", "q_norm", "k_norm", "o_bias", "post_norm"),
            *("gate_up_bias", "down_bias", "qkv", "o", "gate_up", "down", "cache"),
        )
    )


class Model(ctypes.Structure):
    """The whole model."""

    _fields_ = (
        ("layer", POINTER(Layer)),
        *((name, c_void_p) for name in ("final_norm", "cosines", "sines", "embedding", "output")),
        *(
            (name, c_int32)
            for name in (
                *("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate"),
                *("vocab_size", "vocab_rows", "bfloat16", "max_rows", "max_chosen", "threads"),
            )
        ),
        ("norm_eps", c_float),
    )


class Step(ctypes.Structure):
    """One step: flat arrays, and what is chosen."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in (
                *("token_ids", "positions", "table_rows", "lasts", "tables"),
                *("chosen_rows", "sampling_rows", "sampling", "chosen"),
            )
        ),
        *((name, c_int32) for name in ("rows", "chosen_count", "table_width")),
    )


SAMPLING = np.dtype(
    [
        ("seed", np.uint64),
        *(
            (name, np.uint64)  # pointers
            for name in (
                *("seen", "counted", "counts", "bias_ids", "bias", "banned", "allowed", "mask"),
            )
        ),
        *(
            (name, np.int32)
            for name in (
                *("seen_size", "counted_size", "bias_size", "banned_size", "allowed_size"),
                *("position", "top_k", "logprobs"),
            )
        ),
        *(
            (name, np.float32)
            for name in (*("temperature", "top_p", "min_p", "repetition", "presence", "frequency"),)
        ),
    ],
    align=True,
)
"""The sampling parameters of one sequence."""

CHOSEN = np.dtype(
    [
        ("token", np.int32),
        ("best", np.float32),
        ("top", np.int32, (1 + MAX_LOGPROBS,)),
        ("logprob", np.float32, (1 + MAX_LOGPROBS,)),
    ],
    align=True,
)
"""The token chosen for one sequence, and its log-probabilities."""


def load_library(kernels: CpuKernels) -> ctypes.CDLL:
    """The library, compiled if it is not there; raises `LibraryError`."""
    if kernels.level == "amx" and not may_use_amx():
        raise LibraryError("this process may not use AMX: set NIGHTHERD_CPU_LEVEL=avx512")
    library = _load(str(kernels.library()))
    level = library.nightherd_level().decode()
    if level != kernels.level:
        raise LibraryError(f"the compiler made {level} of the kernels, not {kernels.level}")
    return library


@cache
def _load(path: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise LibraryError(
            f"{path} cannot be loaded: {error}; remove it, or set NIGHTHERD_CACHE to another folder"
        ) from None
    for name, result, arguments in (
        ("level", c_char_p, ()),
        ("sizes", c_int, (c_int,)),
        ("panel", c_int, ()),
        ("deep", c_int, (c_int,)),
        ("pack", None, (c_void_p, c_int, c_int, c_int, c_void_p)),
        ("head_bytes", c_size_t, (c_int, c_int)),
        ("create", c_void_p, (POINTER(Model),)),
        ("step", c_int, (c_void_p, POINTER(Step))),
        ("choose", c_int, (c_void_p, c_int, c_void_p, c_void_p)),
        ("destroy", None, (c_void_p,)),
    ):
        function = getattr(library, f"nightherd_{name}")
        function.restype, function.argtypes = result, arguments
    structures = (ctypes.sizeof(Layer), ctypes.sizeof(Model), ctypes.sizeof(Step))
    sizes = (*structures, SAMPLING.itemsize, CHOSEN.itemsize, BLOCK)
    compiled = tuple(library.nightherd_sizes(i) for i in range(len(sizes)))
    if sizes != compiled:
        raise LibraryError(f"the structures of {path} are {compiled}, not {sizes}")
    return library
