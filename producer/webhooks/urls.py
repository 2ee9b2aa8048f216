"""Webhooks: which URLs are accepted, and what of them is shown."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from models.store import webhooks as store
from nightherd.errors import UsageError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from nightherd.settings import Settings

SECRET_URL = "env:"  # noqa: S105 - a prefix
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_URL = 2_000


def shown_url(url: str) -> str:
    """Scheme and host, for logs and tables; the rest of a URL may be a secret."""
    if url.startswith(SECRET_URL):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}"


def check_urls(settings: Settings, **urls: str | None) -> None:
    """Raises `UsageError` for a webhook that could not be delivered, as far as is known here.

    `urls` by the names of their options: `on_complete`, `on_failure`.
    """
    for name, url in urls.items():
        if url is None:
            continue
        option = f"--{name.replace('_', '-')}"
        check_url(url, option, allow_private=settings.webhook_allow_private)
        if settings.webhook_secret is None:
            raise UsageError(
                f"{option} needs NIGHTHERD_WEBHOOK_SECRET, with which bodies are signed; "
                "openssl rand -base64 32 makes one"
            )


def check_url(url: str, option: str, *, allow_private: bool) -> None:
    # Its text is not repeated: it may hold a secret.
    if url.startswith(SECRET_URL):
        if not _VARIABLE.fullmatch(url.removeprefix(SECRET_URL)):
            raise UsageError(f"{option}: after env: comes the name of a variable, as env:HOOK_URL")
        return
    if len(url) > _MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(
            f"{option} must be at most {_MAX_URL} characters of ASCII without spaces; "
            "write others as %XX"
        )
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        raise UsageError(f"{option} is no URL: its host or port cannot be read") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"{option} must be an http:// or https:// URL, or env:NAME")
    if "@" in parts.netloc:
        raise UsageError(
            f"{option} must hold no user or password; put a URL that is a secret into a variable: "
            "env:NAME"
        )
    if not allow_private and _is_private(host):
        raise UsageError(
            f"{option}: {host} is not public; NIGHTHERD_WEBHOOK_ALLOW_PRIVATE=true allows it"
        )


def _is_private(host: str) -> bool:
    """Whether an address is; names are looked at when a webhook is sent."""
    from producer.webhooks.sender import is_public

    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return not is_public(host)


def job_webhooks(connection: Connection, job_id: str) -> list[dict[str, Any]]:
    """A job's webhooks as `status --json` shows them."""
    return [
        {
            "id": row.id,
            "on": row.occasion,
            "to": shown_url(row.url),
            "state": row.state,
            "attempts": row.attempts,
            "next_attempt_at": _iso(row.next_attempt_at),
            "last_status": row.last_status,
            "last_error": row.last_error,
            "finished_at": _iso(row.finished_at),
        }
        for row in store.of_job(connection, job_id)
    ]


def _iso(time: Any) -> str | None:
    return None if time is None else str(time.isoformat())
