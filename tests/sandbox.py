"""Commands as another user, and with a network of their own: what root may set up on one machine.

Root is never refused, so what a read-only folder does is seen as another user only. The interpreter
may lie where that user must not look (`/root`), so the mounts are private too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534

_MOUNT = """
set -e
if [ "$1" = net ]; then ip link set lo up; mount --bind "$2/hosts" /etc/hosts; fi
keep="$2"
shift 2
number=0
for path in "$@"; do
    mkdir "$keep/$number"
    mount --bind "${path#*:}" "$keep/$number"
    number=$((number + 1))
done
covered=
for path in "$@"; do
    case " $covered " in *" ${path%%:*} "*) ;; *)
        mount -t tmpfs -o mode=755 none "${path%%:*}"; covered="$covered ${path%%:*}";;
    esac
done
number=0
for path in "$@"; do
    mkdir -p "${path#*:}"
    mount --bind "$keep/$number" "${path#*:}"
    number=$((number + 1))
done
echo ready
exec cat
"""


class Sandbox:
    """Private mounts, and a private network if `hosts` are given: names of 127.0.0.1."""

    def __init__(self, folder: Path, hosts: Sequence[str]) -> None:
        self.folder = folder
        """World-readable; `home` in it belongs to the other user."""
        self.home = self.make("home")
        (folder / "hosts").write_text(f"127.0.0.1 {' '.join(('localhost', *hosts))}\n")
        namespaces = ["--mount", *(["--net"] if hosts else [])]
        kinds = "net" if hosts else "mounts"
        self._holder = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", _MOUNT, "sh", kinds, str(folder), *_closed()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            _, reason = self._holder.communicate()
            pytest.skip(f"this machine allows no namespaces: {reason.strip()}")
        self._enter = [
            *("nsenter", f"--target={self._holder.pid}", *namespaces, "setpriv"),
            *(f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
            *("--bounding-set=-all", "--no-new-privs"),
        ]

    def make(self, name: str, *, owner: int = NOBODY, mode: int = 0o755) -> Path:
        """A folder, by default the other user's own."""
        path = self.folder / name
        path.mkdir(parents=True)
        path.chmod(mode)
        os.chown(path, owner, owner)
        return path

    def disk(self, name: str, kilobytes: int) -> Path:
        """A small disk of its own, the other user's; only to be seen from inside."""
        path = self.make(name)
        options = f"size={kilobytes}k,uid={NOBODY},gid={NOBODY},mode=700"
        self._as_root("mount", "-t", "tmpfs", "-o", options, "none", str(path))
        return path

    def remount(self, name: str, option: str) -> None:
        self._as_root("mount", "-o", f"remount,{option}", str(self.folder / name))

    def _as_root(self, *command: str) -> None:
        inside = ["nsenter", f"--target={self._holder.pid}", "--mount"]
        subprocess.run([*inside, *command], check=True, capture_output=True)

    def command(self, *arguments: str | Path, folder: Path | None = None) -> list[str]:
        """The command, to be run as the other user in `folder` (by default `home`)."""
        inside = ["env", f"--chdir={folder or self.home}"]
        return [*self._enter, *inside, *map(str, arguments)]

    def run(
        self,
        *arguments: str | Path,
        environment: Mapping[str, str],
        folder: Path | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, folder=folder),
            env=dict(environment),
            **{
                "capture_output": True,
                "text": True,
                "timeout": 60,
                "check": False,
                **({} if "input" in options else {"stdin": subprocess.DEVNULL}),
                **options,
            },
        )

    def close(self) -> None:
        self._holder.communicate()


def _closed() -> list[str]:
    """`closed folder:path below it` for what the other user needs and could not reach."""
    found = []
    for path in dict.fromkeys((Path(sys.base_prefix), Path(sys.prefix), ROOT)):
        for parent in reversed(path.resolve().parents):
            if not parent.stat().st_mode & 0o001:
                found.append(f"{parent}:{path.resolve()}")
                break
    return found


@contextmanager
def sandbox(*hosts: str) -> Iterator[Sandbox]:
    """A sandbox; skips the test where it cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("only root can run a command as another user")
    for program in ("unshare", "nsenter", "setpriv", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = Path(tempfile.mkdtemp(prefix="nightherd-sandbox-"))
    folder.chmod(0o755)
    try:
        made = Sandbox(folder, hosts)
        try:
            yield made
        finally:
            made.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
