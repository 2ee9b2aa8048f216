"""Compiles the C kernels on the machine that runs them, once for each level of CPUs.

The library's file is named by a hash of all that it is made of, written under another name and
renamed, so that any number of workers may start at once and a kill never leaves half a library.
What failed is remembered under the same name, and not tried again until one of these changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.engine.cpu.level import FEATURES, Level, cpu_level, x86

log = logging.getLogger("nightherd.kernels")

SOURCES = Path(__file__).parent / "kernels"
COMPILERS = ("c++", "g++", "clang++")
NO_COMPILER = f"no C++ compiler ({', '.join(COMPILERS)}) in PATH"
REMEDY = "apt-get install g++, or pip install 'nightherd[compiler]'"
COMPILE_SECONDS = 300.0
_FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-fno-math-errno", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"),
)
_MAX_PARALLEL = 2
"""Files that are compiled side by side, where there are cores: each takes up to 270 MB."""
_POLL_SECONDS = 0.02
_GROUP = 'exec 3<&0; { read -r _ <&3; kill -KILL 0; } & exec 3<&-; exec "$@" </dev/null'
"""Runs a command in a process group that is killed when its standard input closes, and so when this
process has ended, however it did."""


class LibraryError(Exception):
    """The kernels cannot be compiled or loaded; the message says why, on one line."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler."""

    command: tuple[str, ...]
    facts: tuple[object, ...]
    """Its identity: another compiler or version has other facts."""
    zig: bool = False

    @property
    def name(self) -> str:
        return "zig" if self.zig else self.command[0]

    def target(self, level: Level) -> list[str]:
        """The compiler's flags for a level."""
        if self.zig:
            base = "x86_64" if x86() else "baseline"
            features = (feature.replace("-", "_") for feature in FEATURES[level])
            return ["-mcpu=" + "+".join((base, *features))]
        base_flags = ["-march=x86-64"] if x86() else []
        return base_flags + [f"-m{feature}" for feature in FEATURES[level]]


def find_compiler() -> Compiler | None:
    """`CXX` if it is set, else the first of the usual names in PATH, else PyPI's `ziglang`."""
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        found = shutil.which(name)
        if found is not None:
            stat = os.stat(found)
            return Compiler((found,), (found, stat.st_size, stat.st_mtime_ns))
    if importlib.util.find_spec("ziglang") is not None:
        version = importlib.metadata.version("ziglang")
        return Compiler((sys.executable, "-P", "-m", "ziglang"), ("ziglang", version), zig=True)
    return None


@dataclass(frozen=True, slots=True)
class CpuKernels:
    """The kernels of one level, and the folder that their library is in, or will be."""

    folder: Path
    level: Level

    @staticmethod
    def here(folder: Path, level: Level | None = None) -> CpuKernels:
        """Those for this machine, or for a level below its own."""
        return CpuKernels(folder, cpu_level(level))

    def library(self) -> Path:
        """The library's file, compiled if it is not there; raises `LibraryError`."""
        if self in _pending_errors:
            raise _pending_errors.pop(self)
        compiler = find_compiler()
        if compiler is None:
            raise LibraryError(f"{NO_COMPILER}; {REMEDY}")
        target = self._target(compiler)
        if target.exists():
            return target
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                if not target.exists():
                    self._raise_known_failure(target)
                    _compile(compiler, self.level, target)
        except OSError as error:
            raise LibraryError(
                f"{self.folder} cannot be written: {error.strerror or error}; set NIGHTHERD_CACHE "
                "to another folder"
            ) from None
        return target

    def prepare(self) -> None:
        """Compiles the library if need be; the next `library` raises the error if that fails."""
        try:
            self.library()
        except LibraryError as error:
            _pending_errors[self] = error

    def failure(self) -> Failure | None:
        """Why there can be no library, as far as is known without compiling; else None."""
        compiler = find_compiler()
        if compiler is None:
            return Failure(NO_COMPILER)
        target = self._target(compiler)
        if target.exists():
            return None
        if self.folder.exists() and not os.access(self.folder, os.W_OK):
            return Failure(f"{self.folder} cannot be written")
        return _known_failure(target)

    def _target(self, compiler: Compiler) -> Path:
        name = f"kernels-{self.level}-{fingerprint(compiler, self.level)}"
        return self.folder / f"{name}.so"

    def _raise_known_failure(self, target: Path) -> None:
        known = _known_failure(target)
        if known is not None:
            raise LibraryError(f"{known.reason} (tried before; to try again remove {known.path})")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """A lock between processes: one compiles at a time. It ends with its holder's process."""
        with (self.folder / "compile.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process that compiles the kernels")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


_pending_errors: dict[CpuKernels, LibraryError] = {}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a library could not be made."""

    reason: str
    """On one line."""
    path: Path | None = None
    """The file that remembers it; None for a missing compiler."""
    output: str = ""
    """The compiler's output."""


def _failure_file(target: Path) -> Path:
    return target.with_suffix(".failed.json")


def _known_failure(target: Path) -> Failure | None:
    path = _failure_file(target)
    try:
        fields = json.loads(path.read_text())
        return Failure(str(fields["reason"]), path, str(fields["output"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fingerprint(compiler: Compiler, level: Level) -> str:
    """A hash of sources, flags, compiler and level, on which a library or a failure depends."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    for fact in (*_FLAGS, *compiler.target(level), *compiler.facts, os.uname().machine):
        digest.update(f"\0{fact}".encode())
    return digest.hexdigest()[:16]


def _compile(compiler: Compiler, level: Level, target: Path) -> None:
    """Makes the library; what fails is remembered beside it."""
    for stale in target.parent.glob("compile-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    log.info("compiling the kernels for this CPU (%s), once (about 10 s)", level)
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="compile-") as folder:
            made = _build(compiler, level, Path(folder))
            made.replace(target)
    except _CompilerError as error:
        if error.permanent:
            text = json.dumps({"reason": error.reason, "output": error.output})
            _failure_file(target).write_text(text)
        raise LibraryError(error.reason) from None
    _failure_file(target).unlink(missing_ok=True)
    log.info("compiled the kernels in %.1f s: %s", time.monotonic() - started, target)


class _CompilerError(Exception):
    def __init__(self, reason: str, output: str, *, permanent: bool = True) -> None:
        self.reason = reason
        self.output = output
        self.permanent = permanent
        """Whether it would fail again."""


_TRANSIENT = (
    "No space left",
    "quota exceeded",
    "Killed",
    "Cannot allocate memory",
    "out of memory",
)


def _build(compiler: Compiler, level: Level, folder: Path) -> Path:
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    made = folder / "kernels.so"
    command = [*compiler.command, *(["c++"] if compiler.zig else ())]
    command += [*_FLAGS, *compiler.target(level)]
    environment = {**os.environ, "TMPDIR": str(folder), "LC_ALL": "C"}
    link = [*command, "-shared", *map(str, objects), "-o", str(made)]
    if compiler.zig:
        # Its own C++ library would have to be compiled first, for a minute: the system's does,
        # which torch needs too.
        environment |= {name: str(folder / "zig") for name in _ZIG_CACHES}
        libraries = map(str, _system_libraries())
        link = [*compiler.command, "ld.lld", "-shared", *map(str, objects), *libraries]
        link += ["-o", str(made)]
    each = [
        [*command, "-c", str(source), "-o", str(made_of)]
        for source, made_of in zip(sources, objects, strict=True)
    ]
    deadline = time.monotonic() + COMPILE_SECONDS
    _run(compiler, each, environment, deadline, folder)
    _run(compiler, [link], environment, deadline, folder)
    return made


_ZIG_CACHES = ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")


def _system_libraries() -> Iterator[Path]:
    """libstdc++ and libgcc_s as the system has them; raises `_CompilerError`."""
    import ctypes

    for name in ("libstdc++.so.6", "libgcc_s.so.1"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
        maps = Path("/proc/self/maps").read_text().splitlines()
        # The name is mostly a link: what is mapped has the whole version.
        paths = [line.split(maxsplit=5)[5] for line in maps if f"/{name}" in line]
        if not paths:
            raise _CompilerError(f"{name} is not on this machine", "")
        yield Path(paths[0])


def _run(
    compiler: Compiler,
    commands: Sequence[Sequence[str]],
    environment: dict[str, str],
    deadline: float,
    folder: Path,
) -> None:
    """Runs commands, some at a time, each in a process group that is killed whole in the end."""
    waiting = list(commands)
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    limit = min(_MAX_PARALLEL, len(os.sched_getaffinity(0)))
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                output = folder / f"output-{len(waiting)}"
                running.append((_start(waiting.pop(0), environment, output), output))
            for process, output in list(running):
                code = process.poll()
                if code is None:
                    continue
                running.remove((process, output))
                _kill(process)
                if code != 0:
                    raise _compile_error(compiler, code, output.read_text(errors="replace"))
            if time.monotonic() > deadline:
                raise _CompilerError(
                    f"{compiler.name} takes more than {COMPILE_SECONDS:g} s for the kernels", ""
                )
            time.sleep(_POLL_SECONDS)
    finally:
        for process, _ in running:
            _kill(process)


def _start(command: Sequence[str], environment: Any, output: Path) -> subprocess.Popen[bytes]:
    try:
        with output.open("wb") as file:
            return subprocess.Popen(
                ["/bin/sh", "-c", _GROUP, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise _CompilerError(f"{command[0]} does not run: {error}", "", permanent=False) from None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a command's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _compile_error(compiler: Compiler, code: int, output: str) -> Exception:
    lines = [line.strip() for line in output.strip().splitlines()]
    message = next((line for line in lines if "error" in line), "".join(lines[-1:]))
    reason = f"{compiler.name} fails on the kernels (exit code {code}): {message[:300]}"
    # A full disk or too little memory may pass, so these are tried again.
    permanent = code >= 0 and not any(words in output for words in _TRANSIENT)
    return _CompilerError(reason, output[-20_000:], permanent=permanent)
