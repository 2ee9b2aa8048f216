"""Tells the machine's card and versions, and installs the wheels that wheels.txt lists."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common import ROOT, Result, Stopped, out_folder, say

FOLDER = ROOT / ".whl"
LIST = Path(__file__).with_name("wheels.txt")
MAX_WHEEL_BYTES = 24 << 20
"""Of all wheels, at most: they are sent with the repository, for which there is little room."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--site", type=Path, required=True, help="where to install them")
    parser.add_argument("--wheels", type=Path, default=FOLDER)
    parser.add_argument("--dry", action="store_true", help="no card, and nothing is installed")
    given = parser.parse_args()
    made = Result(out_folder() / "prepare.json", {"script": "prepare", "site": str(given.site)})
    try:
        made["python"] = platform.python_version()
        made |= {} if given.dry else card()
        for package in ("torch", "triton", "transformers", "pytest", "pytest-xdist"):
            made[package] = _version(package)
        say(", ".join(f"{name} {made[name]}" for name in ("card", "driver") if name in made))
        say(f"Python {made['python']}, torch {made['torch']}, triton {made['triton']}, "
            f"transformers {made['transformers']}")  # fmt: skip
        if not given.dry and "card" not in made:
            raise Stopped("no card here; --dry tries everything on a CPU")
        wheels = checked_wheels(given.wheels, LIST.read_text())
        made["wheels"] = len(wheels)
        if wheels and not given.dry:
            install(wheels, given.site)
    except Stopped as error:
        made["stopped"] = str(error)
        say(f"STOP: {error}")
        raise
    finally:
        made.save()


def card() -> dict[str, str | int]:
    """The card's name, bytes of memory and driver; empty where there is no card."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=name,memory.total,driver_version"]
        answer = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=False
        )
        fields = [field.strip() for field in answer.stdout.partition("\n")[0].split(",")]
        if answer.returncode == 0 and len(fields) == 3 and fields[1].isdigit():
            return {"card": fields[0], "memory_bytes": int(fields[1]) << 20, "driver": fields[2]}
    import torch

    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    return {"card": found.name, "memory_bytes": found.total_memory, "driver": "not told"}


def checked_wheels(folder: Path, listed: str) -> list[Path]:
    """The wheels of a folder; raises `Stopped` where they are not those that are listed."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        if not importlib.util.find_spec("pydantic"):
            raise Stopped(f"no wheels in {folder.name}, and pydantic is not here: see README.md")
        say(f"no wheels in {folder.name}: what is needed is here already")
        return []
    why = wheel_problem(wheels, listed)
    if why is not None:
        raise Stopped(f"{folder.name} is not what {LIST.name} lists: {why}")
    say(f"{len(wheels)} wheels, as {LIST.name} lists them")
    return wheels


def install(wheels: list[Path], site: Path) -> None:
    """Into a folder, unless they are there from a call before; raises `Stopped`."""
    stamp, names = site / ".wheels", "\n".join(wheel.name for wheel in wheels)
    if stamp.is_file() and stamp.read_text() == names:
        return
    shutil.rmtree(site, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    given = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run([*pip, *given, *map(str, wheels)], env=environment, check=False).returncode:
        raise Stopped("pip cannot install the wheels: its error is above")
    stamp.write_text(names)


def wheel_problem(wheels: list[Path], listed: str, limit: int = MAX_WHEEL_BYTES) -> str | None:
    """What is missing, what is not listed, how much too heavy all of it is; None if all is well."""
    wanted = dict(map(_parse_pin, _pins(listed)))
    there = [_parse_file_name(wheel.name) for wheel in wheels]
    missing = [f"{name} {number}" for name, number in wanted.items() if (name, number) not in there]
    extra = [wheel.name for wheel in wheels if _parse_file_name(wheel.name) not in wanted.items()]
    said = []
    if missing:
        said.append(f"missing {_first_five(missing)}")
    if extra:
        said.append(f"not listed {_first_five(extra)}")
    if len(there) != len(set(there)):
        said.append("some twice")
    weight = sum(wheel.stat().st_size for wheel in wheels)
    if weight > limit:
        said.append(f"{weight / 2**20:.1f} MiB, more than {limit / 2**20:.0f} MiB")
    return "; ".join(said) or None


def _first_five(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _pins(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]


def _parse_pin(line: str) -> tuple[str, str]:
    name, _, number = line.partition("==")
    return _normalized_name(name), number


def _parse_file_name(name: str) -> tuple[str, str]:
    """Package and version of a wheel's file name."""
    package, number, *_ = name.split("-")
    return _normalized_name(package), number


def _normalized_name(name: str) -> str:
    """As the package index compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
