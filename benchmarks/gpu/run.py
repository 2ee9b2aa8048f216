"""All that is measured on a card in one call: stage after stage, each with its own time limit.

    python3 benchmarks/gpu/run.py                    the first call
    python3 benchmarks/gpu/run.py --stages prefix,peer
    python3 benchmarks/gpu/run.py --dry              all of it without a card, tiny

Ends with a table; README.md beside this file says what to look at.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import child
import stages
from common import ROOT, STOPPED, out_folder, say, write
from processes import Interrupted, end_in_order
from stages import Stage, summary_line

LIMIT = 560.0
"""Seconds of all stages together: a call has ten minutes, and the machine kills it at their end."""
MIN_STAGE_SECONDS = 15.0
"""Seconds that must be left for a stage to start."""
SUMMARY_SECONDS = 5.0
"""Seconds for the summary, after the last stage has had its grace."""
MAX_FILES = 8
"""Most files in $OUT: no more come back."""
SITE = ROOT / "build" / "gpu-site"
CACHE = ROOT / "build" / "triton"
_WIDTH = 260


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    known = ", ".join(stages.names())
    parser.add_argument("--stages", default=",".join(stages.FIRST_CALL), help=f"of {known}")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="of them all")
    parser.add_argument("--dry", action="store_true", help="no card: try everything, tiny")
    parser.add_argument(
        "--keep-going", action="store_true", help="even if nothing after it can be trusted"
    )
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="the folder of wheels")
    given = parser.parse_args()
    given.stages = [name.strip() for name in given.stages.split(",") if name.strip()]
    for name in given.stages:
        if name not in stages.names():
            parser.error(f"no stage {name!r}; there are {known}")
    return given


class Call:
    """The stages of one call, and their results until now."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._started = time.monotonic()
        self.out = out_folder()
        self.out.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            "OUT": str(self.out),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(CACHE),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")])),
        }
        self._cache = Path(self.environment["TRITON_CACHE_DIR"])
        self._cache_before = _count_entries(self._cache)
        self.rows: list[dict[str, Any]] = []
        self._stop_reason: str | None = None
        """Why no further stage is to run."""
        self._signal: Interrupted | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def code(self) -> int:
        """The exit code: that of the signal that came, or whether all stages went well."""
        if self._signal is not None:
            return int(str(self._signal.code))
        outcomes = {row["outcome"] for row in self.rows}
        if "stopped" in outcomes:
            return STOPPED
        return int(outcomes != {"ok"})

    def run(self, stage: Stage) -> dict[str, Any]:
        """Runs a stage, and saves summary.json with its row; returns its result."""
        left = self._given.limit - self.seconds - child.GRACE - SUMMARY_SECONDS
        if self._stop_reason is not None:
            return self._row(stage, 0, 0, "skipped", self._stop_reason)
        if left < MIN_STAGE_SECONDS:
            return self._row(stage, 0, 0, "skipped", f"only {max(0.0, left):.0f} s are left")
        limit = min(stage.limit, left)
        say(f"== {stage.name}, {limit:.0f} s at most")
        for stale in (self._json(stage), self._log(stage)):
            stale.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / stage.script), *stage.arguments]
        started = time.monotonic()
        try:
            ended = child.run(command, self.environment, self._log(stage), limit, child.GRACE)
        except Interrupted as signal_:
            # Further signals are ignored, so that the other stages get their rows.
            self._signal, self._stop_reason = signal_, str(signal_)
            seconds = time.monotonic() - started
            return self._row(stage, limit, seconds, "stopped", str(signal_))
        outcome = {0: "ok", STOPPED: "stopped"}.get(ended.code, "failed")
        if ended.timed_out:
            outcome = "timed out"
        why = "" if outcome in ("ok", "timed out") else f"exit code {ended.code}"
        if stage.needed and outcome != "ok" and not self._given.keep_going:
            self._stop_reason = f"{stage.name} {outcome}"
        return self._row(stage, limit, ended.seconds, outcome, why)

    def _row(
        self, stage: Stage, limit: float, seconds: float, outcome: str, why: str
    ) -> dict[str, Any]:
        made = {} if outcome == "skipped" else self._result(stage)
        if outcome != "stopped" or not why.startswith("SIG"):
            why = made.get("stopped") or made.get("failed") or why
        if outcome == "failed" and not made:
            why = f"{why}: {_last_line(self._log(stage))}"
        self.rows.append(
            {"stage": stage.name, "limit": limit, "seconds": round(seconds, 1),
             "outcome": outcome, "why": why, "key": _summary_of(made), "result": made}
        )  # fmt: skip
        self.save()
        if outcome != "skipped":
            say(f"== {stage.name}: {outcome} after {seconds:.1f} s{f', {why}' if why else ''}")
        return made

    def _json(self, stage: Stage) -> Path:
        return self.out / f"{stage.name}.json"

    def _log(self, stage: Stage) -> Path:
        return self.out / f"{stage.name}.log"

    def _result(self, stage: Stage) -> dict[str, Any]:
        """A stage's JSON file, or the line of JSON that its log ends with, which becomes one."""
        file = self._json(stage)
        try:
            if not file.is_file():
                lines = self._log(stage).read_text(errors="replace").splitlines()
                write(file, json.loads(next(line for line in lines[::-1] if line[:2] == '{"')))
            made: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError, StopIteration):
            return {}
        return made

    def save(self, code: int | None = None) -> None:
        write(
            self.out / "summary.json",
            {
                "exit_code": code,
                "seconds": round(self.seconds, 1),
                "limit": self._given.limit,
                "dry": self._given.dry,
                "triton_cache": [self._cache_before, _count_entries(self._cache)],
                "stages": self.rows,
            },
        )

    def finish(self, code: int) -> None:
        """Packs the files in $OUT into few, and prints the table, last of all."""
        before, now = self._cache_before, _count_entries(self._cache)
        left = _card_in_use()
        self.save(code)
        _pack_logs(self.out, time.time() - self.seconds)
        say(f"\nTriton's cache had {before} entries and has {now}"
            f"{'' if left is None else f'; {left} of the card in use at the end'}")  # fmt: skip
        for row in self.rows:
            line = f"{row['stage']:<12} {row['seconds']:6.1f} s  {row['outcome']:<9}  "
            line += "; ".join(filter(None, [row["why"], row["key"]]))
            say(line[:_WIDTH].rstrip())
        say(f"{self.seconds:.0f} s in all, exit code {code}; everything is in {self.out.name}/"
            "summary.json")  # fmt: skip


def main() -> int:
    given = arguments()
    # Where SIGINT is ignored, as in a shell's background, all stages would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_in_order()
    call = Call(given)
    code = 1
    try:
        machine = call.run(stages.prepare(SITE, given.wheels.resolve(), given.dry))
        for stage in stages.plan(given.stages, machine.get("memory_bytes"), given.dry):
            call.run(stage)
        code = call.code
    except Interrupted as signal_:
        code = int(str(signal_.code))
    finally:
        call.finish(code)
    return code


def _summary_of(made: dict[str, Any]) -> str:
    try:
        return summary_line(made)
    except (KeyError, TypeError, ValueError):  # the result is incomplete
        return ""


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in lines[::-1] if line.strip()), "it said nothing")[:200]


def _count_entries(cache: Path) -> int:
    return len(list(cache.iterdir())) if cache.is_dir() else 0


def _card_in_use() -> str | None:
    """Memory of the card in use, which a process that was left would hold; None if unknown."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    answer = subprocess.run(
        [tool, "--query-gpu=memory.used", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None


def _pack_logs(out: Path, since: float) -> None:
    """Packs logs into one file, and results too where they are too many: the summary has them."""
    logs = sorted(out.glob("*.log"))
    results = [file for file in sorted(out.glob("*.json")) if file.name != "summary.json"]
    packed = logs if len(results) + 2 <= MAX_FILES else [*logs, *results]
    # `benchmarks/engine.py` writes the logs of its engines' drivers there.
    drivers = [
        log
        for log in sorted((ROOT / "build" / "benchmarks" / "logs").glob("*.log"))
        if log.stat().st_mtime >= since
    ]
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        for file in (*packed, *drivers):
            archive.add(file, file.name if file in packed else f"drivers/{file.name}")
    for file in packed:
        file.unlink()


if __name__ == "__main__":
    sys.exit(main())
