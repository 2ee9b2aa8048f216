"""The kernels compiled for a card that is not there: Triton forgives less than its interpreter."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
CARDS = "3.6.0"
"""As the Makefile fetches it."""
SCRIPT = ROOT / "benchmarks" / "gpu" / "compiled.py"


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="no Triton is fetched here"
)
@pytest.mark.parametrize("version", [None, CARDS])
def test_the_kernels_compile_for_a_card(version: str | None, tmp_path: Path) -> None:
    """In the commonest configuration, without registers in local memory, with wide loads; by the
    version of this environment, and by that which cards' machines have."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = ROOT / "build" / f"triton-{version}"
    assert version is None or folder.is_dir(), "make triton"
    paths = [str(ROOT)] if version is None else [str(folder), str(ROOT)]
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    made = subprocess.run(
        [sys.executable, str(SCRIPT), "--few"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert version is None or f"triton {version}" in made.stderr
    lines = {line.split()[1]: line for line in made.stdout.splitlines()}
    assert lines.keys() >= {
        "_decode",
        "_merge_splits",
        "_attend_prefixes",
        "_attend_prefill",
        "_rotate_and_write",
        "_rms_norm",
        "_silu_mul",
        "_top_k_top_p",
        "_sample",
        "_mask",
    }
    for name, line in lines.items():
        assert " 0 stack" in line, line
        assert name in ("_mask", "_merge_splits") or re.search(r"'(ld|cp.async) 16'", line), line
    assert "mma" in lines["_decode"]
    assert "'cp.async 16'" in lines["_decode"]
    for name in ("_attend_prefixes", "_attend_prefill"):
        assert "wgmma" in lines[name], lines[name]
    # Several programs on each multiprocessor hide each other's waiting.
    for name, least in (("_decode", 4), ("_top_k_top_p", 4), ("_sample", 3)):
        resident = re.search(r"(\d+) resident", lines[name])
        assert resident is not None
        assert int(resident[1]) >= least, lines[name]
