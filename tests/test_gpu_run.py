"""`benchmarks/gpu/run.py` without a card: the whole of it, and stages that hang, fail or stop."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.test_benchmarks import running, until

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "benchmarks" / "gpu"
PROGRAM = """
import json, sys
gpu, given, *sys.argv = sys.argv[1:]
sys.path.insert(0, gpu)
import child, run, stages
given = json.loads(given)
child.GRACE, run.SUMMARY_SECONDS, run.MIN_STAGE_SECONDS = given["grace"], 0.5, 1.0
stages.plan = lambda names, memory, dry: [stages.Stage(**stage) for stage in given["stages"]]
sys.exit(run.main())
"""
QUICK = """
import os
from common import Result, out_folder
Result(out_folder() / "quick.json", {"rates": [20.0], "share_of_floor": 0.5}).save()
"""
# A child, an orphan in a session of its own, a partial result.
HANGS = """
import json, os, signal, subprocess, sys, time
from common import Result, out_folder
made = Result(out_folder() / "hangs.json", {"rates": [10.0]})
made.save()
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
child = subprocess.Popen(sleep)
shell = ["/bin/sh", "-c", '"$@" >/dev/null & echo $!', "sh", *sleep]
orphan = int(subprocess.run(shell, stdout=subprocess.PIPE, start_new_session=True).stdout)
print("hangs now", flush=True)
with open(out_folder() / "pids.part", "w") as file:
    json.dump([os.getpid(), child.pid, orphan], file)
os.rename(out_folder() / "pids.part", out_folder() / "pids")
IGNORE_SIGINT
try:
    time.sleep(300)
finally:
    made["ended"] = True
    made.save()
"""
IGNORE_SIGINT = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
STOPS = """
from types import SimpleNamespace
from common import Stopped, result
with result("stops", SimpleNamespace(name="")) as made:
    raise Stopped("the engine is 'torch', not 'cuda'")
"""
FAILS = "print('all was well')\nraise SystemExit('until now')"


class Call:
    """A call in a process of its own, whose stages are what `scripts` says."""

    def __init__(self, folder: Path, scripts: dict[str, str], **needed: bool) -> None:
        self._folder = folder
        self.out = folder / "out"
        self._stages = []
        for name, text in scripts.items():
            script = folder / f"{name}.py"
            script.write_text(text)
            self._stages.append(
                {"name": name, "limit": 30, "script": str(script)}
                | {"needed": needed.get(name, False)}
            )

    def start(
        self, *more: str, limit: float = 30, grace: float = 8, **popen: Any
    ) -> subprocess.Popen[str]:
        """`limit` is that of a stage that hangs."""
        for stage in self._stages:
            if stage["name"] == "hangs":
                stage["limit"] = limit
        given = json.dumps({"grace": grace, "stages": self._stages})
        wheels = ("--wheels", str(self._folder / "no-wheels"))
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(GPU), given, "run.py", "--dry", *wheels, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OUT": str(self.out), "PYTHONPATH": str(GPU)},
            **popen,
        )

    def pids(self) -> list[int]:
        """Of the stage that hangs and of what it has started."""
        until((self.out / "pids").is_file, 60)
        found: list[int] = json.loads((self.out / "pids").read_text())
        return found

    def rows(self) -> dict[str, dict[str, Any]]:
        made = json.loads((self.out / "summary.json").read_text())
        return {row["stage"]: row for row in made["stages"]}


def outcomes(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: row["outcome"] for name, row in rows.items()}


def test_a_dry_call(tmp_path: Path) -> None:
    """The stages that measure, as they are; the tests' stage has a test of its own."""
    said = subprocess.run(
        [sys.executable, str(GPU / "run.py"), "--dry", "--stages", "smoke,figure,decode",
         "--wheels", str(tmp_path / "none")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env={**os.environ, "OUT": str(tmp_path)},
    )  # fmt: skip
    assert said.returncode == 0, said.stdout
    made = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    rows = {row["stage"]: row for row in made["summary"]["stages"]}
    assert outcomes(rows) == dict.fromkeys(("prepare", "smoke", "figure", "decode"), "ok")
    assert all(rows[name]["result"] == made[name] for name in rows)
    for name in ("smoke", "figure", "decode"):
        assert made[name]["engine"] == "cuda"
        assert made[name]["num_blocks"] > 0
        assert made[name]["warnings"] == []
    for name in ("smoke", "figure"):
        assert made[name]["preemptions"] == 0
        assert made[name]["graphs"] >= 1
    assert made["smoke"]["tokens_equal"] == 1
    assert made["smoke"]["bfloat16"]["graphs"] >= 1
    assert made["figure"]["profile"]["parts"]
    assert made["figure"]["share_of_floor"] > 0
    assert all(step["captured"] and step["where"]["parts"] for step in made["decode"]["steps"])
    assert len({file.name for file in tmp_path.iterdir()}) <= 8
    with tarfile.open(tmp_path / "logs.tar.gz") as logs:
        assert {f"{name}.log" for name in rows} <= {*logs.getnames()}
    # The end of the output is all that is seen: the whole table is in it.
    table = said.stdout[-3000:].splitlines()
    for name in rows:
        (line,) = [line for line in table if line.startswith(f"{name} ")]
        assert " ok " in line
        assert re.search(r"\d+\.\d s", line)
    assert "tokens/s" in said.stdout[-3000:]
    assert '{"script"' not in said.stdout


@pytest.mark.parametrize(
    ("stubborn", "background"), [(False, False), (True, False), (False, True)],
    ids=["polite", "stubborn", "started in the background"],
)  # fmt: skip
def test_a_stage_that_hangs_is_ended(stubborn: bool, background: bool, tmp_path: Path) -> None:
    """It gets SIGINT first, and its partial result is kept; then the next stage runs."""
    hangs = HANGS.replace("IGNORE_SIGINT", IGNORE_SIGINT if stubborn else "")
    call = Call(tmp_path, {"hangs": hangs, "quick": QUICK})
    process = call.start(
        limit=3, grace=2 if stubborn else 20,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if background else None,
    )  # fmt: skip
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    rows = call.rows()
    assert outcomes(rows) == {"prepare": "ok", "hangs": "timed out", "quick": "ok"}
    wanted = {"rates": [10.0]} if stubborn else {"rates": [10.0], "ended": True}
    assert rows["hangs"]["result"] == json.loads((call.out / "hangs.json").read_text()) == wanted
    assert 3 <= rows["hangs"]["seconds"] < 13
    assert not running(call.pids())
    assert "hangs now" in said
    assert re.search(r"^hangs .* timed out  10 tokens/s$", said, re.MULTILINE)
    assert re.search(r"^quick .* ok .*20 tokens/s, 50% of the floor", said, re.MULTILINE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_stage_under_way(number: signal.Signals, tmp_path: Path) -> None:
    call = Call(
        tmp_path, {"quick": QUICK, "hangs": HANGS.replace("IGNORE_SIGINT", ""), "never": QUICK}
    )
    process = call.start(grace=20)
    pids = call.pids()
    assert running(pids) == pids
    process.send_signal(number)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said.partition("hangs now")[0]
    rows = call.rows()
    assert outcomes(rows) == {
        "prepare": "ok",
        "quick": "ok",
        "hangs": "stopped",
        "never": "skipped",
    }
    assert rows["hangs"]["why"] == rows["never"]["why"] == number.name
    assert rows["hangs"]["result"] == {"rates": [10.0], "ended": True}
    assert not running(pids)


def test_nothing_stays_when_the_call_is_killed(tmp_path: Path) -> None:
    call = Call(tmp_path, {"quick": QUICK, "hangs": HANGS.replace("IGNORE_SIGINT", IGNORE_SIGINT)})
    process = call.start()
    pids = call.pids()
    process.kill()
    process.communicate(timeout=30)
    until(lambda: not running(pids), 5)
    assert outcomes(call.rows()) == {"prepare": "ok", "quick": "ok"}


@pytest.mark.parametrize("keep_going", [False, True])
def test_nothing_is_measured_of_an_engine_that_is_wrong(keep_going: bool, tmp_path: Path) -> None:
    call = Call(tmp_path, {"stops": STOPS, "quick": QUICK}, stops=True)
    process = call.start(*(["--keep-going"] if keep_going else []))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3, said
    rows = call.rows()
    assert rows["stops"]["outcome"] == "stopped"
    assert rows["stops"]["why"] == "the engine is 'torch', not 'cuda'"
    assert "STOP: the engine is 'torch', not 'cuda'\n" in said
    assert rows["quick"]["outcome"] == ("ok" if keep_going else "skipped")
    assert keep_going or rows["quick"]["why"] == "stops stopped"


def test_a_stage_that_fails_without_a_result(tmp_path: Path) -> None:
    call = Call(tmp_path, {"fails": FAILS, "quick": QUICK})
    process = call.start()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    rows = call.rows()
    assert outcomes(rows) == {"prepare": "ok", "fails": "failed", "quick": "ok"}
    assert rows["fails"]["why"] == "exit code 1: until now"


def test_all_stages_together_keep_to_the_limit(tmp_path: Path) -> None:
    """The last one that there is time for has less of it, and its grace is within."""
    call = Call(tmp_path, {"hangs": HANGS.replace("IGNORE_SIGINT", IGNORE_SIGINT), "quick": QUICK})
    process = call.start("--limit", "7", grace=2)
    said, _ = process.communicate(timeout=60)
    assert json.loads((call.out / "summary.json").read_text())["seconds"] < 8.5
    rows = call.rows()
    assert outcomes(rows) == {"prepare": "ok", "hangs": "timed out", "quick": "skipped"}, said
    assert rows["hangs"]["limit"] < 4.5
    assert re.fullmatch(r"only \d s are left", rows["quick"]["why"])


def test_the_stages_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes by its memory, all within the limit of a call, all scripts there."""
    stages = _module("stages", monkeypatch)
    run = _module("run", monkeypatch)
    small, large = (stages.plan([*stages.FIRST_CALL], gib << 30, False) for gib in (80, 140))
    for plan, sequences, batch in ((small, 576, 512), (large, 1024, 1024)):
        given = {stage.name: stage.arguments for stage in plan}
        assert [*given] == ["smoke", "figure", "decode", "tests"]
        assert f"--sequences {sequences} --requests {2 * sequences} " in " ".join(given["figure"])
        assert f"--batches 256,{batch}" in " ".join(given["decode"])
        assert [stage.name for stage in plan if stage.needed] == ["smoke"]
    assert sum(stage.limit for stage in small) + 40 < run.LIMIT
    every = stages.plan(stages.names(), 80 << 30, False)
    assert all((ROOT / stage.script).is_file() for stage in every)
    assert all(stage.limit < run.LIMIT - 25 for stage in every)
    assert len({stage.name for stage in every}) == len(every)


WHEELS = "# What is lacking:\nvalkey-lite==9.1.2.post2\nSQLAlchemy==2.1.9\n"
THERE = ("valkey_lite-9.1.2.post2-py3-none-any.whl", "sqlalchemy-2.1.9-cp312-cp312-linux.whl")


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (THERE, None),
        (THERE[:1], "missing sqlalchemy 2.1.9"),
        (
            (THERE[0], "sqlalchemy-2.1.8-py3-none-any.whl"),
            "missing sqlalchemy 2.1.9; not listed sqlalchemy-2.1.8-py3-none-any.whl",
        ),
        ((*THERE, "rich-15.0.0-py3-none-any.whl"), "not listed rich-15.0.0-py3-none-any.whl"),
        ((*THERE, "SQLAlchemy-2.1.9-py3-none-any.whl"), "some twice"),
    ],
)
def test_wheels_are_those_that_are_listed(
    names: tuple[str, ...], why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = _module("prepare", monkeypatch)
    for name in names:
        (tmp_path / name).write_bytes(bytes(1 << 18))
    wheels = sorted(tmp_path.iterdir())
    assert prepare.wheel_problem(wheels, WHEELS, 1 << 20) == why
    heavy = "0.5 MiB, more than 0 MiB"
    if names == THERE:
        assert prepare.wheel_problem(wheels, WHEELS, 1 << 18) == heavy
        assert prepare.checked_wheels(tmp_path, WHEELS) == wheels


def test_wrong_wheels_stop_all(tmp_path: Path) -> None:
    (tmp_path / "no-wheels").mkdir()
    (tmp_path / "no-wheels" / "pydantic-1.0-py3-none-any.whl").touch()
    call = Call(tmp_path, {"quick": QUICK})
    process = call.start()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert outcomes(call.rows()) == {"prepare": "stopped", "quick": "skipped"}
    (line,) = [line for line in said.splitlines() if line.startswith("STOP: ")]
    assert "missing pydantic 2." in line
    assert "not listed pydantic-1.0-py3-none-any.whl" in line


def test_wheels_are_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again only where others came."""
    prepare = _module("prepare", monkeypatch)
    calls: list[list[str]] = []

    def pip(command: list[str], **more: Any) -> Any:
        calls.append(command)
        Path(command[command.index("--target") + 1]).mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(prepare.subprocess, "run", pip)
    one, other = (tmp_path / name for name in THERE)
    for wheels in ([one], [one], [one, other]):
        prepare.install(wheels, tmp_path / "site")
    assert [command[-1] for command in calls] == [str(one), str(other)]


def test_the_list_of_wheels_has_the_versions_that_are_tested() -> None:
    pins = {}
    for name in ("benchmarks/gpu/wheels.txt", "constraints.txt"):
        found = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE)
        pins[name] = {re.sub(r"[-_.]+", "-", package).lower(): of for package, of in found}
    wheels, tested = pins.values()
    assert len(wheels) > 25
    assert {name: tested[name] for name in wheels} == wheels


TESTS = """
import pytest, torch

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
def test_one(size, dtype, device):
    assert device.type == "cpu" or torch.cuda.is_available()
    assert (size, dtype) != (2, torch.bfloat16), "wrong by far"

def test_other(): pass
"""


def test_counts_of_the_kernels_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is of one kind; what failed is told, and what was under way when all ended."""
    kernel_tests = _module("kernel_tests", monkeypatch)
    (tmp_path / "test_it.py").write_text(TESTS)
    given = importlib.import_module("types").SimpleNamespace(workers=1, dry=False)
    found = {}
    for kind in ("bf16", "rest"):
        progress = tmp_path / f"{kind}.json"
        command = kernel_tests.command(given, kind, progress)
        command = [part for part in command if not part.endswith(".py")]
        made = subprocess.run(
            [*command, f"--rootdir={tmp_path}", str(tmp_path / "test_it.py")],
            env={**kernel_tests.environment(False), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == (kind == "bf16"), made.stdout + made.stderr
        found[kind] = json.loads(progress.read_text())
    assert [found["bf16"][name] for name in ("passed", "failed", "running")] == [1, 1, []]
    assert [found["rest"][name] for name in ("passed", "failed", "running")] == [3, 0, []]
    (failure,) = found["bf16"]["failures"]
    assert failure.startswith("test_it.py::test_one[2-dtype1]: AssertionError: wrong by far")


def test_all_kernels_tests_that_a_card_is_to_run_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel_tests = _module("kernel_tests", monkeypatch)
    given = importlib.import_module("types").SimpleNamespace(workers=12, dry=True)
    command = kernel_tests.command(given, "bf16", Path("progress"))
    files = [Path(part).name for part in command if part.endswith(".py")]
    assert {"test_kernels.py", "test_prefix.py"} <= {*files}
    fixture = _module("device_fixture", monkeypatch)
    text = "".join(Path(part).read_text() for part in command if part.endswith(".py"))
    assert all(f"def {name}(" in text for name in fixture.FEW)


def _module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of that folder, gone again after the test."""
    for folder in (ROOT / "benchmarks", GPU):
        monkeypatch.syspath_prepend(str(folder))
    before = {*sys.modules}
    module = importlib.import_module(name)
    for fresh in {*sys.modules} - before:
        file = getattr(sys.modules[fresh], "__file__", None) or ""
        if file.startswith(str(ROOT / "benchmarks")):
            monkeypatch.delitem(sys.modules, fresh)
    return module
