"""The kernels' own tests on a card: those of bfloat16 first, which is what is measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, Result, options, result, say

FILES = ("kernels", "prefix", "prefill")
_FINISH_SECONDS = 5.0
"""Seconds that the tests have to write their counts, when their time is over."""


def main() -> None:
    given = options(__doc__, {"workers": 2}, workers=12)
    with result("tests", given) as made:
        failed = [kind for kind in ("bf16", "rest") if run(given, kind, made)]
        if failed:
            raise SystemExit(f"tests failed: {', '.join(failed)}")


def run(given: Any, kind: str, made: Result) -> int:
    """Runs the tests of a kind, and saves their counts in `made` meanwhile; the exit code."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "progress.json"
        tests = subprocess.Popen(
            command(given, kind, file), env=environment(given.dry), start_new_session=True
        )

        def note() -> None:
            found = json.loads(file.read_text()) if file.is_file() else {}
            made[kind] = {**found, "seconds": time.monotonic() - started, "code": tests.poll()}
            made.save()

        try:
            while tests.poll() is None:
                note()
                try:
                    tests.wait(1)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            tests.send_signal(signal.SIGINT)
            try:
                tests.wait(_FINISH_SECONDS)
            except subprocess.TimeoutExpired:
                tests.kill()
            raise
        finally:
            note()
    found = made[kind]
    say(f"{kind}: {found.get('passed', 0)} passed, {found.get('failed', 0)} failed, "
        f"after {found['seconds']:.0f} s")  # fmt: skip
    return int(tests.returncode)


def command(given: Any, kind: str, progress: Path) -> list[str]:
    folder = ROOT / "tests" / "worker" / "engine" / "cuda"
    files = [folder / f"test_{name}.py" for name in FILES]
    return [
        *(sys.executable, "-m", "pytest", "-q", "--tb=short", "--noconftest"),
        *("-p", "device_fixture", "-p", "no:cacheprovider", "-c", os.devnull),
        *(f"--rootdir={ROOT}", "--import-mode=importlib", "-n", str(given.workers)),
        *("--kind", kind, "--progress-file", str(progress), *(["--few"] if given.dry else [])),
        *(str(file) for file in files if file.is_file()),
    ]


def environment(dry: bool) -> dict[str, str]:
    """The tests' environment. Triton's interpreter must be chosen before Triton is imported."""
    paths = (str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", ""))
    made = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**made, "TRITON_INTERPRET": "1"} if dry else made


if __name__ == "__main__":
    main()
