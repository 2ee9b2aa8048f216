"""The settings: one typed, documented place.

Read from the environment (`NIGHTHERD_*`), then `.env`, then `nightherd.toml`, both in the current
folder, then the defaults. An unknown name is an error wherever it stands: a misspelt setting must
not be ignored silently.
"""

from __future__ import annotations

import base64
import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from nightherd.engine_kinds import EngineSetting
from nightherd.errors import SettingsError

PREFIX = "NIGHTHERD_"
ENV_FILE = ".env"
TOML_FILE = "nightherd.toml"


def default_home() -> Path:
    """`$XDG_DATA_HOME/nightherd`, by default `~/.local/share/nightherd`."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "nightherd"


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nightherd"


class Settings(BaseModel):
    """All settings: `NIGHTHERD_` + the name in capitals, or the name itself in `nightherd.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Field(
        default_factory=default_home,
        description="The data folder: the default database, the embedded broker, logs.",
    )
    cache: Path = Field(
        default_factory=default_cache,
        description="The folder of compiled kernels, which can be made again at any time.",
    )
    database_url: SecretStr | None = Field(
        default=None,
        description="`postgresql://user:password@host/name` or `sqlite:////path/to/file.db`; "
        "by default SQLite in the data folder.",
    )
    broker_url: SecretStr | None = Field(
        default=None,
        description="`redis://:password@host:6379/0` or `redis+socket:///path`; "
        "by default a server that nightherd starts itself in the data folder.",
    )
    lease_seconds: float = Field(
        default=45.0,
        gt=0,
        description="How long a worker's right to its chunks, or a beat's to a firing, lasts "
        "unrenewed.",
    )
    poison_deaths: int = Field(
        default=8,
        ge=1,
        description="How many workers must die with a request alone in flight until it fails as "
        "`poison`.",
    )
    renew_seconds: float = Field(
        default=10.0, gt=0, description="How often a worker, or a beat, renews its lease."
    )
    tick_seconds: float = Field(
        default=10.0, gt=0, description="How often workers and beat do the housekeeping."
    )
    schedule_seconds: float = Field(
        default=1.0, gt=0, description="How often beat looks for schedules that are due."
    )
    misfire_seconds: float = Field(
        default=60.0,
        ge=0,
        description="How late a scheduled time with `--misfire skip` may be and still fire.",
    )
    watch_seconds: float = Field(
        default=1.0, gt=0, description="How often a worker asks which of its chunks are wanted."
    )
    save_samples: int = Field(
        default=64, ge=1, description="A worker saves when so many samples have finished."
    )
    save_seconds: float = Field(
        default=2.0, gt=0, description="A worker saves at the latest after so many seconds."
    )
    chunk_size: int | None = Field(
        default=None,
        ge=1,
        description="Requests in a chunk; by default an eighth of the job, from 16 to 256.",
    )
    store_batch: int = Field(
        default=20_000, ge=1, description="Rows that submit stores in one transaction."
    )
    slots: int = Field(default=8, ge=1, le=64, description="Chunks that a worker has in flight.")
    engine: EngineSetting = Field(
        default="auto",
        description="What generates: `cpu` and `cuda` are the kernels for either device, `torch` "
        "is plain torch, `transformers` its generate; `auto` is the fastest that covers the "
        "checkpoint. Old spellings: `kernels` (`cpu` or `cuda`) and `generate` (`transformers`).",
    )
    cpu_level: Literal["amx", "avx512bf16", "avx512", "avx2", "plain"] | None = Field(
        default=None,
        description="The instructions that the C kernels may use, at most: `amx`, `avx512bf16`, "
        "`avx512`, `avx2` or `plain`; by default all that the CPU has.",
    )
    max_batch: int | None = Field(
        default=None,
        ge=1,
        description="Sequences that a worker runs at once; by default 128 on a CPU, 512 on a GPU, "
        "32 with `transformers`.",
    )
    token_budget: int | None = Field(
        default=None,
        ge=1,
        description="Rows of one step, at most: those that decode, and prompts beside them; by "
        "default 256 on a CPU, 8192 on a GPU.",
    )
    kv_memory: int | None = Field(
        default=None,
        ge=1,
        description="Memory of the KV cache, as `2GiB`, taken when a worker starts; by default it "
        "grows as it is needed, on a CPU to a quarter of what is free and at most 4 GiB, and on a "
        "GPU is 92 % of the card less what the weights, the largest steps and CUDA graphs take; "
        "with plain torch four fifths of what is free.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of a worker on a CPU; by default the cores that it may use.",
    )
    drain_seconds: float = Field(
        default=20.0,
        gt=0,
        description="How long a worker that was told to stop may take to save and return its work.",
    )
    database_patience: float = Field(
        default=10.0,
        ge=0,
        description="How long a statement is tried again while the database is away or full, in "
        "seconds; saving results waits for as long as it takes.",
    )
    broker_timeout: float = Field(
        default=1.0, gt=0, description="How long a command waits for the broker, in seconds."
    )
    visibility_timeout: int = Field(
        default=43_200,
        ge=1,
        description="Seconds after which Redis hands an unacknowledged wake-up out again.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        description="What webhooks are signed with: `whsec_` and base64, or any text. Needed where "
        "one is asked for, and where beats and workers run; `openssl rand -base64 32` makes one.",
    )
    webhook_allow_private: bool = Field(
        default=False,
        description="Webhooks may go to private addresses, this machine's own among them.",
    )
    webhook_timeout: float = Field(
        default=10.0,
        gt=0,
        le=300,
        description="How long one attempt at a webhook may take in all, in seconds.",
    )
    webhook_attempts: int = Field(
        default=10,
        ge=1,
        le=10,
        description="Attempts at a webhook; ten are spread over 76 hours.",
    )
    webhook_poll_seconds: float = Field(
        default=5.0, gt=0, description="How often beats and workers look for webhooks to send."
    )
    log_level: str = Field(default="INFO", description="DEBUG, INFO, WARNING or ERROR.")

    @field_validator("kv_memory", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
        return value.upper()

    @field_validator("broker_url")
    @classmethod
    def _readable_broker(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        scheme, _, rest = value.get_secret_value().partition("://")
        try:
            parts = urlsplit(value.get_secret_value())
            # An @ behind the host belongs to a password with a bare / ? or # in it.
            unreadable = "@" in f"{parts.path}{parts.query}" or bool(parts.fragment)
            _ = parts.port
        except ValueError:
            unreadable = True
        if scheme not in ("redis", "rediss", "redis+socket") or not rest or unreadable:
            raise ValueError(
                "must be redis://:password@host:6379/0, rediss://… or redis+socket:///path, "
                "with %XX for special characters"
            )
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _usable_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        secret = value.get_secret_value()
        size = len(secret.encode())
        if secret.startswith("whsec_"):
            try:
                size = len(base64.b64decode(secret.removeprefix("whsec_"), validate=True))
            except ValueError:
                raise ValueError("must be base64 after whsec_") from None
        if size < 16:
            raise ValueError("must have at least 16 bytes; openssl rand -base64 32 makes one")
        return value

    @field_validator("home", "cache")
    @classmethod
    def _absolute_home(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def sqlite_path(self) -> Path:
        """Where the default database is."""
        return self.home / "nightherd.db"

    def resolved_database_url(self) -> str:
        """The SQLAlchemy URL, with its driver; secrets included, so never print it."""
        if self.database_url is None:
            return f"sqlite:///{self.sqlite_path}"
        url = self.database_url.get_secret_value()
        for prefix in ("postgres://", "postgresql://"):
            if url.startswith(prefix):
                return "postgresql+psycopg://" + url.removeprefix(prefix)
        return url


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes, from `2GiB`, `500 MB`, `4g` (which is GiB) or a plain number; raises `ValueError`."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError("must be a size such as 2GiB or 500MB")
    number, unit, binary = found.groups()
    decimal = unit is not None and not binary and found[0].upper().endswith("B")
    power = " KMGT".index((unit or " ").upper())
    return int(float(number) * (1000 if decimal else 1024) ** power)


def redact_url(url: str) -> str:
    """The URL without its password; of one that cannot be parsed, the scheme alone."""
    scheme, separator, rest = url.partition("://")
    if "@" not in rest:
        return url
    try:
        parts = urlsplit(url)
        whole = (
            parts.hostname is not None and "@" not in f"{parts.path}{parts.query}{parts.fragment}"
        )
    except ValueError:
        whole = False
    if not whole:
        # A bare / ? or # within the password: no part is known to be harmless.
        return f"{scheme}{separator}***"
    host = parts.netloc.rpartition("@")[2]
    user = parts.username or ""
    return urlunsplit(
        parts._replace(netloc=f"{user}:***@{host}" if parts.password else parts.netloc)
    )


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _from_variables(variables: Mapping[str, str | None], where: str) -> dict[str, Any]:
    """The settings among variables; raises `SettingsError` for an unknown `NIGHTHERD_*` name."""
    known = {_variable(name): name for name in Settings.model_fields}
    found = {}
    for variable, value in variables.items():
        if variable.upper() in known and value:
            found[known[variable.upper()]] = value
        elif variable.upper().startswith(PREFIX) and variable.upper() not in known:
            close = difflib.get_close_matches(variable.upper(), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SettingsError(f"unknown setting {variable} in {where}{hint}")
    return found


def _from_env_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    from dotenv import dotenv_values

    try:
        return _from_variables(dotenv_values(path), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None


def _from_toml_file(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    for name in found:
        if name not in Settings.model_fields:
            close = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SettingsError(f"unknown setting {name} in {path}{hint}")
    return found


def read_sources() -> list[tuple[str, dict[str, Any]]]:
    """What each source sets, the strongest first; for `nightherd doctor` to say what counts."""
    return [
        ("the environment", _from_variables(os.environ, "the environment")),
        (ENV_FILE, _from_env_file(Path(ENV_FILE))),
        (TOML_FILE, _from_toml_file(Path(TOML_FILE))),
    ]


def load_settings() -> Settings:
    """Reads the settings; raises `SettingsError` naming the one that is unknown or invalid."""
    sources = read_sources()
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for where, found in reversed(sources):
        values |= found
        origin |= dict.fromkeys(found, where)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        secret = name in ("database_url", "broker_url", "webhook_secret")
        given = "" if secret else f" (got {first.get('input')!r})"
        raise SettingsError(
            f"setting {_variable(name)} in {origin.get(name, 'the defaults')} is invalid: "
            f"{first['msg'].removeprefix('Value error, ')}{given}"
        ) from None
