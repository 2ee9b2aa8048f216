"""Runs the real command line in a process of its own, as a user's shell would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.kernels import CACHE

NIGHTHERD = [sys.executable, "-P", "-c", "from nightherd.cli import main; main()"]
"""The console script's own line, so that the tests need no particular PATH."""


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return self.err.strip().splitlines()


@dataclass(frozen=True, slots=True)
class CommandLine:
    """`nightherd` with an environment of its own."""

    environment: Mapping[str, str]
    folder: Path

    def __call__(
        self, *arguments: str | Path, stdin: str | bytes | None = None, seconds: float = 60
    ) -> Outcome:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [*NIGHTHERD, *map(str, arguments)],
            input=given if given is not None else b"",
            capture_output=True,
            env=dict(self.environment),
            cwd=self.folder,
            timeout=seconds,
            check=False,
        )
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """Starts a long-running command; its output goes to `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(
                [*NIGHTHERD, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=dict(self.environment),
                cwd=self.folder,
                start_new_session=True,
            )


def environment(home: Path, **settings: object) -> dict[str, str]:
    """The tests' environment without a HOME of the developer's, with short times."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("NIGHTHERD_") or name == "NIGHTHERD_CPU_LEVEL"
    }
    short = {
        "home": home / "data",
        "cache": CACHE,
        "lease_seconds": 2,
        "renew_seconds": 0.4,
        "tick_seconds": 0.5,
        "watch_seconds": 0.2,
        "save_seconds": 0.2,
        "database_patience": 3,
        "slots": 4,
        # Several tests run at once, each with workers of its own.
        "threads": 1,
        **settings,
    }
    return {
        **kept,
        "HOME": str(home),
        **{f"NIGHTHERD_{name.upper()}": str(value) for name, value in short.items()},
    }
