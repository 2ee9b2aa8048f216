"""What doctor makes of torch, of devices, and of the report about a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nightherd.settings import Settings
from tests.commands.invoking import CommandLine, environment
from worker import torch_checks
from worker.torch_checks import TorchProbe, check_checkpoint, check_compiler, check_device

CARD = {
    "name": "cuda:0 NVIDIA H100",
    "total_bytes": 80 << 30,
    "capability": "9.0",
    "uuid": "aaaa",
}
ON_CPU = {"device": "cpu", "name": "cpu AMD EPYC", "dtype": "bfloat16"}
ON_CARD = {"device": "cuda:0", "name": CARD["name"], "dtype": "bfloat16"}


def facts(use: dict[str, Any] = ON_CPU, **torch: Any) -> dict[str, Any]:
    seen = {"version": "2.13.0", "cuda": None, "devices": [], "error": None, **torch}
    return {"torch": seen, "use": use}


@pytest.fixture(autouse=True)
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver's tool that knows no card; tests write what it prints."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tool


def test_a_cpu() -> None:
    first, second = check_device(facts())
    assert first.what.startswith("cpu AMD EPYC: ")
    assert (second.level, second.what) == ("ok", "a worker would use cpu in bfloat16")


def test_a_cpu_that_has_no_bfloat16() -> None:
    (first, _) = check_device(facts({**ON_CPU, "dtype": "float32"}))
    assert "twice the memory" in first.what


def test_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path, cache=tmp_path / "cache", cpu_level="plain")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ziglang", None)
    (found,) = check_compiler(settings)
    assert found.level == "note"
    assert "g++" in str(found.remedy)
    assert "nightherd[compiler]" in str(found.remedy)
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\necho 'g++ 14.2'\n")
    fake.chmod(0o755)
    (found,) = check_compiler(settings)
    assert (found.level, found.facts["version"]) == ("ok", "g++ 14.2")
    assert "level plain" in found.what
    fake.write_text("#!/bin/sh\nexit 3\n")
    (found,) = check_compiler(settings)
    assert found.level == "note"
    # Broken settings, which another check tells, are the defaults here.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert check_compiler(None)[0].check == "compiler"
    (found,) = check_compiler(settings.model_copy(update={"engine": "torch"}))
    assert (found.level, "not needed" in found.what) == ("ok", True)


def test_a_card_and_its_free_memory(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'GPU-bbbb, 1'\necho 'GPU-aaaa, 1024'\n")
    card, cpu, use = check_device(facts(ON_CARD, cuda="12.8", devices=[CARD]))
    assert card.facts["free_bytes"] == 1 << 30
    assert "85.9 GB, 1.1 GB free" in card.what
    assert cpu.what.startswith("cpu: ")
    assert use.what == "a worker would use cuda:0 in bfloat16"


def test_a_card_without_the_drivers_tool() -> None:
    card, *_ = check_device(facts(ON_CARD, cuda="12.8", devices=[CARD]))
    assert (card.level, card.what) == ("ok", "cuda:0 NVIDIA H100, 85.9 GB")


@pytest.mark.parametrize(("cuda", "said"), [(None, "without CUDA"), ("12.8", "for CUDA 12.8")])
def test_a_card_that_torch_does_not_see(nvidia_smi: Path, cuda: str | None, said: str) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'GPU-aaaa, 1024'\n")
    first, *_ = check_device(facts(cuda=cuda))
    assert first.level == "note"
    assert said in first.what
    assert first.remedy


def test_a_driver_that_fails() -> None:
    first, *_ = check_device(facts(cuda="12.8", error="driver too old"))
    assert (first.level, "driver too old" in first.what) == ("note", True)


def test_torch_that_cannot_be_imported() -> None:
    for seen in ({"error": "libcudart.so: no such file"}, {}):
        *_, last = check_device(seen)
        assert last.level == "problem"
        assert "nightherd[worker]" in str(last.remedy)
        (found,) = check_checkpoint("demo", seen)
        assert found.level == "problem"


def report(**changes: Any) -> dict[str, Any]:
    values = {
        "architecture": "LlamaForCausalLM",
        "stored_dtype": "BF16",
        "context_length": 8192,
        "size_bytes": 16_000_000_000,
        "path": "/weights/llama",
        "problems": [],
        "notes": [],
    }
    return {"checkpoint": {**values, **changes}}


def test_a_checkpoint_that_can_be_used() -> None:
    (found,) = check_checkpoint("/weights/llama", report())
    assert found.level == "ok"
    for part in ("LlamaForCausalLM", "context 8,192", "16.0 GB", "/weights/llama"):
        assert part in found.what
    (found,) = check_checkpoint("org/name@main", report(path=None))
    assert "downloads it first" in found.what


def test_problems_and_notes_of_a_checkpoint() -> None:
    lines = ["it is too large; use a smaller one", "it is broken"]
    first, second, note = check_checkpoint("org/name", report(problems=lines, notes=["a note"]))
    assert (first.level, first.what, first.remedy) == (
        "problem",
        "it is too large",
        "use a smaller one",
    )
    assert second.remedy == "nightherd checkpoint check org/name"
    assert note.level == "note"


def test_the_process_that_asks_torch(tmp_path: Path) -> None:
    seen = TorchProbe("demo", tmp_path).facts()
    assert set(seen) == {"torch", "use", "checkpoint"}
    assert seen["checkpoint"]["problems"] == []


def test_a_torch_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_checks, "_PROBE", "import os; os.abort()")
    assert TorchProbe("demo", tmp_path).facts() == {"error": "exit code -6"}
    monkeypatch.setattr(
        torch_checks, "_PROBE", "print('{\"torch\": {}}'); raise OSError('no libcudart')"
    )
    seen = TorchProbe("demo", tmp_path).facts()
    assert seen == {"torch": {}, "error": "OSError: no libcudart"}


def test_a_torch_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_checks, "PROBE_SECONDS", 1.0)
    monkeypatch.setattr(torch_checks, "_PROBE", "import time; time.sleep(60)")
    assert TorchProbe("demo", tmp_path).facts() == {"error": "no answer within 1 s"}


_WITHOUT_EXTRA = """
import importlib.metadata, sys
NAMES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy")
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in NAMES else find_spec(name, *rest)
version = importlib.metadata.version
def missing(name):
    if name in NAMES:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = missing
"""


def test_without_the_extra(tmp_path: Path) -> None:
    """The whole command where torch and its kin are not installed."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_WITHOUT_EXTRA)
    variables = {**environment(tmp_path), "PYTHONPATH": str(tmp_path / "site")}
    blocked = subprocess.run(
        [sys.executable, "-P", "-c", "import torch"],
        env=variables,
        capture_output=True,
        check=False,
    )
    assert b"ModuleNotFoundError" in blocked.stderr
    outcome = CommandLine(variables, tmp_path)("doctor")
    assert outcome.code == 1
    assert outcome.err == ""
    assert "no worker can run here: torch, transformers" in outcome.out
    assert "remedy: pip install 'nightherd[worker]'" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("no job for demo could run: ")
