"""A pytest plugin for the kernels' tests on a card, in place of the conftest.py files: what these
import is not there.

It has the fixture that the tests need, selects some tests, and keeps their counts in a file while
they run: of tests that are ended in the middle the file says which were running.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import write

FEW = (
    "test_rms_norm",
    "test_silu_mul",
    "test_grammar_mask",
    "test_common_blocks_are_read_from_their_leader_only",
)
"""Tests that `--few` runs, each once: enough to try the stage itself."""
_MAX_LISTED = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kind", choices=("bf16", "rest"), help="tests of bfloat16, or all others")
    parser.addoption("--few", action="store_true", help="a handful")
    parser.addoption("--progress-file", help="a file for the counts of outcomes until now")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    # The workers of xdist report to the process that started them, which writes the file.
    if config.getoption("--progress-file") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ProgressFile(Path(config.getoption("--progress-file"))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kind, few = config.getoption("--kind"), config.getoption("--few")
    seen: set[str] = set()

    def wanted(item: Any) -> bool:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if kind is not None and any(v is torch.bfloat16 for v in values) != (kind == "bf16"):
            return False
        if few and (item.originalname not in FEW or item.originalname in seen):
            return False
        seen.add(item.originalname)
        return True

    items[:] = [item for item in items if wanted(item)]


class ProgressFile:
    """Counts of outcomes, the first failures, and the tests that have started and not ended."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._counts = {"passed": 0, "failed": 0, "skipped": 0}
        self._failures: list[str] = []
        self._running: list[str] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running.append(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
        if report.failed and len(self._failures) < _MAX_LISTED:
            self._failures.append(f"{_short(report.nodeid)}: {_reason(report)}")
        if report.when == "teardown" and report.nodeid in self._running:
            self._running.remove(report.nodeid)
        self._save()

    def pytest_sessionfinish(self) -> None:
        self._save()

    def _save(self) -> None:
        running = [_short(name) for name in self._running[:_MAX_LISTED]]
        write(self._file, {**self._counts, "failures": self._failures, "running": running})


def _short(nodeid: str) -> str:
    return nodeid.rpartition("/")[2]


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(getattr(crash, "message", report.longrepr)).strip().splitlines()
    return lines[0][:200] if lines else ""
