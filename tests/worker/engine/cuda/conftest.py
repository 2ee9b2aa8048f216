"""Kernels on the card where there is one, else under Triton's interpreter on the CPU.

The interpreter is chosen when Triton is imported and when a kernel is defined, so both happen
here, before any test; torch may have imported Triton already, which is then imported anew. Nothing
else in this process uses Triton; no later process inherits the choice.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    for name in list(sys.modules):
        if name.partition(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
triton = pytest.importorskip("triton")
import worker.engine.cuda.kernels.attention  # noqa: E402
import worker.engine.cuda.kernels.layers  # noqa: E402
import worker.engine.cuda.kernels.prefill  # noqa: E402
import worker.engine.cuda.kernels.sampling  # noqa: E402,F401

if DEVICE.type == "cpu":
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    """The environment of the interpreter, for as long as a test takes. It computes with numpy,
    which warns where a card does not, in an engine's thread too."""
    with (
        pytest.MonkeyPatch.context() as patched,
        np.errstate(all="ignore"),
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),
    ):
        if DEVICE.type == "cpu":
            patched.setenv("TRITON_INTERPRET", "1")
        yield
