"""What `nightherd doctor` asks of this machine without torch: disks, memory, cores, software."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from nightherd import __version__
from nightherd.catalogue import hub_cache
from nightherd.settings import Settings
from producer.findings import Finding, Level

FEW_BYTES = 1 << 30
"""Free disk or memory below which it is worth a note."""
TOO_FEW_BYTES = 64 << 20
"""Free disk below which nothing sensible can be stored."""

WORKER_PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy")
"""What the extra `worker` brings."""
_OTHER_PACKAGES = ("tokenizers", "celery", "kombu", "redis", "sqlalchemy", "psycopg")

_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse.sshfs", "ceph", "lustre", "9p", "glusterfs")
_NO_LIMIT = 1 << 60
"""cgroups say `no limit` by a number of this size or more."""


# Disks.


def check_disk(settings: Settings) -> list[Finding]:
    """Room and rights in the data folder and in the cache of downloaded checkpoints."""
    needed = settings.database_url is None or settings.broker_url is None
    found = [_place("the data folder", settings.home, needed, "NIGHTHERD_HOME")]
    kind = filesystem(settings.home)
    if settings.database_url is None and kind.startswith(_NETWORK_FILESYSTEMS):
        said = f"the data folder is on {kind}: SQLite's locks do not work over a network"
        remedy = "set NIGHTHERD_HOME to a local disk, or NIGHTHERD_DATABASE_URL to PostgreSQL"
        found.append(Finding("disk", "note", said, remedy))
    found.append(_place("the Hugging Face cache", hub_cache(), False, "HF_HOME"))
    return found


def existing(path: Path) -> Path:
    """The path itself, or the nearest thing above it that exists."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))


def _place(name: str, path: Path, needed: bool, setting: str) -> Finding:
    folder = existing(path)
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


def filesystem(path: Path) -> str:
    """The type of the file system that a path is on, as `ext4`; empty where nobody tells."""
    kind, longest = "", -1
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="replace")
    except OSError:
        return ""
    real = existing(path).resolve()
    for line in mounts.splitlines():
        _, point, name, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if real.is_relative_to(point) and len(point) >= longest:
            kind, longest = name, len(point)
    return kind


def size(count: float) -> str:
    """Bytes in words: `12.3 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


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


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes available and in all: the least that the machine or a control group allows."""
    known = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        known[name] = int(value.split()[0]) * 1024 if value.split() else 0
    available, total = known["MemAvailable"], known["MemTotal"]
    for folder in _groups(root, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is None or used is None or limit >= min(_NO_LIMIT, total):
            continue
        # What the page cache holds and nobody uses is given back when memory is short.
        statistics = _read(folder / "memory.stat").split()
        cache = dict(zip(statistics[::2], statistics[1::2], strict=False))
        idle = int(cache.get("total_inactive_file", cache.get("inactive_file", 0)))
        total = limit
        available = min(available, max(0, limit - used + idle))
    return available, total


def cores(root: Path = Path("/")) -> tuple[float, int]:
    """Cores that this process may use, and those of the machine."""
    everywhere = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere)
    for folder in _groups(root, "cpu"):
        quota, period, *_ = (*_read(folder / "cpu.max").split(), "", "")
        quota = quota or _read(folder / "cpu.cfs_quota_us").strip()
        period = period or _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(period):
            usable = min(usable, int(quota) / int(period))
    return usable, everywhere


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process' control group for a controller, and of those above it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers:
            mount /= controller  # version 1
        if controller not in (controllers or controller).split(","):
            continue
        # In a container the path may be that on the host, and its own group stands at the top.
        own = mount / path.strip("/")
        folders = [place for place in (own, *own.parents) if place.is_relative_to(mount)]
        return [place for place in folders if place.is_dir()]
    return []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(*paths: Path) -> int | None:
    """The number in the first of these files that is there; None for none, or for `max`."""
    text = next((found for path in paths if (found := _read(path).strip())), "")
    return int(text) if text.isdecimal() else None


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
