"""What `nightherd doctor` asks of this machine without torch: disks, memory, cores, software."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from nightherd import __version__
from nightherd.catalogue import hub_cache
from nightherd.machine import filesystem, memory, nearest_existing, size
from nightherd.settings import Settings
from producer.doctor.finding import Finding, Level

FEW_BYTES = 1 << 30
"""Free disk or memory below which it is worth a note."""
TOO_FEW_BYTES = 64 << 20
"""Free disk below which nothing sensible can be stored."""

WORKER_PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy")
"""What the extra `worker` brings."""
_OTHER_PACKAGES = ("tokenizers", "celery", "kombu", "redis", "sqlalchemy", "psycopg")

_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse.sshfs", "ceph", "lustre", "9p", "glusterfs")


# Disks.


def check_disk(settings: Settings) -> list[Finding]:
    """Room and rights in the data folder and in the cache of downloaded checkpoints."""
    needed = settings.database_url is None or settings.broker_url is None
    found = [_check_folder("the data folder", settings.home, needed, "NIGHTHERD_HOME")]
    kind = filesystem(settings.home)
    if settings.database_url is None and kind.startswith(_NETWORK_FILESYSTEMS):
        said = f"the data folder is on {kind}: SQLite's locks do not work over a network"
        remedy = "set NIGHTHERD_HOME to a local disk, or NIGHTHERD_DATABASE_URL to PostgreSQL"
        found.append(Finding("disk", "note", said, remedy))
    found.append(_check_folder("the Hugging Face cache", hub_cache(), False, "HF_HOME"))
    return found


def _check_folder(name: str, path: Path, needed: bool, setting: str) -> Finding:
    folder = nearest_existing(path)
    bad: Level = "problem" if needed else "note"
    remedy = f"make it writable, or set {setting} to another folder"
    if not folder.is_dir():
        return Finding("disk", bad, f"{name} {path}: {folder} is not a folder", remedy)
    room = os.statvfs(folder)
    free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    facts = {"path": str(path), "free_bytes": free, "total_bytes": total}
    said = f"{name} {path}: {size(free)} of {size(total)} free"
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("disk", bad, f"{name} {path}: {folder} cannot be written", remedy, facts)
    remedy = f"free some of it, or set {setting} to another disk"
    if free < TOO_FEW_BYTES or (room.f_files and not room.f_favail):
        return Finding("disk", bad, f"{said}: full", remedy, facts)
    if free < FEW_BYTES:
        return Finding("disk", "note", f"{said}: little", remedy, facts)
    return Finding("disk", "ok", said, facts=facts)


# Memory and cores, as the control groups of a container leave them.


def check_memory(root: Path = Path("/")) -> list[Finding]:
    """The memory that a worker here can have; `root` is for tests."""
    available, total = memory(root)
    facts = {"available_bytes": available, "total_bytes": total}
    said = f"{size(available)} of {size(total)} available"
    if available < FEW_BYTES:
        remedy = "end what needs it, or give the container more"
        return [Finding("memory", "note", f"{said}: little", remedy, facts)]
    return [Finding("memory", "ok", said, facts=facts)]


# Software.


def check_versions() -> list[Finding]:
    """Versions, without importing anything; and whether the extra `worker` is there."""
    facts = {"nightherd": __version__, "python": platform.python_version()}
    missing = []
    for name in (*WORKER_PACKAGES, *_OTHER_PACKAGES):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in WORKER_PACKAGES:
                missing.append(name)
    said = ", ".join(f"{name} {version}" for name, version in facts.items())
    found = [Finding("versions", "ok", said, facts=facts)]
    if missing:
        said = f"no worker can run here: {', '.join(missing)} not installed"
        remedy = "pip install 'nightherd[worker]'"
        found.append(Finding("versions", "problem", said, remedy, {"missing": missing}))
    return found
