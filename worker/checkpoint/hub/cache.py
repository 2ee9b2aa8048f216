"""The cache that all Hugging Face programs of a user share: where things are, what is there.

::

    models--org--name/blobs/<hash>            a file's content, named by what the Hub calls its ETag
    models--org--name/snapshots/<commit>/…    links to blobs, under the files' own names
    models--org--name/refs/<revision>         the commit that a branch or tag stood for
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from nightherd.errors import CheckpointError
from worker.checkpoint.files import Folder, weight_files

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder() -> Path:
    return Path(constants.HF_HUB_CACHE).expanduser()


def storage(name: str) -> Path:
    """The folder of a repository."""
    return cache_folder() / ("models--" + name.replace("/", "--"))


def commit_of(name: str, revision: str) -> str | None:
    """The commit that a revision stood for when it was last fetched; None if it never was."""
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        return (storage(name) / "refs" / revision).read_text().strip() or None
    except OSError:
        return None


def snapshot(name: str, commit: str) -> Path:
    """The folder of a commit, whether it is there or not."""
    return storage(name) / "snapshots" / commit


def usable_snapshot(name: str, revision: str) -> Path | None:
    """The folder of a revision that is in the cache with its config and all its weights."""
    commit = commit_of(name, revision)
    if commit is None:
        return None
    folder = snapshot(name, commit)
    return folder if _problem(folder) is None else None


def _problem(folder: Path) -> str | None:
    try:
        files = Folder(folder)
        if "config.json" not in files.sizes:
            return "it has no config.json"
        weight_files(files)
    except CheckpointError as error:
        return str(error)
    return None


def write_ref(name: str, revision: str, commit: str) -> None:
    """Notes what commit a branch or tag stands for."""
    if _COMMIT.fullmatch(revision) or commit_of(name, revision) == commit:
        return
    path = storage(name) / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(commit)
    new.replace(path)


def link(blob: Path, pointer: Path) -> None:
    """Makes a blob appear in a snapshot; moves it there where the disk knows no links."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        pointer.unlink()
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except FileExistsError:
        pass  # another process was quicker
    except OSError:
        blob.replace(pointer)


def content_hash(path: Path, etag: str, progress: Callable[[int], None]) -> str | None:
    """A file's hash of the kind that its ETag is: sha256, or git's; None for other ETags."""
    if _SHA256.fullmatch(etag):
        digest = hashlib.sha256()
    elif _COMMIT.fullmatch(etag):
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return None
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def remove(pointer: Path) -> None:
    """Deletes a file of a snapshot, and the blob that it leads to."""
    with contextlib.suppress(OSError):
        blob = pointer.resolve()
        if blob != pointer and blob.parent.name == "blobs":
            blob.unlink()
    with contextlib.suppress(FileNotFoundError):
        pointer.unlink()


@dataclass(frozen=True, slots=True)
class CachedCheckpoint:
    """A commit of a repository in the cache."""

    name: str
    commit: str
    revisions: tuple[str, ...]
    """Branches and tags that led here when they were last fetched."""
    path: Path
    files: int
    size_bytes: int
    last_used: float
    """Seconds since the epoch, as far as the disk notes when a file is read."""
    problem: str | None
    """Why no worker can serve it as it is."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The checkpoint keys under which jobs may ask for it."""
        return tuple(f"{self.name}@{one}" for one in (*self.revisions, self.commit))


def cached_checkpoints() -> list[CachedCheckpoint]:
    """All models in the cache, by name; reads no file, only their sizes and times."""
    found = []
    for folder in sorted(cache_folder().glob("models--*")):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        references = _references(folder / "refs")
        for path in sorted((folder / "snapshots").glob("*")):
            if path.is_dir():
                found.append(_cached(name, path, references))
    return found


def _references(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith(".new"):
            commit = path.read_text().strip()
            found.setdefault(commit, []).append(str(path.relative_to(folder)))
    return found


def _cached(name: str, folder: Path, references: dict[str, list[str]]) -> CachedCheckpoint:
    stats = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                stats.append(path.stat())
    return CachedCheckpoint(
        name=name,
        commit=folder.name,
        revisions=tuple(references.get(folder.name, ())),
        path=folder,
        files=len(stats),
        size_bytes=sum(stat.st_size for stat in stats),
        last_used=max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=0.0),
        problem=_problem(folder),
    )


def as_json(cached: CachedCheckpoint, workers: list[str]) -> dict[str, Any]:
    return {
        "name": cached.name,
        "revisions": list(cached.revisions),
        "commit": cached.commit,
        "path": str(cached.path),
        "files": cached.files,
        "size_bytes": cached.size_bytes,
        "last_used": cached.last_used,
        "problem": cached.problem,
        "workers": workers,
    }
