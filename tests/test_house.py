"""The house: a name stands once, or where nobody confuses it."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("nightherd", "models", "migrations", "producer", "worker")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "scripts")


def sources(folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_a_file_name_stands_twice_at_most() -> None:
    named: dict[str, list[str]] = defaultdict(list)
    for path in sources(FOLDERS):
        if path.stem not in ("__init__", "base", "conftest"):
            named[path.name].append(str(path.relative_to(ROOT)))
    assert len(named) > 200
    assert [paths for paths in named.values() if len(paths) > 2] == []


def test_a_class_name_stands_once() -> None:
    named: dict[str, list[str]] = defaultdict(list)
    for path in sources(PACKAGES):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                named[node.name].append(str(path.relative_to(ROOT)))
    assert len(named) > 150
    assert {name: paths for name, paths in named.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_says_what_it_holds(package: str) -> None:
    """Its `__init__.py` has a docstring and, but for `models`, nothing to import from it."""
    for init in (ROOT / package).rglob("__init__.py"):
        if init.parent.name == "versions":
            continue
        tree = ast.parse(init.read_text("utf-8"))
        assert ast.get_docstring(tree), init.relative_to(ROOT)
        if package not in ("models", "nightherd"):
            assert len(tree.body) == 1, f"{init.relative_to(ROOT)} re-exports"


def test_a_folder_without_modules_is_no_room() -> None:
    for package in PACKAGES:
        for init in (ROOT / package).rglob("__init__.py"):
            assert list(init.parent.rglob("[!_]*.py")), init.relative_to(ROOT)


def test_what_contributing_names_exists() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    folder = ROOT
    named = 0
    for name in re.findall(r"`([\w./]+\.(?:py|cpp|md|yml|mako)|[\w./]+/)`", page):
        if name.startswith("migrations/versions/NNNN"):
            continue
        # A name without a folder is beside the one before it, or at the top.
        places = [ROOT / name] if "/" in name.rstrip("/") else [folder / name, ROOT / name]
        found = [place for place in places if place.exists()]
        assert found, name
        folder = found[0] if found[0].is_dir() else found[0].parent
        named += 1
    assert named > 40
    code = "\n".join(path.read_text("utf-8") for path in sources(PACKAGES))
    for name in set(re.findall(r"`([A-Z]\w+)`", page)):
        assert re.search(rf"\b{name}\b", code), name
