"""The kernels compiled for a card that is not there: Triton forgives less than its interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = ROOT / "benchmarks" / "gpu" / "compiled.py"


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_kernels_compile_for_a_card(tmp_path: Path) -> None:
    """In the commonest configuration, without registers in local memory, with wide loads."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        [sys.executable, str(SCRIPT), "--few"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    lines = {line.split()[1]: line for line in made.stdout.splitlines()}
    assert lines.keys() >= {
        "_decode",
        "_join",
        "_attend_prefixes",
        "_rotate_and_write",
        "_rms_norm",
        "_silu_mul",
        "_narrow",
        "_sample",
        "_mask",
    }
    for name, line in lines.items():
        assert " 0 stack" in line, line
        assert name in ("_mask", "_join") or re.search(r"'(ld|cp.async) 16'", line), line
    assert "mma" in lines["_decode"]
    assert "'cp.async 16'" in lines["_decode"]
    assert "mma" in lines["_attend_prefixes"]
    # Several programs on each multiprocessor hide each other's waiting.
    for name, least in (("_decode", 4), ("_narrow", 4), ("_sample", 3)):
        resident = re.search(r"(\d+) resident", lines[name])
        assert resident is not None
        assert int(resident[1]) >= least, lines[name]
