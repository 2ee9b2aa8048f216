"""Compiles the C kernels for the tests: those of every level that this machine has.

`python -m tests.kernels`, before pytest: no test's time limit depends on a compiler.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from worker.engine.cpu.compiler import CpuKernels, LibraryError, find_compiler
from worker.engine.cpu.level import levels_here

CACHE = Path(__file__).resolve().parents[1] / "build" / "tests"
"""The cache folder of all tests: a new home for each would compile them each time."""
FOLDER = CACHE / "kernels"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for level in levels_here():
        try:
            CpuKernels(FOLDER, level).library()
        except LibraryError as error:
            if find_compiler() is None:
                print(f"tests of the kernels will be skipped: {error}")
                return
            sys.exit(str(error))


if __name__ == "__main__":
    main()
