"""The checks of `nightherd doctor` that need torch, or the checkpoint.

torch is imported in a process of its own: an installation that is broken may end it on the spot,
and a driver that hangs may hold it for ever. This module imports neither torch nor what imports it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nightherd.errors import SettingsError
from nightherd.machine import cores, size
from nightherd.settings import Settings, load_settings
from producer.doctor.finding import Finding, Level
from producer.doctor.machine import WORKER_PACKAGES
from worker.engine.cpu.compiler import REMEDY, CpuKernels, find_compiler
from worker.kernel_folder import kernels_of

PROBE_SECONDS = 90.0
"""How long torch and transformers may take to be imported: a minute from a cold disk."""

_PROBE = "import sys; from worker.torch_checks import probe; probe(sys.argv[1], sys.argv[2])"
_WIDE = ("float32",)
_COMPILER_LINES = 8
"""Lines of a compiler's output that are shown."""


class TorchProbe:
    """The process that imports torch and checks the checkpoint; `facts` waits for what it found."""

    def __init__(self, key: str, home: Path) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._facts: dict[str, Any] | None = None
        if any(importlib.util.find_spec(name) is None for name in WORKER_PACKAGES):
            self._facts = {}
            return
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROBE, key, str(home)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def facts(self) -> Mapping[str, Any]:
        """`torch`, `use` and `checkpoint`, as far as the process came; `error` if not to the end.

        Empty where the extra `worker` is not installed.
        """
        if self._facts is None:
            self._facts = self._wait()
        return self._facts

    def _wait(self) -> dict[str, Any]:
        assert self._process is not None  # noqa: S101 - made so above
        late = ""
        try:
            out, err = self._process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            late = f"no answer within {PROBE_SECONDS:g} s"
            self._process.kill()
            out, err = self._process.communicate()
        facts: dict[str, Any] = {}
        for line in out.splitlines():
            if line.startswith('{"'):
                facts |= json.loads(line)
        if self._process.returncode:
            lines = [line.strip() for line in err.splitlines() if line.strip()]
            facts["error"] = late or (lines or [f"exit code {self._process.returncode}"])[-1]
        return facts

    def close(self) -> None:
        """Ends the process if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def probe(key: str, home: str) -> None:
    """Prints what it finds, a line of JSON for each part, so that a crash loses the rest only."""
    print(json.dumps({"torch": _torch_facts()}), flush=True)
    kernels = _kernels()
    print(json.dumps({"use": _worker_facts(kernels)}), flush=True)
    from worker.checkpoint.report import check

    found = check(key, home=Path(home), kernels=kernels)
    print(json.dumps({"checkpoint": found.as_json()}), flush=True)


def _kernels() -> CpuKernels | None:
    """Those that a worker here would use on a CPU."""
    try:
        return kernels_of(load_settings())
    except SettingsError:  # the check of the settings says so
        return kernels_of(Settings())


def _torch_facts() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "devices": [],
        "error": None,
    }
    try:
        if torch.cuda.is_available():
            facts["devices"] = [_cuda_facts(number) for number in range(torch.cuda.device_count())]
    except Exception as error:  # a driver may say anything
        facts["error"] = " ".join(str(error).split())
    return facts


def _cuda_facts(number: int) -> dict[str, Any]:
    """A device's properties. Not its free memory: that would take some of it, for a context."""
    import torch

    found = torch.cuda.get_device_properties(number)
    return {
        "name": f"cuda:{number} {found.name}",
        "total_bytes": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "uuid": str(getattr(found, "uuid", "")),
    }


def _worker_facts(kernels: CpuKernels | None) -> dict[str, Any]:
    """What a worker that is told nothing would use, for a checkpoint that is stored as bfloat16."""
    from worker.checkpoint.device import device_name, resolve_device, resolve_dtype

    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device, bfloat16=True, kernels=kernels)
    return {
        "device": str(device),
        "name": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "cpu_level": kernels.level if kernels and device.type == "cpu" else None,
    }


# Findings.


def check_device(facts: Mapping[str, Any]) -> list[Finding]:
    """Where a worker here would compute, in what precision, and what it leaves unused."""
    found = []
    torch = facts.get("torch")
    use = facts.get("use")
    if torch is not None:
        found.extend(_cuda_findings(torch))
    usable, everywhere = cores()
    on_cpu = use is not None and use["device"] == "cpu"
    said = f"{use['name'] if on_cpu and use else 'cpu'}: {usable:g} of {everywhere} cores"
    cpu = {"cores": usable, "cores_of_machine": everywhere}
    if on_cpu and use is not None and use["dtype"] in _WIDE:
        said += ", no bfloat16 without the C kernels: float32, which takes twice the memory"
    found.append(Finding("device", "ok", said, facts=cpu))
    if use is not None:
        said = f"a worker would use {use['device']} in {use['dtype']}"
        if use.get("cpu_level"):
            said += f", kernels for {use['cpu_level']}"
        found.append(Finding("device", "ok", said, facts=use))
    elif "error" in facts:
        said = f"torch or transformers cannot be used here: {facts['error']}"
        remedy = "install them anew: pip install --force-reinstall 'nightherd[worker]'"
        found.append(Finding("device", "problem", said, remedy))
    else:
        said = "no worker can run here: torch and what it needs are not installed"
        found.append(Finding("device", "problem", said, "pip install 'nightherd[worker]'"))
    return found


def check_compiler(settings: Settings | None) -> list[Finding]:
    """Whether a worker here has the C kernels, or can compile them."""
    kernels = kernels_of(settings or Settings())
    if kernels is None:
        said = "not needed: NIGHTHERD_ENGINE asks for another engine than the C kernels"
        return [Finding("compiler", "ok", said)]
    compiler = find_compiler()
    if compiler is None:
        said = "no C++ compiler: a worker on the CPU cannot build its faster kernels"
        return [Finding("compiler", "note", said, REMEDY)]
    try:
        done = subprocess.run(
            [*compiler.command, *(["version"] if compiler.zig else ["--version"])],
            capture_output=True,
            text=True,
            timeout=4,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = f"{compiler.name} does not run: {' '.join(str(error).split())}"
        return [Finding("compiler", "note", said, "install another, or set CXX")]
    version = (done.stdout.splitlines() or ["?"])[0]
    facts = {"path": compiler.name, "version": version, "cpu_level": kernels.level}
    failure = kernels.failure()
    if failure is not None:
        # The last lines: a compiler's output for one mistake may fill pages.
        lines = [line.rstrip() for line in failure.output.strip().splitlines()[-_COMPILER_LINES:]]
        said = "\n".join([f"the C kernels cannot be compiled: {failure.reason}", *lines])
        remedy = "set NIGHTHERD_CACHE to another folder"
        if failure.path is not None:
            remedy = f"install another compiler or set CXX; to try again: rm {failure.path}"
        return [Finding("compiler", "note", said, remedy, {**facts, "output": failure.output})]
    said = f"{compiler.name}: {version}, for kernels of level {kernels.level}"
    return [Finding("compiler", "ok", said, facts=facts)]


def _cuda_findings(torch: Mapping[str, Any]) -> list[Finding]:
    cards = _nvidia_smi()
    if torch["error"]:
        remedy = "see that the driver runs (nvidia-smi) and is new enough for this torch"
        return [Finding("device", "note", f"CUDA does not start: {torch['error']}", remedy)]
    if not torch["devices"] and cards:
        built = f"built for CUDA {torch['cuda']}" if torch["cuda"] else "built without CUDA"
        said = f"there are {len(cards)} NVIDIA cards, but torch {torch['version']} ({built}) "
        remedy = "install a torch that fits the driver, and see what CUDA_VISIBLE_DEVICES says"
        return [Finding("device", "note", f"{said}sees none", remedy)]
    found = []
    for device in torch["devices"]:
        free = next((card["free_bytes"] for card in cards if _same(card, device)), None)
        said = f"{device['name']}, {size(device['total_bytes'])}"
        said += "" if free is None else f", {size(free)} free"
        found.append(Finding("device", "ok", said, facts={**device, "free_bytes": free}))
    return found


def _same(card: Mapping[str, Any], device: Mapping[str, Any]) -> bool:
    return bool(device["uuid"]) and card["uuid"].removeprefix("GPU-") == device["uuid"]


def _nvidia_smi() -> list[dict[str, Any]]:
    """The cards that the driver lists, with their free memory; none if it does not answer."""
    command = ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=4, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [
        {"uuid": row[0], "free_bytes": int(row[1]) << 20}
        for row in rows
        if len(row) == 2 and row[1].isdecimal()
    ]


def check_checkpoint(key: str, facts: Mapping[str, Any]) -> list[Finding]:
    """Whether a worker here could load it: found, allowed, complete, supported, not too large."""
    report = facts.get("checkpoint")
    if report is None:
        said = f"{key}: not looked at, for that torch and transformers are needed"
        return [Finding("checkpoint", "problem", said, "see what `device` says")]
    more = f"nightherd checkpoint check {key}"
    found = [_split("problem", problem, more) for problem in report["problems"]]
    if not found:
        parts = [report["architecture"], report["stored_dtype"]]
        if report["context_length"]:
            parts.append(f"context {report['context_length']:,}")
        if report["size_bytes"]:
            parts.append(f"weights {size(report['size_bytes'])}")
        location = report["path"] or "on the Hub, not here: a worker downloads it first"
        said = f"{key}: {', '.join(filter(None, parts))}; {location}"
        found.append(Finding("checkpoint", "ok", said, facts=report))
    found.extend(_split("note", note, more) for note in report["notes"])
    return found


def _split(level: Level, line: str, remedy: str) -> Finding:
    """Lines about checkpoints end with what to do, after a `;`."""
    said, _, own = " ".join(line.split()).partition("; ")
    return Finding("checkpoint", level, said, own or remedy)
