"""What this machine has, as the control groups of a container leave it: disks, memory, cores."""

from __future__ import annotations

import os
from pathlib import Path

_NO_LIMIT = 1 << 60
"""Version 1 of cgroups writes `no limit` as a number of this size or more."""


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest thing above it that exists."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))


def filesystem(path: Path) -> str:
    """The type of the file system that a path is on, as `ext4`; empty where that is unknown."""
    kind, longest = "", -1
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="replace")
    except OSError:
        return ""
    real = nearest_existing(path).resolve()
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


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes available and in all: the least that the machine or a control group allows."""
    meminfo = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        meminfo[name] = int(value.split()[0]) * 1024 if value.split() else 0
    available, total = meminfo["MemAvailable"], meminfo["MemTotal"]
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is None or used is None or limit >= min(_NO_LIMIT, total):
            continue
        # The inactive part of the page cache is reclaimed when memory is short.
        statistics = _read(folder / "memory.stat").split()
        cache = dict(zip(statistics[::2], statistics[1::2], strict=False))
        idle = int(cache.get("total_inactive_file", cache.get("inactive_file", 0)))
        total = limit
        available = min(available, max(0, limit - used + idle))
    return available, total


def cores(root: Path = Path("/")) -> tuple[float, int]:
    """Cores that this process may use, and those of the machine."""
    all_cores = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_cores)
    for folder in _cgroup_folders(root, "cpu"):
        quota, period, *_ = (*_read(folder / "cpu.max").split(), "", "")
        quota = quota or _read(folder / "cpu.cfs_quota_us").strip()
        period = period or _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(period):
            usable = min(usable, int(quota) / int(period))
    return usable, all_cores


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The folders of this process' control group for a controller, and of those above it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers:
            mount /= controller  # version 1
        if controller not in (controllers or controller).split(","):
            continue
        # In a container the path may be that on the host, and its own group stands at the top.
        own = mount / group.strip("/")
        folders = [path for path in (own, *own.parents) if path.is_relative_to(mount)]
        return [folder for folder in folders if folder.is_dir()]
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
