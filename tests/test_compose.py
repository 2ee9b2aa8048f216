"""docker-compose.yml and the Dockerfile, as far as can be shown without Docker: very far.

The last test runs every service without Docker, in order: the commands, variables and health checks
of the file, verbatim, as another user, in a network of its own where the services' names are known.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from nightherd.cli import cli
from nightherd.settings import PREFIX, Settings
from tests import compose
from tests.compose import PASSWORDS, ROOT, seconds
from tests.compose_services import OURS, Machine, image_of, postgres_programs
from tests.sandbox import sandbox

ONE_SHOT = ("migrate", "cli")
DOCUMENTED = {
    "postgres": {"POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"},
    "redis": {"REDISCLI_AUTH"},
    OURS: {"HF_TOKEN"},
}
"""Variables that the images, or what is in them, document."""


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    return compose.load(compose.example())


@pytest.fixture(scope="module")
def services(stack: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = stack["services"]
    return found


# The file.


def test_it_is_valid_by_the_compose_specification() -> None:
    program = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run(
        [program, "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_services_are_the_ones_that_are_needed(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == {
        *("postgres", "redis", "migrate", "worker", "worker-cpu", "beat", "cli"),
    }
    assert services["migrate"]["command"] == ["db", "upgrade"]
    (device,) = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "deploy" not in services["worker-cpu"]


def test_the_example_has_every_variable_and_no_other() -> None:
    used: set[str] = set()
    compose.load(compose.example(), used)
    assert compose.example_names() == used | {"COMPOSE_PROFILES"}
    profiles = compose.load(compose.example())["services"]["worker"]["profiles"]
    assert compose.example()["COMPOSE_PROFILES"] in profiles


@pytest.mark.parametrize("name", PASSWORDS)
def test_a_missing_password_is_named(name: str) -> None:
    given = {**compose.example(), name: ""}
    with pytest.raises(KeyError, match=f"set {name} in .env"):
        compose.load(given)
    assert re.search(rf"^{name}=$", (ROOT / ".env.example").read_text(), re.MULTILINE)


def test_every_variable_exists(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        variables = service["environment"]
        own = {key for key in variables if key.startswith(PREFIX)}
        assert set(variables) - own <= DOCUMENTED[image_of(service)], name
        values = {key.removeprefix(PREFIX).lower(): variables[key] for key in own if variables[key]}
        Settings.model_validate(values)
    for name in compose.example_names():
        if name.startswith(PREFIX):
            assert name.removeprefix(PREFIX).lower() in Settings.model_fields


def test_secrets_are_in_no_command_line(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        seen = json.dumps([service.get("command"), service.get("healthcheck")])
        assert not [secret for secret in PASSWORDS.values() if secret in seen]


def test_nothing_is_open_to_the_world_and_nobody_is_root(
    services: dict[str, dict[str, Any]],
) -> None:
    for name, service in services.items():
        assert not {"ports", "network_mode", "privileged", "pid", "ipc"} & set(service), name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        if image_of(service) != OURS:
            assert service["user"] not in ("root", "0"), name


def test_what_runs_is_watched_and_started_again(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        if name in ONE_SHOT:
            assert service["restart"] == "no"
            continue
        assert service["restart"] == "unless-stopped"
        check = service["healthcheck"]
        assert seconds(check["timeout"]) < seconds(check["interval"])
        assert seconds(check["start_interval"]) < seconds(check["start_period"])


def test_the_order_can_be_kept(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for other, wanted in service.get("depends_on", {}).items():
            if wanted["condition"] == "service_healthy":
                assert "healthcheck" in services[other], name
            else:
                assert wanted["condition"] == "service_completed_successfully"
                assert other in ONE_SHOT
            assert "profiles" not in services[other], f"{name} would need a profile"
    for name in ("worker", "worker-cpu", "beat"):
        assert set(services[name]["depends_on"]) == {"migrate", "redis"}


def test_volumes_are_declared_and_what_must_last_is_in_one(
    stack: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    mounts = {
        name: dict(volume.split(":")[:2] for volume in service["volumes"])
        for name, service in services.items()
    }
    assert {volume for found in mounts.values() for volume in found} == set(stack["volumes"])
    # From version 18 on the image keeps its data in a folder of /var/lib/postgresql.
    new = int(re.findall(r"\d+", services["postgres"]["image"])[0]) >= 18
    mount = "/var/lib/postgresql" if new else "/var/lib/postgresql/data"
    assert mounts["postgres"] == {"postgres": mount}
    assert mounts["redis"] == {"redis": "/data"}
    home = compose.image_environment()["NIGHTHERD_HOME"]
    for name in ("migrate", "worker", "worker-cpu", "beat", "cli"):
        assert mounts[name]["data"] == home


def test_the_grace_periods_fit_the_drain(services: dict[str, dict[str, Any]]) -> None:
    for name in ("worker", "worker-cpu"):
        assert seconds(services[name]["stop_grace_period"]) >= 2 * Settings().drain_seconds + 10
    assert seconds(services["beat"]["stop_grace_period"]) > Settings().tick_seconds


def commands(services: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """What nightherd is given, in commands and health checks."""
    for service in services.values():
        if image_of(service) == OURS:
            if "command" in service:
                yield service["command"]
            if "healthcheck" in service:
                kind, program, *rest = service["healthcheck"]["test"]
                assert (kind, program) == ("CMD", "nightherd")
                yield rest


def test_every_command_parses(services: dict[str, dict[str, Any]]) -> None:
    seen = list(commands(services))
    assert len(seen) == 4 + 3
    for arguments in seen:
        command: click.Command = cli
        context = click.Context(cli, info_name="nightherd")
        rest = list(arguments)
        while isinstance(command, click.Group):
            found = command.get_command(context, rest.pop(0))
            assert found is not None, arguments
            command = found
        command.make_context("nightherd", rest, context)


def test_the_server_is_of_the_version_that_is_tested(services: dict[str, dict[str, Any]]) -> None:
    version = subprocess.run(
        [postgres_programs() / "postgres", "--version"], capture_output=True, text=True, check=True
    ).stdout
    tested = re.search(r" (\d+)\.", version)
    assert tested
    assert services["postgres"]["image"].startswith(f"postgres:{tested[1]}-")


# The image.


def test_the_image_runs_as_a_user_of_its_own() -> None:
    users = [rest for word, rest in compose.dockerfile() if word == "USER"]
    assert users == ["nightherd"]
    made = next(rest for word, rest in compose.dockerfile() if "useradd" in rest)
    assert "--uid 10001" in made
    home = compose.image_environment()["NIGHTHERD_HOME"]
    assert f"--owner nightherd --group nightherd --mode 700 {home}" in made
    assert ("VOLUME", home) in compose.dockerfile()


def test_the_image_starts_the_console_script() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    *_, program = compose.entrypoint()
    assert program in project["scripts"]
    installs = [rest for word, rest in compose.dockerfile() if "pip install" in rest]
    extras = set(re.findall(r"'\.\[(\w+)\]'", " ".join(installs)))
    assert extras == {"worker"}
    assert extras <= set(project["optional-dependencies"])
    base = next(rest for word, rest in compose.dockerfile() if word == "FROM")
    version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", base)
    assert version
    assert f"Programming Language :: Python :: {version[1]}" in project["classifiers"]


def test_the_image_installs_the_dependencies_of_the_project() -> None:
    """By the Dockerfile's own line of Python."""
    import tomllib

    line = next(rest for word, rest in compose.dockerfile() if "tomllib" in rest)
    code = shlex.split(line)[2]
    listed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert listed == project["dependencies"] + project["optional-dependencies"]["worker"]
    assert "--constraint constraints.txt" in line


def test_what_the_image_copies_is_let_through_and_nothing_else() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    sources = compose.copied()
    let_through = list(compose.context_files())
    for source in sources:
        assert (ROOT / source).exists(), source
        assert [path for path in let_through if path.is_relative_to(source)], source
    for path in let_through:
        assert any(path.is_relative_to(source) for source in sources), path
    for secret in (".env", ".git/config", "tests/conftest.py", "models/__pycache__/x.pyc"):
        assert compose.ignored(secret)


def test_the_image_gets_a_whole_package(tmp_path: Path) -> None:
    """A wheel of what is let through has every file of the packages, also those of data."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    context = tmp_path / "context"
    wanted = set()
    for path in compose.context_files():
        target = context / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target)
        if len(path.parts) > 1:
            wanted.add(str(path))
    subprocess.run(
        [sys.executable, "-P", "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=context,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wanted
    assert not wanted - names
    assert any(name.endswith("demo/model.safetensors") for name in names)


# All of it, without Docker.


@pytest.fixture
def machine(services: dict[str, dict[str, Any]]) -> Iterator[Machine]:
    with sandbox("postgres", "redis") as box:
        made = Machine(box, services)
        try:
            yield made
        finally:
            made.close()


@pytest.mark.timeout(400)
def test_every_service_without_docker(machine: Machine) -> None:
    # Up, in the order of `depends_on`.
    for name in ("postgres", "redis"):
        machine.start(name)
        machine.wait_until_healthy(name)
    assert machine.check("redis", REDISCLI_AUTH="wrong") != 0
    refused = machine.run_once("beat", "doctor", "--only", "database")
    assert "nightherd db upgrade" in refused.stdout
    assert machine.check("beat") == 1
    migrated = machine.run_once("migrate")
    assert migrated.returncode == 0, migrated.stderr
    assert machine.run_once("migrate").returncode == 0, "it runs at each `up`"
    machine.start("worker-cpu")
    assert machine.check("worker-cpu") == 1
    machine.start("beat")
    for name in ("beat", "worker-cpu"):
        machine.wait_until_healthy(name)
    lines = machine.command_lines()
    assert any("redis-server" in line for line in lines)
    assert not [line for line in lines if any(secret in line for secret in PASSWORDS.values())]

    # The broker is as it should be, and so is all the rest.
    doctor = machine.run_once("cli", "doctor", "--json")
    answer = json.loads(doctor.stdout)
    assert doctor.returncode == 0, doctor.stdout
    facts = next(found for found in answer["findings"] if found["check"] == "broker")["facts"]
    assert (facts["maxmemory_policy"], facts["appendonly"]) == ("noeviction", True)
    assert not [found for found in answer["findings"] if found["check"] == "broker"][1:]

    # A job, from standard input to standard output.
    job = machine.run_once("cli", "submit", "-", "--max-tokens", "8", input="One.\nTwo.\nThree.\n")
    assert job.returncode == 0, job.stderr
    ended = machine.run_once("cli", "status", job.stdout.strip(), "--wait")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = machine.run_once("cli", "results", job.stdout.strip()).stdout.splitlines()
    assert [json.loads(line)["index"] for line in results] == [0, 1, 2]

    # Redis keeps its data, and comes back by itself for those who wait.
    machine.stop("redis")
    assert machine.check("beat") == 1
    assert os.listdir(machine.folder("redis")) == ["appendonlydir"]
    machine.start("redis")
    machine.wait_until_healthy("redis")
    assert machine.check("beat") == 0

    # Down, each within its time.
    for name in ("worker-cpu", "beat", "redis", "postgres"):
        machine.stop(name)
    logs = "".join(path.read_text(errors="replace") for path in machine.logs.iterdir())
    assert not [secret for secret in PASSWORDS.values() if secret in logs]
