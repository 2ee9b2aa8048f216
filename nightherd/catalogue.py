"""Names of checkpoints: what a user may write, and the key under which jobs and workers meet.

A key is `demo`, an absolute path, or `org/name@revision` for a repository on the Hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nightherd.errors import CheckpointError

DEMO = "demo"
DEMO_PATH = Path(__file__).parent / "checkpoints" / DEMO
"""The tiny LLaMA that ships with the package."""

DEFAULT_REVISION = "main"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def checkpoint_key(name: str, revision: str | None = None) -> str:
    """The key of a checkpoint given as `demo`, a folder, or `org/name`; a key is its own key.

    A folder is meant by anything that begins with `/`, `./`, `../` or `~`, and by any other name
    (but `demo`) that is a folder here; its key is its absolute path without symbolic links.
    Raises `CheckpointError` where there is no such folder, or the name can mean nothing.
    """
    if name == DEMO:
        _refuse_revision(name, revision)
        return DEMO
    try:
        folder = Path(name).expanduser()
    except RuntimeError:
        raise CheckpointError(f"no checkpoint at {name}: no such home folder") from None
    if name and folder.is_dir():
        _refuse_revision(name, revision)
        return str(folder.resolve())
    if name.startswith(("/", "./", "../", "~")) or name in (".", ".."):
        problem = "not a folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"no checkpoint at {folder.absolute()}: {problem}")
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"no checkpoint {name!r}: give {DEMO}, the path of a folder, or the name of a "
            "repository on the Hub as org/name"
        )
    written = match["revision"]
    if revision is not None and written is not None and revision != written:
        raise CheckpointError(f"two revisions for one checkpoint: {name} and {revision}")
    return f"{match['name']}@{revision or written or DEFAULT_REVISION}"


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise CheckpointError(f"{name} is a folder and has no revision {revision!r}")


def local_folder(key: str) -> Path | None:
    """The folder of a key, None where it names a repository on the Hub."""
    if key == DEMO:
        return DEMO_PATH
    return Path(key) if key.startswith("/") else None


def hub_name(key: str) -> tuple[str, str]:
    """`(repository, revision)` of a key that names a repository on the Hub."""
    name, _, revision = key.partition("@")
    return name, revision or DEFAULT_REVISION


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads, by its own rules."""
    own = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if own:
        return Path(own).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(home).expanduser() / "hub"


def cached_folder(key: str) -> Path | None:
    """The folder on this machine with a key's configuration and tokenizer; None if there is none.

    It downloads nothing. For a repository on the Hub it is the commit in the cache that the
    revision stood for when it was last fetched here.
    """
    folder = local_folder(key)
    if folder is None:
        name, revision = hub_name(key)
        repository = hub_cache() / f"models--{name.replace('/', '--')}"
        commit = revision
        if not _COMMIT.fullmatch(revision):
            try:
                commit = (repository / "refs" / revision).read_text("utf-8").strip()
            except (OSError, ValueError):
                return None
        folder = repository / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None
