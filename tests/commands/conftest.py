from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.invoking import CommandLine, environment


@pytest.fixture
def nightherd(tmp_path: Path) -> CommandLine:
    """The command line on a data folder of the test's own: SQLite, no broker running."""
    return CommandLine(environment(tmp_path), tmp_path)
