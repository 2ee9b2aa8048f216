"""A plugin for the kernels' tests without the house's conftest.py, whose needs are not there.

Gives what they need, picks some of them, and keeps a tally on disk while they run: of tests that
are ended in the middle it says what was under way.
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
"""Enough to try the running of tests itself: each once."""
_MOST_TOLD = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kind", choices=("bf16", "rest"), help="tests of bfloat16, or all others")
    parser.addoption("--few", action="store_true", help="a handful")
    parser.addoption("--tally", help="a file for what has passed and failed until now")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    # Workers report to the one process that started them.
    if config.getoption("--tally") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Tally(Path(config.getoption("--tally"))))


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


class Tally:
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
        if report.failed and len(self._failures) < _MOST_TOLD:
            self._failures.append(f"{_short(report.nodeid)}: {_reason(report)}")
        if report.when == "teardown" and report.nodeid in self._running:
            self._running.remove(report.nodeid)
        self._save()

    def pytest_sessionfinish(self) -> None:
        self._save()

    def _save(self) -> None:
        running = [_short(name) for name in self._running[:_MOST_TOLD]]
        write(self._file, {**self._counts, "failures": self._failures, "running": running})


def _short(nodeid: str) -> str:
    return nodeid.rpartition("/")[2]


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(getattr(crash, "message", report.longrepr)).strip().splitlines()
    return lines[0][:200] if lines else ""
