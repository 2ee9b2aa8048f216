"""Reads docker-compose.yml, .env.example, Dockerfile and .dockerignore as Docker would."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parents[1]
PASSWORDS = {"POSTGRES_PASSWORD": "pgHush1", "REDIS_PASSWORD": "redisHush2"}

_VARIABLE = re.compile(
    r"\$(?:\$|(?P<bare>\w+)|\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\})"
)
_UNITS = {"s": 1, "m": 60, "h": 3600}


def example() -> dict[str, str]:
    """What .env.example sets, with passwords filled in."""
    given = dotenv_values(ROOT / ".env.example")
    return {name: value for name, value in {**given, **PASSWORDS}.items() if value is not None}


def example_names() -> set[str]:
    """All names in .env.example, those that are commented out included."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    return {found[1] for line in lines if (found := re.match(r"#?([A-Z_]+)=", line))}


def interpolated(value: Any, variables: Mapping[str, str], used: set[str] | None = None) -> Any:
    """The value with its `${…}` filled in; raises KeyError with the message of a `:?`."""
    if isinstance(value, dict):
        return {key: interpolated(item, variables, used) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, variables, used) for item in value]
    if not isinstance(value, str):
        return value

    def fill(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name = found["name"] or found["bare"]
        if used is not None:
            used.add(name)
        if variables.get(name):
            return variables[name]
        if found["kind"] == "?":
            raise KeyError(found["rest"])
        return found["rest"] or ""

    return _VARIABLE.sub(fill, value)


def load(variables: Mapping[str, str], used: set[str] | None = None) -> dict[str, Any]:
    """docker-compose.yml with its variables filled in."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = interpolated(yaml.safe_load(text), variables, used)
    return found


def seconds(duration: str) -> float:
    """`90`, from `1m30s`."""
    parts = re.findall(r"(\d+)([smh])", duration)
    assert "".join(number + unit for number, unit in parts) == duration, duration
    return float(sum(int(number) * _UNITS[unit] for number, unit in parts))


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and what they are given, lines joined, comments out."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    whole = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", whole)
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def image_environment() -> dict[str, str]:
    """The variables that the image sets."""
    pairs = [pair for word, rest in dockerfile() if word == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


def entrypoint() -> list[str]:
    (found,) = [rest for word, rest in dockerfile() if word == "ENTRYPOINT"]
    command: list[str] = json.loads(found)
    return command


def copied() -> list[str]:
    """The sources of COPY."""
    return [
        source for word, rest in dockerfile() if word == "COPY" for source in shlex.split(rest)[:-1]
    ]


def context_files() -> Iterator[Path]:
    """What .dockerignore lets through, of the files that git knows or would add."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if not ignored(name) and (ROOT / name).is_file():
            yield Path(name)


def ignored(name: str) -> bool:
    """Whether .dockerignore keeps a file out: the last pattern that fits it, or a folder above."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    out = False
    path = Path(name)
    candidates = [str(above) for above in (path, *path.parents) if above != Path(".")]
    for line in lines:
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep = pattern.startswith("!")
        if any(_fits(one, pattern.removeprefix("!")) for one in candidates):
            out = not keep
    return out


def _fits(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatchcase(path.rpartition("/")[2], pattern.removeprefix("**/"))
    assert "**" not in pattern, "teach this reader"
    # A star does not cross a slash.
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)
