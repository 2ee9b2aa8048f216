"""The log of the long-running processes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightherd.log import configure_logging

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("nightherd")
    before = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:], level, own = before
    root.setLevel(level)
    ours.setLevel(own)


def _logger_names() -> set[str]:
    """The names of all loggers that the product's sources ask for."""
    names = set()
    for package in ("nightherd", "models", "producer", "worker", "migrations"):
        for path in (ROOT / package).rglob("*.py"):
            for given in re.findall(r"getLogger\(([^)]*)\)", path.read_text()):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                names.add(module if given == "__name__" else given.strip("\"'"))
    return names


def test_no_module_has_a_logger_outside_nightherd() -> None:
    """`configure_logging` shows nothing of others before WARNING."""
    root, libraries = "", {"huggingface_hub", "transformers.generation.stopping_criteria"}
    outside = {name for name in _logger_names() if name.partition(".")[0] != "nightherd"}
    assert outside <= {root, *libraries}


def test_everything_of_ours_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    ours = {name for name in _logger_names() if name.startswith("nightherd.")}
    assert {"nightherd.kernels", "nightherd.engine", "nightherd.broker"} <= ours
    for name in sorted(ours):
        logging.getLogger(name).info("seen: %s.", name)
        assert f"seen: {name}." in capsys.readouterr().err


def test_libraries_are_heard_from_warning_on_and_no_password_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("INFO")
    library = logging.getLogger("some.library")
    library.info("chatter")
    library.warning("cannot reach redis://:hush@host:6379/0")
    said = capsys.readouterr().err
    assert "chatter" not in said
    assert "redis://:***@host" in said
    assert "hush" not in said
