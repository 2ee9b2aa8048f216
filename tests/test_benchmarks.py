"""`benchmarks/engine.py` with drivers that only pretend: what it leaves behind and what it says."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
OURS = (
    *("card", "engine", "levels", "processes", "report", "runner", "shapes", "tether", "workloads"),
    "drive_ceiling",
)
PROGRAM = """
import sys
from pathlib import Path
benchmarks, drivers, *sys.argv = sys.argv[1:]
sys.path.insert(0, benchmarks)
import engine, runner
runner.DRIVERS = Path(drivers)
engine.main()
"""
CEILING = """
import json, sys
task = json.load(open(sys.argv[1]))
made = {"matrix_flops": 2e9, "matrix_dtype": "float32"}
open(task["result"], "w").write(json.dumps(made))
"""
QUICK = """
import json, os, sys
task = json.load(open(sys.argv[1]))
tokens = sum(request["out"] for request in task["requests"])
made = {"tokens": tokens, "tokens_per_second": SPEED, "load_seconds": 1, "peak_bytes": 1000000,
        "environment": dict(os.environ)}
open(task["result"], "w").write(json.dumps(made))
"""
# The second of its children leaves group and parent, as the embedded broker does.
ENDLESS = """
import json, os, subprocess, sys, time
result = json.load(open(sys.argv[1]))["result"]
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
child = subprocess.Popen(sleep)
shell = ["/bin/sh", "-c", '"$@" & echo $!', "sh", *sleep]
with open(result + ".orphan", "w") as file:
    subprocess.run(shell, stdout=file, start_new_session=True)
orphan = int(open(result + ".orphan").read())
with open(result + ".partial", "w") as file:
    json.dump([os.getpid(), child.pid, orphan], file)
os.rename(result + ".partial", result + ".pids")
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As when the benchmark or a driver is started; afterwards nothing of it is left."""
    for folder in (BENCHMARKS, BENCHMARKS / "peers"):
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name in OURS:
        sys.modules.pop(name, None)


class Bench:
    """A benchmark in a process of its own, whose engines are what `drivers` says."""

    def __init__(self, folder: Path, drivers: dict[str, str]) -> None:
        self._cache, self._drivers = folder / "cache", folder / "drivers"
        self._drivers.mkdir()
        self._engines = ",".join(name for name in drivers if name != "ceiling")
        for name, text in {"ceiling": CEILING, **drivers}.items():
            (self._drivers / f"drive_{name.replace('-', '_')}.py").write_text(text)
        checkpoint = self._cache / "T-empty"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").touch()
        words = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
        words.save(str(checkpoint / "tokenizer.json"))

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM, str(BENCHMARKS), str(self._drivers), "engine.py"),
                *("--shape", "T", "--random", "--requests", "4", "--force", "--rounds", "1"),
                *("--cache", str(self._cache), "--engines", self._engines, *more),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self, name: str) -> list[int]:
        """Of an endless driver and what it has started, once they are there."""
        file = self._cache / "logs" / f"{name}.result.json.pids"
        until(file.is_file, 30)
        found: list[int] = json.loads(file.read_text())
        assert len(found) == 3
        return found

    @staticmethod
    def results(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str, str]:
        """The line of JSON, the table above it, and what was said meanwhile."""
        out, said = process.communicate(timeout=60)
        assert out, said
        table, _, line = out.rstrip("\n").rpartition("\n")
        return json.loads(line), table, said


def until(reached: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


def running(pids: list[int]) -> list[int]:
    """Those that are there and no zombies that only wait to be reaped."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def quick(speed: int) -> str:
    return QUICK.replace("SPEED", str(speed))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_drivers_end_with_the_benchmark(number: signal.Signals, tmp_path: Path) -> None:
    """With all they have started, and what has been measured is reported if it can be."""
    bench = Bench(tmp_path, {"nightherd": quick(20), "transformers": ENDLESS})
    process = bench.start()
    try:
        pids = bench.pids("transformers")
        assert running(pids) == pids
        process.send_signal(number)
        until(lambda: not running(pids), 5)
    finally:
        out, said = process.communicate(timeout=30)
    assert "Traceback" not in said
    if number is signal.SIGKILL:
        assert (process.returncode, out) == (-number, "")
        return
    assert process.returncode == 128 + number
    table, line = out[:-1].rsplit("\n", 1)
    assert f"not all was measured: {number.name}" in table
    assert "\nnightherd " in table
    made = json.loads(line)
    assert made["tokens_per_second"] == {"nightherd": 20}
    assert made["stopped"] == number.name


def test_a_signal_that_comes_twice_is_one(tmp_path: Path) -> None:
    """`timeout` sends it to the process and to its group."""
    bench = Bench(tmp_path, {"nightherd": quick(20), "transformers": ENDLESS})
    process = bench.start()
    pids = bench.pids("transformers")
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    made, _, said = bench.results(process)
    assert (process.returncode, made["stopped"]) == (128 + signal.SIGTERM, "SIGTERM")
    assert "Traceback" not in said
    assert not running(pids)


def test_before_anything_is_measured_there_is_nothing_to_report(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"nightherd": ENDLESS})
    process = bench.start()
    bench.pids("nightherd")
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + signal.SIGTERM, "")
    assert "Traceback" not in said


def test_an_engine_that_takes_too_long_is_left_out(tmp_path: Path) -> None:
    """It is ended, and all the others are measured in all rounds."""
    drivers = {"transformers-cb": ENDLESS, "nightherd": quick(20), "transformers": quick(10)}
    bench = Bench(tmp_path, drivers)
    process = bench.start("--limit", "2", "--rounds", "2")
    made, table, said = bench.results(process)
    assert process.returncode == 0, said
    assert made["left_out"] == {"transformers-cb": "took longer than 2 s"}
    assert said.count("transformers-cb: took longer than 2 s, left out; see ") == 1
    assert "left out: transformers-cb, took longer than 2 s" in table.splitlines()
    assert {name: len(runs) for name, runs in made["runs"].items()} == {
        "nightherd": 2,
        "transformers": 2,
    }
    assert made["ratio_to_best_peer"] == 2
    assert made["stopped"] is None
    assert not running(bench.pids("transformers-cb"))


def test_where_all_are_left_out_the_report_says_why(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path, {"nightherd": "raise SystemExit(3)", "transformers": "raise SystemExit(1)"}
    )
    process = bench.start()
    made, _, said = bench.results(process)
    assert process.returncode == 1
    assert made["left_out"]["nightherd"] == "failed with exit code 3"
    assert made["left_out"]["transformers"] == "failed with exit code 1"
    assert said.endswith("nothing was measured\n")


def test_a_later_round_without_a_ceiling_loses_nothing(tmp_path: Path) -> None:
    once = "import os, sys\nwhere = sys.argv[1] + '.once'\nos.mkdir(where)\n" + CEILING
    bench = Bench(tmp_path, {"ceiling": once, "nightherd": quick(20)})
    process = bench.start("--rounds", "3")
    made, _, said = bench.results(process)
    assert process.returncode == 0, said
    assert len(made["runs"]["nightherd"]) == 3
    assert made["limits"] == [{**made["limits"][0], "matrix_flops": 2e9}]
    assert "round 2: no ceiling, so that of other rounds counts: failed with exit code 1" in said


def test_a_first_round_without_a_ceiling_is_the_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"ceiling": "raise SystemExit(4)", "nightherd": quick(20)})
    process = bench.start()
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "the ceiling cannot be measured: failed with exit code 4; see " in said


def test_a_machine_that_gets_busy_loses_nothing() -> None:
    """It ends there, with the engines that had their turn."""
    engine = importlib.import_module("engine")
    report = importlib.import_module("report")

    def measure(name: str) -> dict[str, Any]:
        if name != "nightherd":
            raise SystemExit("other processes use 1.5 cores")
        return {"tokens_per_second": 20.0}

    drivers = SimpleNamespace(limits=lambda: {"matrix_flops": 1e9}, measure=measure)
    measured = report.Measured()
    with pytest.raises(SystemExit, match="other processes"):
        engine.rounds(SimpleNamespace(rounds=2), drivers, ["nightherd", "transformers"], measured)
    assert measured.runs == {"nightherd": [{"tokens_per_second": 20.0}]}


@pytest.mark.parametrize(
    ("most", "slowest", "fastest", "limit"),
    [
        (900, 30, None, 900),  # the first engine
        (900, 30, 10, 300),
        (900, 30, 1, 60),  # compiling takes its time
        (900, 30, 100, 900),
        (45, 30, 1, 45),
    ],
)
def test_the_limit_follows_the_fastest(
    most: float, slowest: float, fastest: float | None, limit: float
) -> None:
    assert importlib.import_module("runner").time_limit(most, slowest, fastest) == limit


def test_an_engine_gets_no_longer_than_the_fastest_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = importlib.import_module("runner")
    limits = {}

    def run(command: list[str], environment: Any, log: Path, limit: float) -> Any:
        name = Path(command[1]).stem
        limits[name] = limit
        result = json.loads(Path(command[2]).read_text())["result"]
        Path(result).write_text(json.dumps({"tokens": 7}))
        seconds = {"drive_nightherd": 4.0, "drive_transformers": 50.0}.get(name, 1.0)
        return SimpleNamespace(code=0, seconds=seconds, others=0.0)

    monkeypatch.setattr(runner.processes, "run", run)
    monkeypatch.setattr(runner, "as_text", lambda requests, folder: requests)
    monkeypatch.setattr(sys, "argv", ["engine.py", "--force", "--cache", str(tmp_path)])
    given = importlib.import_module("engine").arguments()
    shape = importlib.import_module("shapes").SHAPES["T"]
    drivers = runner.Runner(given, shape, tmp_path, [{"prompt": [1], "out": 7}])
    drivers.limits()
    for engine in ("nightherd", "transformers", "transformers-cb"):
        drivers.measure(engine)
    assert limits == {
        "drive_ceiling": 900.0,
        "drive_nightherd": 900.0,
        "drive_transformers": 120.0,
        "drive_transformers_cb": 120.0,
    }


FLAGS = {
    "plain": "fpu sse sse4_1 sse4_2 avx f16c",
    "avx2": "fpu avx avx2 fma",
    "avx512": "avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni",
    "avx512bf16": "avx2 fma avx512f avx512bw avx512dq avx512vl avx512_bf16 amx_tile",
    "amx": "avx2 fma avx512f avx512bw avx512dq avx512vl avx512_bf16 amx_tile amx_bf16",
}


@pytest.mark.parametrize("level", FLAGS)
def test_the_level_of_a_cpu(level: str) -> None:
    levels = importlib.import_module("levels")
    cpuinfo = f"processor\t: 0\nmodel name\t: A CPU: 9\nflags\t\t: {FLAGS[level]}\n\n" * 2
    assert levels.of_this_cpu(cpuinfo) == level
    assert levels.model_name(cpuinfo) == "A CPU: 9"
    # All of a level must be there: none of these comes without the level below.
    for flag in {*FLAGS[level].split()} & {"fma", "avx512vl", "avx512f", "avx512_bf16"}:
        lower = levels.of_this_cpu(cpuinfo.replace(f" {flag}", ""))
        assert levels.is_lower(lower, level)
    assert levels.of_this_cpu("processor\t: 0\nFeatures\t: fp asimd\n") == "plain"


@pytest.mark.parametrize(
    ("level", "caps"),
    [
        (None, (None, None, None)),
        ("plain", ("SSE41", "SSE4_2", "default")),
        ("avx2", ("AVX2", "AVX2", "avx2")),
        ("avx512", ("AVX512_CORE", "AVX512", None)),
        ("avx512bf16", ("AVX512_CORE_BF16", "AVX512", None)),
        ("amx", (None, None, None)),
    ],
)
def test_a_level_holds_all_that_computes(
    level: str | None, caps: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the benchmark was started with says nothing."""
    runner = importlib.import_module("runner")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.setenv(name, "stray")
    monkeypatch.setenv("NIGHTHERD_CPU_LEVEL", "stray")
    names = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
    drivers = runner.Runner.__new__(runner.Runner)
    drivers._given = SimpleNamespace(level=level, threads=1)
    for engine in ("ceiling", *runner.ENGINES):
        made = drivers._environment(engine)
        capped = caps if engine != "openvino" else (None, None, None)
        assert tuple(map(made.get, names)) == capped, engine
        ours = level if engine in ("nightherd", "nightherd-worker") else None
        assert made.get("NIGHTHERD_CPU_LEVEL") == ours, engine
        assert "DNNL_MAX_CPU_ISA" not in made


def test_drivers_get_the_level(tmp_path: Path) -> None:
    """`plain` is one that every CPU has."""
    bench = Bench(tmp_path, {"nightherd": quick(20), "transformers": quick(10)})
    made, table, _ = bench.results(bench.start("--level", "plain"))
    levels = importlib.import_module("levels")
    assert (made["level"], made["cpu"]) == ("plain", levels.model_name())
    assert "level plain; ceiling " in table.splitlines()[0]
    seen = {name: runs[0]["environment"] for name, runs in made["runs"].items()}
    assert seen["nightherd"]["NIGHTHERD_CPU_LEVEL"] == "plain"
    assert "NIGHTHERD_CPU_LEVEL" not in seen["transformers"]
    assert {one["ATEN_CPU_CAPABILITY"] for one in seen.values()} == {"default"}


def test_what_a_cpu_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = importlib.import_module("engine")
    monkeypatch.setattr(engine.levels, "of_this_cpu", lambda: "avx2")
    monkeypatch.setattr(sys, "argv", ["engine.py", "--level", "avx512"])
    with pytest.raises(SystemExit, match=r"^--level avx512: this CPU .* only avx2$"):
        engine.arguments()
    monkeypatch.setattr(sys, "argv", ["engine.py", "--level", "avx2"])
    assert engine.arguments().level == "avx2"
    monkeypatch.setattr(sys, "argv", ["engine.py", "--profile", "8"])
    with pytest.raises(SystemExit, match=r"^--profile: only what runs on a card"):
        engine.arguments()


@pytest.mark.parametrize(
    ("own", "level", "able"),
    [("amx", "avx512bf16", False), ("avx2", "avx2", True), ("avx512", None, True)],
)
def test_openvino_cannot_be_held_to_a_level(
    own: str,
    level: str | None,
    able: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = importlib.import_module("engine")
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / ".installed").touch()
    monkeypatch.setattr(engine.runner, "PEERS", tmp_path)
    monkeypatch.setattr(engine.levels, "of_this_cpu", lambda: own)
    given = SimpleNamespace(
        engines="nightherd,openvino", device="cpu", json_schema=False, level=level
    )
    measured = importlib.import_module("report").Measured()
    names = engine.available(given, measured)
    assert names == (["nightherd", "openvino"] if able else ["nightherd"])
    why = f"cannot be held to {level}, this CPU has {own}"
    assert measured.left_out == ({} if able else {"openvino": why})
    assert capsys.readouterr().err == ("" if able else f"openvino: {why}, skipped\n")


@pytest.mark.parametrize(
    ("dtype", "rates", "best"),
    [
        ("bfloat16", {"float32": 164e9, "bfloat16": 21e9}, ("float32", 164e9)),
        ("bfloat16", {"float32": 300e9, "bfloat16": 1900e9}, ("bf16", 1900e9)),
        ("float32", {"float32": 300e9, "bfloat16": 1900e9}, ("float32", 300e9)),
    ],
)
def test_the_ceiling_is_that_of_the_best_number_type(
    dtype: str,
    rates: dict[str, float],
    best: tuple[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from worker import speed

    def matrix_rate(matrices: Any, of: Any, device: Any, seconds: float) -> float:
        assert list(matrices) == [(8, 16)]
        return rates[str(of).removeprefix("torch.")]

    monkeypatch.setattr(speed, "matrix_rate", matrix_rate)
    driver = importlib.import_module("drive_ceiling")
    result = tmp_path / "result.json"
    task = {"dtype": dtype, "device": "cpu", "threads": torch.get_num_threads()}
    driver.main({**task, "matrices": [[8, 16]]}, result)
    made = json.loads(result.read_text())
    assert (made["matrix_dtype"], made["matrix_flops"]) == best
    assert len(made["flops_by_dtype"]) == (2 if dtype == "bfloat16" else 1)


def test_on_a_card_the_ceiling_is_that_of_its_number_type() -> None:
    driver = importlib.import_module("drive_ceiling")
    assert driver.number_types("bfloat16", "cuda") == ["bfloat16"]
    assert driver.number_types("float32", "cuda") == ["float32"]


def test_the_table_says_what_the_ceiling_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"nightherd": quick(20)})
    made, table, _ = bench.results(bench.start())
    assert table.splitlines()[0].endswith(" tokens/s at 2 GFLOP/s in float32")
    assert made["matrix_dtype"] == "float32"
    assert made["level"] == importlib.import_module("levels").of_this_cpu()


def test_a_tether_tells_how_its_command_ended(tmp_path: Path) -> None:
    processes = importlib.import_module("processes")

    def code(program: str) -> int | None:
        command = [sys.executable, "-c", program]
        ended = processes.run(command, os.environ, tmp_path / "log", 30)
        return ended.code  # type: ignore[no-any-return]

    assert code("") == 0
    assert code("raise SystemExit(7)") == 7
    assert code("import os; os.kill(os.getpid(), 9)") == 128 + 9
    # It may ask for input, and gets none: the pipe is not its own.
    assert code("import sys; assert sys.stdin.read() == ''") == 0


def test_what_a_driver_leaves_behind_ends_too(tmp_path: Path) -> None:
    processes = importlib.import_module("processes")
    program = (
        "import subprocess, sys\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(300)']\n"
        "print(subprocess.Popen(sleep, start_new_session=True).pid)"
    )
    log = tmp_path / "log"
    ended = processes.run([sys.executable, "-c", program], os.environ, log, 30)
    assert ended.code == 0
    assert running([int(log.read_text())]) == []


def test_even_a_killed_tether_leaves_no_driver(tmp_path: Path) -> None:
    processes = importlib.import_module("processes")
    program = (
        "import os, time\nprint(os.getpid(), flush=True)\nos.kill(os.getppid(), 9)\ntime.sleep(300)"
    )
    log = tmp_path / "log"
    assert processes.run([sys.executable, "-c", program], os.environ, log, 30).code == -9
    until(lambda: not running([int(log.read_text())]), 5)
