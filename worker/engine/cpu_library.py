"""The C kernels: compiled on the machine that runs them, called by ctypes, which drops the GIL.

The library's file is named by a hash of all that it is made of, written under another name and
renamed, so that any number of workers may start at once and a kill never leaves half a library.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int, c_int32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "kernels"
BLOCK = 32
"""Positions of a block of the KV cache, as the kernels have it."""
PANEL = 64
"""Outputs of a panel of packed weights."""
MOST_LOGPROBS = 20
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-ffp-contract=off"),
    *("-fno-math-errno", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"),
)
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_SECONDS = 300


class LibraryError(Exception):
    """The kernels cannot be compiled or loaded; the message says why, on one line."""


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
                *("token_ids", "positions", "slots", "lasts", "tables"),
                *("chosen_rows", "sampling_slots", "sampling", "chosen"),
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
"""One row of sampling parameters."""

CHOSEN = np.dtype(
    [
        ("token", np.int32),
        ("best", np.float32),
        ("top", np.int32, (1 + MOST_LOGPROBS,)),
        ("logprob", np.float32, (1 + MOST_LOGPROBS,)),
    ],
    align=True,
)
"""What became of one row."""


def load_library(folder: Path) -> ctypes.CDLL:
    """The kernels, compiled into `folder` if they are not there; raises `LibraryError`."""
    return _load(str(_compiled(folder)))


@cache
def _load(path: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise LibraryError(f"{path} cannot be loaded: {error}") from None
    library.nightherd_create.restype = c_void_p
    library.nightherd_create.argtypes = (POINTER(Model),)
    library.nightherd_step.restype = c_int
    library.nightherd_step.argtypes = (c_void_p, POINTER(Step))
    library.nightherd_choose.restype = c_int
    library.nightherd_choose.argtypes = (c_void_p, c_int, c_void_p, c_void_p)
    library.nightherd_destroy.restype = None
    library.nightherd_destroy.argtypes = (c_void_p,)
    library.nightherd_sizes.restype = c_int
    library.nightherd_sizes.argtypes = (c_int,)
    ours = (ctypes.sizeof(Layer), ctypes.sizeof(Model), ctypes.sizeof(Step))
    sizes = (*ours, SAMPLING.itemsize, CHOSEN.itemsize, BLOCK)
    theirs = tuple(library.nightherd_sizes(i) for i in range(len(sizes)))
    if sizes != theirs:
        raise LibraryError(f"the structures of {path} are {theirs}, not {sizes}")
    return library


def _compiled(folder: Path) -> Path:
    compiler = find_compiler()
    if compiler is None:
        raise LibraryError(f"no C++ compiler ({', '.join(_COMPILERS)}) in PATH")
    target = folder / f"kernels-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (folder / "compile.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(compiler, target)
    except OSError as error:
        raise LibraryError(f"{folder} cannot be written: {error.strerror or error}") from None
    return target


def find_compiler() -> str | None:
    """The C++ compiler: `CXX` if it is set, else the first of the usual names in PATH."""
    for name in filter(None, (os.environ.get("CXX"), *_COMPILERS)):
        found = shutil.which(name)
        if found is not None:
            return found
    return None


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="compile-") as scratch:
        made = Path(scratch) / "kernels.so"
        command = [compiler, *_FLAGS, str(SOURCES / "step.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                timeout=_COMPILE_SECONDS,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LibraryError(f"{compiler} does not work: {error}") from None
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            said = next((line for line in lines if "error" in line), "".join(lines[-1:]))
            raise LibraryError(f"{compiler} fails on the kernels: {said.strip()[:300]}")
        made.replace(target)
        log.info("compiled the kernels into %s", target)


def _fingerprint(compiler: str) -> str:
    """Of sources, flags, compiler and CPU: a library for another CPU must not be run here."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    stat = os.stat(compiler)
    for fact in (*_FLAGS, compiler, stat.st_size, stat.st_mtime_ns, _cpu()):
        digest.update(f"\0{fact}".encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    facts = {line.split(":")[0].strip(): line for line in lines if ":" in line}
    return platform.machine() + "".join(facts.get(name, "") for name in wanted)
