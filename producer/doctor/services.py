"""What `nightherd doctor` asks of settings and services: each check returns findings.

A check changes nothing that anybody would notice. `producer.doctor.machine` has those of this
machine, `worker.torch_checks` those that need torch.
"""

from __future__ import annotations

import os
import socket
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from sqlalchemy import Connection, text

from migrations import schema
from models import SCHEMA_REVISION
from models.database import Database
from nightherd import __version__, broker
from nightherd.errors import BrokerError, NightherdError, SettingsError
from nightherd.machine import nearest_existing
from nightherd.settings import PREFIX, Settings, load_settings, read_sources, redact_url
from producer.doctor.finding import Finding, Level, failed

if TYPE_CHECKING:
    from producer.jobs.status import WorkerView

_ANSWER_SECONDS = 2.0
"""How long one answer of a service may take."""

_HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE")
_SECRET_VARIABLES = ("HF_TOKEN",)
_OTHER_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


# Settings.


def read_settings() -> tuple[Settings | None, list[Finding]]:
    """The settings, None if they are wrong, and where each of them comes from."""
    try:
        settings, sources = load_settings(), read_sources()
    except SettingsError as error:
        remedy = "correct or remove it; docs/settings.md lists all settings"
        return None, [failed("settings", error, remedy)]
    found = []
    given: dict[str, list[str]] = {}
    for where, values in sources:
        for name in values:
            given.setdefault(name, []).append(where)
    for name in Settings.model_fields:
        if name not in given:
            continue
        first, *hidden = given[name]
        over = f", over {' and '.join(hidden)}" if hidden else ""
        value = _shown_value(getattr(settings, name))
        facts = {"name": PREFIX + name.upper(), "value": value, "source": first, "hides": hidden}
        said = f"{facts['name']} = {value}, from {first}{over}"
        found.append(Finding("settings", "ok", said, facts=facts))
    others = len(Settings.model_fields) - len(given)
    found.append(Finding("settings", "ok", f"{others} settings have their defaults"))
    found.extend(_environment())
    return settings, found


def _shown_value(value: object) -> str:
    if not isinstance(value, SecretStr):
        return str(value)
    secret = value.get_secret_value()
    return redact_url(secret) if "://" in secret else "***"


def _environment() -> list[Finding]:
    """Variables of others that change what happens; secrets only by name."""
    said = [f"{name} is set" for name in _SECRET_VARIABLES if os.environ.get(name)]
    for name in (*_HUB_VARIABLES, *_OTHER_VARIABLES):
        if name in os.environ:
            said.append(f"{name} = {redact_url(os.environ[name])}")
    return [Finding("settings", "ok", "; ".join(said))] if said else []


# The database, and the workers in it.


def check_database(settings: Settings) -> list[Finding]:
    """Whether the database answers, takes a writing transaction, and has this program's schema."""
    database = Database(settings.resolved_database_url(), pool_size=1)
    place = database.url.render_as_string(hide_password=True)
    if database.dialect == "sqlite":
        path = Path(database.url.database or "")
        place = f"SQLite at {path.absolute()}"
        if not path.exists():
            return [_not_created(path, place)]
    try:
        server = database.retrying(partial(_server_version, database.dialect), patience=0)
        revision = schema.current_revision(database)
    except NightherdError as error:
        hint = (
            "make the file and its folder writable, or set NIGHTHERD_DATABASE_URL"
            if database.dialect == "sqlite"
            else "start it, or correct NIGHTHERD_DATABASE_URL"
        )
        return [failed("database", error, hint)]
    finally:
        database.close()
    facts = {
        "place": place,
        "dialect": database.dialect,
        "server": server,
        "schema": revision,
        "schema_needed": SCHEMA_REVISION,
    }
    level, said, remedy = _schema(database.dialect, revision)
    return [Finding("database", level, f"{place} ({server}), {said}", remedy, facts)]


def _server_version(dialect: str, connection: Connection) -> str:
    """The server's version; raises where nothing can be written."""
    if dialect == "sqlite":  # BEGIN IMMEDIATE has taken the lock that writers take
        version = connection.execute(text("SELECT sqlite_version()")).scalar_one()
        return f"SQLite {version}"
    row = connection.execute(
        text(
            "SELECT current_setting('server_version'), "
            "current_setting('transaction_read_only') = 'on'"
        )
    ).one()
    if row[1]:
        raise NightherdError(
            "the database is read-only; point NIGHTHERD_DATABASE_URL at the primary"
        )
    return f"PostgreSQL {row[0]}"


def _schema(dialect: str, revision: str | None) -> tuple[Level, str, str | None]:
    if revision == SCHEMA_REVISION:
        return "ok", f"schema {revision}", None
    if revision is not None and revision not in schema.known_revisions():
        said = f"its schema {revision} is newer than this program's ({SCHEMA_REVISION})"
        return "problem", said, f"upgrade nightherd (this is {__version__})"
    said = (
        "it has no schema yet"
        if revision is None
        else f"its schema {revision} is older than this program's ({SCHEMA_REVISION})"
    )
    if dialect == "sqlite":
        return "note", f"{said}; the next command that uses it upgrades it", None
    return "problem", said, "run: nightherd db upgrade"


def _not_created(path: Path, place: str) -> Finding:
    """A SQLite database that the first command will make, if it can."""
    facts = {"place": place, "dialect": "sqlite", "schema": None, "schema_needed": SCHEMA_REVISION}
    folder = nearest_existing(path)
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        said = f"{place} is not there yet; the first command that uses it makes it"
        return Finding("database", "ok", said, facts=facts)
    return Finding(
        "database",
        "problem",
        f"{place} cannot be made: {folder} cannot be written",
        "make it writable, or set NIGHTHERD_HOME or NIGHTHERD_DATABASE_URL",
        facts,
    )


def _worker_views(settings: Settings) -> list[WorkerView]:
    """Workers by the database; none where there is no database or schema yet."""
    from producer.jobs.status import worker_views

    database = Database(settings.resolved_database_url(), pool_size=1)
    try:
        if database.dialect == "sqlite" and not Path(database.url.database or "").exists():
            return []
        if schema.current_revision(database) != SCHEMA_REVISION:
            return []
        return database.retrying(worker_views, reading=True, patience=0)
    finally:
        database.close()


def check_workers(settings: Settings, key: str) -> list[Finding]:
    """All workers with their leases, and which ready ones would take a job of this checkpoint.

    The last finding's fact `serving` has the ids of those.
    """
    views = _worker_views(settings)
    found = [_worker_finding(view) for view in views]
    serving = [
        view.id
        for view in views
        if view.state == "ready" and key in view.serves and view.only_job is None
    ]
    facts = {"checkpoint": key, "serving": serving}
    if serving:
        said = f"{', '.join(serving)} would take a job for {key}"
        found.append(Finding("workers", "ok", said, facts=facts))
    else:
        remedy = f"start one: nightherd worker --checkpoint {key}"
        said = f"no live worker would take a job for {key}"
        found.append(Finding("workers", "note", said, remedy, facts))
    return found


def _worker_finding(view: WorkerView) -> Finding:
    state = view.state + (f" ({view.phase})" if view.phase else "")
    only = f", only job {view.only_job}" if view.only_job else ""
    who = f"{view.id} on {view.host} (process {view.pid}, {view.device})"
    said = f"{who} is {state}, serves {', '.join(view.serves)}{only}"
    facts = view.as_json()
    if view.state == "lapsed":
        remedy = "if it does not come back, its chunks go to others by themselves; see its log"
        return Finding("workers", "note", f"{said}: its lease has lapsed", remedy, facts)
    said = f"{said}, lease {view.lease_seconds_left:.0f} s"
    if view.version != __version__:
        remedy = "run the same version everywhere"
        said = f"{said}; it is nightherd {view.version}, this is {__version__}"
        return Finding("workers", "note", said, remedy, facts)
    return Finding("workers", "ok", said, facts=facts)


def check_worker_here(settings: Settings) -> list[Finding]:
    """Whether a ready worker of this very host (or container) holds its lease: a health check."""
    host = socket.gethostname()
    views = [view for view in _worker_views(settings) if view.host == host and _is_here(view.pid)]
    ready = [view for view in views if view.state == "ready"]
    if ready:
        found = _worker_finding(ready[0])
        return [Finding("worker-here", "ok", found.what, facts=found.facts)]
    said = "; ".join(_worker_finding(view).what for view in views) or "none is registered"
    remedy = "wait while it starts, else see its log"
    return [Finding("worker-here", "problem", f"no ready worker on {host}: {said}", remedy)]


def _is_here(pid: int) -> bool:
    """Whether that process is in this namespace; several containers may share a host's name."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# The broker.


def check_broker(settings: Settings) -> list[Finding]:
    """Whether the configured broker takes messages and keeps them, or the embedded one could."""
    if settings.broker_url is None:
        found = _check_embedded(settings)
        if settings.database_url is not None and not _is_sqlite(settings):
            remedy = "set NIGHTHERD_BROKER_URL to one Redis everywhere"
            said = (
                "the database can be shared, but the broker is this machine's own: workers "
                "elsewhere hear of new work only at their next tick"
            )
            found.append(Finding("broker", "note", said, remedy))
        return found
    url = settings.broker_url.get_secret_value()
    broker.ping(url, _ANSWER_SECONDS)
    return _inspect_broker(url, redact_url(url))


def _is_sqlite(settings: Settings) -> bool:
    return settings.resolved_database_url().startswith("sqlite")


def _inspect_broker(url: str, place: str) -> list[Finding]:
    """What INFO says about it, and whether it can be written to."""
    import redis

    facts: dict[str, Any] = {"place": place}
    try:
        with broker.connect(url, _ANSWER_SECONDS) as client:
            # As Celery's messages, under the common prefix; gone by itself.
            client.set("nightherd:doctor", 1, ex=10)
            try:
                info: dict[str, Any] = client.info()
            except redis.ResponseError as error:
                said = f"{place} answers, but does not tell its configuration ({error})"
                remedy = "see that it has appendonly yes and maxmemory-policy noeviction"
                return [Finding("broker", "note", said, remedy, facts)]
    except redis.RedisError as error:
        said = f"{place} answers, but cannot be written: {' '.join(str(error).split())}"
        remedy = "free its memory or disk, or point NIGHTHERD_BROKER_URL at the primary"
        return [Finding("broker", "problem", said, remedy, facts)]
    name = info.get("server_name", "redis").capitalize()
    facts["server"] = f"{name} {info.get('valkey_version', info.get('redis_version'))}"
    facts["maxmemory_policy"] = info.get("maxmemory_policy")
    facts["appendonly"] = bool(info.get("aof_enabled"))
    found = [
        Finding(
            "broker", "ok", f"{place} ({facts['server']}) answers and takes writes", None, facts
        )
    ]
    if facts["maxmemory_policy"] != "noeviction":
        said = f"its memory policy is {facts['maxmemory_policy']}: it may throw wake-ups away"
        remedy = "set maxmemory-policy noeviction in its configuration"
        found.append(Finding("broker", "note", said, remedy))
    if not facts["appendonly"]:
        said = "it keeps no append-only file: wake-ups are lost with it, until the next tick"
        remedy = "set appendonly yes in its configuration"
        found.append(Finding("broker", "note", said, remedy))
    return found


def _check_embedded(settings: Settings) -> list[Finding]:
    own = broker.EmbeddedBroker(settings.home)
    place = f"the embedded broker at {own.socket_path}"
    answer = own.send_command("PING", _ANSWER_SECONDS)
    if answer == "+PONG":
        return _inspect_broker(own.url, place)
    if answer is not None:
        said = f"{place} {f'refuses: {answer[1:]}' if answer else 'does not answer'}"
        folder = settings.home / "broker"
        remedy = f"see {folder / 'broker.log'}; end its process if it hangs ({folder}/broker.pid)"
        return [Finding("broker", "problem", said, remedy)]
    try:
        binary = broker.find_server()
    except BrokerError as error:
        what, _, remedy = str(error).partition(": ")
        return [Finding("broker", "problem", what, remedy)]
    version = _version_of(binary)
    folder = nearest_existing(settings.home)
    facts = {"place": str(own.socket_path), "binary": binary, "server": version, "running": False}
    if version is None:
        remedy = "install another valkey-server or redis-server, or set NIGHTHERD_BROKER_URL"
        return [Finding("broker", "problem", f"{binary} does not run here", remedy, facts)]
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        remedy = "make it writable, or set NIGHTHERD_HOME or NIGHTHERD_BROKER_URL"
        said = f"{place} cannot be started: {folder} cannot be written"
        return [Finding("broker", "problem", said, remedy, facts)]
    said = f"{place} is not running; `nightherd worker`, `run` and `beat` start it: {binary}"
    return [Finding("broker", "ok", f"{said} ({version})", facts=facts)]


def _version_of(binary: str) -> str | None:
    """`Valkey 9.1.2` from `Valkey server v=9.1.2 sha=…`; None if it does not run."""
    try:
        said = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=4, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    version = next((word.removeprefix("v=") for word in said if word.startswith("v=")), "?")
    return f"{said[0] if said else 'unknown'} {version}"
