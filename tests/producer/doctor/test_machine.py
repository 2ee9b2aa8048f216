"""What doctor sees of a machine: control groups, disks, software."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nightherd.machine import cores, filesystem, memory, size
from nightherd.settings import Settings
from producer.doctor import machine
from producer.doctor.finding import Finding, Probe

GB = 1 << 30


def write(root: Path, files: dict[str, str | int]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 64 GB, of which 48 are available."""
    write(tmp_path, {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {48 << 20} kB"})
    return tmp_path


def test_memory_of_a_machine_without_control_groups(root: Path) -> None:
    assert memory(root) == (48 * GB, 64 * GB)


def test_memory_of_a_container(root: Path) -> None:
    """Version 2: its own group's limit, without what the page cache could give back."""
    group = "sys/fs/cgroup/pod/box"
    write(
        root,
        {
            "proc/self/cgroup": "0::/pod/box",
            "sys/fs/cgroup/pod/memory.max": 16 * GB,
            "sys/fs/cgroup/pod/memory.current": 9 * GB,
            "sys/fs/cgroup/pod/memory.stat": "anon 5\ninactive_file 0",
            f"{group}/memory.max": 8 * GB,
            f"{group}/memory.current": 5 * GB,
            f"{group}/memory.stat": f"anon 5\ninactive_file {2 * GB}",
            f"{group}/cpu.max": "150000 100000",
        },
    )
    assert memory(root) == (5 * GB, 8 * GB)
    assert cores(root)[0] == min(1.5, len(os.sched_getaffinity(0)))


def test_a_group_above_may_allow_less(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "0::/pod/box",
            "sys/fs/cgroup/pod/memory.max": 4 * GB,
            "sys/fs/cgroup/pod/memory.current": 3 * GB,
            "sys/fs/cgroup/pod/box/memory.max": "max",
            "sys/fs/cgroup/pod/box/memory.current": GB,
        },
    )
    assert memory(root) == (GB, 4 * GB)


def test_memory_in_version_1_with_the_path_of_the_host(root: Path) -> None:
    """In a container its own group is mounted at the top, under the name that the host has."""
    write(
        root,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 2 * GB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": GB,
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GB // 2}",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": 50000,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        },
    )
    assert memory(root) == (3 * GB // 2, 2 * GB)
    assert cores(root)[0] == 0.5


def test_no_limit_in_version_1_is_a_large_number(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "4:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": GB,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        },
    )
    assert memory(root) == (48 * GB, 64 * GB)
    assert cores(root)[0] == len(os.sched_getaffinity(0))


def test_little_memory_is_a_note(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 2000000 kB\nMemAvailable: 500000 kB"})
    (found,) = machine.check_memory(tmp_path)
    assert (found.level, found.facts["available_bytes"]) == ("note", 512_000_000)


def test_this_machine() -> None:
    available, total = memory()
    assert 0 < available <= total
    usable, everywhere = cores()
    assert 0 < usable <= everywhere
    assert filesystem(Path("/proc")) == "proc"


class Disk:
    """What `os.statvfs` says, in blocks of 4 kB."""

    f_frsize = 4096
    f_blocks = 10 * GB // 4096
    f_files = 1000

    def __init__(self, free: int, files: int = 500) -> None:
        self.f_bavail = free // 4096
        self.f_favail = files


@pytest.mark.parametrize(
    ("disk", "level"),
    [
        (Disk(5 * GB), "ok"),
        (Disk(GB // 2), "note"),
        (Disk(1 << 20), "problem"),
        (Disk(5 * GB, files=0), "problem"),
    ],
    ids=["room", "little", "full", "no inodes"],
)
def test_room_on_disks(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, disk: Disk, level: str
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _path: disk)
    data, cache = machine.check_disk(make_settings())
    assert data.level == level
    assert cache.level == ("note" if level == "problem" else level)
    elsewhere = make_settings(database_url="postgresql://db/x", broker_url="redis://r/0")
    assert machine.check_disk(elsewhere)[0].level == cache.level, "nothing is stored there"


def test_a_data_folder_that_is_a_file(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    (tmp_path / "home").write_text("")
    found = machine.check_disk(make_settings())[0]
    assert found.level == "problem"
    assert "not a folder" in found.what
    assert "NIGHTHERD_HOME" in str(found.remedy)


def test_sqlite_on_a_network_disk(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "filesystem", lambda _path: "nfs4")
    assert [found.level for found in machine.check_disk(make_settings())] == ["ok", "note", "ok"]


def test_a_missing_extra_says_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in machine.WORKER_PACKAGES:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    first, second = machine.check_versions()
    assert "torch" not in first.facts
    assert (second.level, second.remedy) == ("problem", "pip install 'nightherd[worker]'")


def test_the_extra_is_the_one_of_the_project() -> None:
    import tomllib

    project = Path(__file__).parents[3] / "pyproject.toml"
    extra = tomllib.loads(project.read_text())["project"]["optional-dependencies"]["worker"]
    names = {line.partition(">")[0].replace("-", "_") for line in extra}
    assert set(machine.WORKER_PACKAGES) <= names


def test_sizes_in_words() -> None:
    assert [size(n) for n in (0, 999, 1500, 7.1e9, 2e12)] == [
        *("0 B", "999 B", "1.5 kB"),
        *("7.1 GB", "2.0 TB"),
    ]


def test_a_check_that_hangs_or_falls_over_is_a_finding() -> None:
    import threading

    never = threading.Event()

    def hang() -> list[Finding]:
        never.wait()
        return []

    def fall() -> list[Finding]:
        raise RuntimeError("two\nlines")

    (found,) = Probe("disk", hang, seconds=0.1).findings()
    never.set()
    assert (found.level, found.what) == ("problem", "no answer within 0.1 s")
    (found,) = Probe("disk", fall).findings()
    assert (found.level, found.what) == ("problem", "the check failed: RuntimeError: two lines")
    assert found.remedy
