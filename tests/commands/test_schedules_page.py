"""docs/schedules.md: its two examples as they stand, then a real beat and a real worker."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.commands.invoking import CommandLine, environment
from tests.conftest import wait_until

PAGE = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"
PROGRAM = Path(sys.executable).parent / "nightherd"


def commands(section: str) -> list[str]:
    """The shell blocks of a section, in their order."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no section {section!r}"
    blocks = re.findall(r"^```sh\n(.*?)^```", found[1], re.MULTILINE | re.DOTALL)
    assert blocks
    return blocks


def run(blocks: list[str], folder: Path, variables: dict[str, str]) -> str:
    """What the blocks print; a command that fails ends the test."""
    done = subprocess.run(
        ["bash", "-ec", "".join(blocks)],
        cwd=folder,
        env={**variables, "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def at_work(folder: Path, variables: dict[str, str], done: Callable[[], bool], what: str) -> None:
    """A beat and a worker, until it is done."""
    nightherd = CommandLine(variables, folder)
    running = [
        nightherd.start("beat", log=folder / "beat.log"),
        nightherd.start("worker", "--checkpoint", "demo", log=folder / "worker.log"),
    ]
    try:
        wait_until(done, seconds=90, what=what)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(60)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_shop(path: Path) -> None:
    """Two tickets since the last midnight but one, and an old one."""
    now = datetime.now(UTC)
    ages = (timedelta(seconds=1), timedelta(seconds=2), timedelta(days=9))
    with closing(sqlite3.connect(path, isolation_level=None)) as shop:
        shop.execute("CREATE TABLE tickets (id INTEGER, body TEXT, created_at TEXT)")
        for number, age in enumerate(ages):
            made = f"{now - age:%Y-%m-%d %H:%M:%S}"
            shop.execute("INSERT INTO tickets VALUES (?, 'The lamp is dark.', ?)", (number, made))


@pytest.mark.timeout(240)
def test_both_examples_give_what_the_page_says(tmp_path: Path) -> None:
    make_shop(tmp_path / "shop.db")
    variables = {**environment(tmp_path), "WAREHOUSE_URL": f"sqlite:///{tmp_path / 'shop.db'}"}
    setting, *others = commands("A nightly summary of yesterday's rows")
    # The page's server is nobody's.
    setting, servers = re.subn(r"^export WAREHOUSE_URL=.*$", "", setting, flags=re.MULTILINE)
    assert servers == 1
    said = run([setting, *others], tmp_path, variables)
    assert said.count(" 00:00 ") == 3
    assert "manual" in said
    said = run(commands("A weekly data set"), tmp_path, variables)
    assert re.search(r"^stories\b", said, re.MULTILINE)

    summaries, stories = tmp_path / "summaries", tmp_path / "stories"
    at_work(
        tmp_path,
        variables,
        lambda: any(summaries.glob("*.jsonl")) and any(stories.glob("*.jsonl")),
        "both outputs",
    )
    rows = rows_of(summaries)
    assert [(row["index"], row["error"]) for row in rows] == [(0, None), (1, None)]
    assert sorted(row["metadata"]["id"] for row in rows) == [0, 1]
    rows = rows_of(stories)
    indices = [(row["index"], row["sample"]) for row in rows]
    assert indices == [(index, sample) for index in (0, 1) for sample in range(3)]
    assert rows[0]["metadata"] == {"hero": "fox", "place": "a lighthouse"}
    assert re.fullmatch(r"\d{4}-W\d\d-\d+\.jsonl", next(stories.iterdir()).name)
