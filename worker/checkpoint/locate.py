"""Where a checkpoint is: in a folder, in the cache, or only on the Hub. No torch."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from nightherd.catalogue import hub_name, local_folder
from nightherd.errors import CheckpointError
from worker.checkpoint.files import Folder, meta_format, weight_files
from worker.checkpoint.hub.cache import snapshot, usable_snapshot, write_ref
from worker.checkpoint.hub.download import download, missing_files
from worker.checkpoint.hub.repository import Repository, UnreachableError, look_up

log = logging.getLogger("nightherd.checkpoint")


def find(key: str) -> Path:
    """The folder of a checkpoint by its key; one on the Hub is downloaded, or found in the cache.

    Raises `CheckpointError` where it is missing, not allowed, or cannot be fetched.
    """
    found = locate(key)
    return download(found) if isinstance(found, Repository) else found.path


def locate(key: str) -> Folder | Repository:
    """The files of a checkpoint: a folder if all of it is on this machine, else the repository.

    What is in the cache is used when the Hub cannot be reached, or refuses this account.
    Raises `CheckpointError` where nothing is found.
    """
    path = local_folder(key)
    if path is not None:
        return _folder(path)
    name, revision = hub_name(key)
    meta = meta_format(key, ())
    if meta is not None:
        raise CheckpointError(meta)
    try:
        repository = look_up(name, revision)
    except CheckpointError as error:
        cached = usable_snapshot(name, revision)
        if cached is None:
            raise
        if not isinstance(error, UnreachableError):
            log.warning("%s; what is in the cache is used", error)
        return Folder(cached)
    weight_files(repository)
    if "config.json" not in repository.sizes:
        raise CheckpointError(f"checkpoint {repository.label} has no config.json")
    if missing_files(repository):
        return repository
    with contextlib.suppress(OSError):  # a cache that others fill
        write_ref(name, revision, repository.commit)
    return Folder(snapshot(name, repository.commit))


def _folder(path: Path) -> Folder:
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: no such folder")
    files = Folder(path)
    if "config.json" not in files.sizes:
        problem = meta_format(str(path), files.sizes)
        raise CheckpointError(problem or f"no checkpoint at {path}: it has no config.json")
    return files
