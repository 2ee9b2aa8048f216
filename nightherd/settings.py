"""The settings: one typed, documented place, read from `NIGHTHERD_*`, `.env` and defaults.

The environment goes before `.env` in the current folder. An unknown `NIGHTHERD_*` name is an
error: a misspelt setting must not be silently without effect.
"""

from __future__ import annotations

import difflib
import functools
import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from nightherd.errors import SettingsError

PREFIX = "NIGHTHERD_"


def default_home() -> Path:
    """`$XDG_DATA_HOME/nightherd`, by default `~/.local/share/nightherd`."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "nightherd"


class Settings(BaseSettings):
    """All settings; each is `NIGHTHERD_` + its name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", extra="ignore", frozen=True
    )

    home: Path = Field(
        default_factory=default_home,
        description="The data folder: the default database, the embedded broker, logs.",
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
        default=45.0, gt=0, description="How long a worker's right to its chunks lasts unrenewed."
    )
    renew_seconds: float = Field(
        default=10.0, gt=0, description="How often a worker renews its lease."
    )
    tick_seconds: float = Field(
        default=10.0, gt=0, description="How often workers and beat do the housekeeping."
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
    slots: int = Field(default=4, ge=1, le=64, description="Chunks that a worker has in flight.")
    max_batch: int = Field(
        default=32, ge=1, description="Sequences that the plain backend runs at once."
    )
    drain_seconds: float = Field(
        default=20.0,
        gt=0,
        description="How long a worker that was told to stop may take to save and return its work.",
    )
    broker_timeout: float = Field(
        default=1.0, gt=0, description="How long a command waits for the broker, in seconds."
    )
    visibility_timeout: int = Field(
        default=43_200,
        ge=1,
        description="Seconds after which Redis hands an unacknowledged wake-up out again.",
    )
    log_level: str = Field(default="INFO", description="DEBUG, INFO, WARNING or ERROR.")

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
        return value.upper()

    @field_validator("home")
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


def redact_url(url: str) -> str:
    """The URL without its password; of one that cannot be taken apart, the scheme alone."""
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


def _refuse_unknown_names() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SettingsError(f"unknown setting {name}{hint}")


def load_settings() -> Settings:
    """Reads the settings; raises `SettingsError` naming the one that is unknown or invalid."""
    _refuse_unknown_names()
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        raise SettingsError(
            f"setting {name} is invalid: {first['msg']} (got {first.get('input')!r})"
        ) from None


@functools.cache
def settings() -> Settings:
    """The settings of this process, read once."""
    return load_settings()
