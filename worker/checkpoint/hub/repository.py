"""The Hub: what a repository holds, and every refusal as one line with its remedy. No torch.

No token ever appears in what this module says: messages are made here, and what a library said is
repeated only after `clean`.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    get_token,
    hf_hub_url,
    hf_raise_for_status,
)
from huggingface_hub import errors as hub
from huggingface_hub.utils._headers import build_hf_headers

from nightherd import __version__
from nightherd.errors import CheckpointError
from nightherd.settings import redact_url

RESPONSE_SECONDS = 15.0
"""How long the Hub may take to begin an answer."""

# httpx in huggingface_hub 1, httpx2 in 2: the base of its own errors is the one in use.
HTTP_ERROR: type[Exception] = hub.HfHubHTTPError.__mro__[1]

_URL = re.compile(r"https?://\S+")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]+|(?i:bearer)\s+\S+")


class UnreachableError(CheckpointError):
    """The Hub cannot be reached; what is in the cache may be enough."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository."""

    name: str
    size: int | None
    etag: str | None
    """sha256 of a large file, git's hash of a small one: its name among the cache's blobs."""


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub at one commit. Its files are read by requests, nothing is stored."""

    name: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    gated: str | None
    """`auto` or `manual` (who grants access), None where anyone may read."""
    parameters: Mapping[str, int] | None
    """Numbers of parameters by type, as the Hub itself counted them."""

    @property
    def label(self) -> str:
        return f"{self.name}@{self.revision}"

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        return {file.name: file.size or 0 for file in self.files if "/" not in file.name}

    def read(self, name: str) -> bytes:
        return self._get(name, {})

    def start_of(self, name: str, count: int) -> bytes:
        return self._get(name, {"Range": f"bytes=0-{count - 1}"})[:count]

    def _get(self, name: str, headers: Mapping[str, str]) -> bytes:
        url = hf_hub_url(self.name, name, revision=self.commit)
        try:
            answer = get_session().get(
                url, headers={**request_headers(), **headers}, timeout=RESPONSE_SECONDS
            )
            hf_raise_for_status(answer)
            return bytes(answer.content)
        except Exception as error:  # whatever the HTTP library raises
            raise explain(error, self.name, self.revision) from None


def request_headers() -> dict[str, str]:
    """With the user's token, if there is one: never print them."""
    headers = build_hf_headers(library_name="nightherd", library_version=__version__)
    # Byte ranges are those of the file itself.
    return {**headers, "Accept-Encoding": "identity"}


def look_up(name: str, revision: str) -> Repository:
    """Asks the Hub for a repository; raises `CheckpointError`, or `UnreachableError`."""
    api = HfApi(library_name="nightherd", library_version=__version__)
    try:
        found: Any = api.model_info(
            name, revision=revision, files_metadata=True, timeout=RESPONSE_SECONDS
        )
    except Exception as error:
        raise explain(error, name, revision) from None
    files = []
    for sibling in found.siblings or ():
        large = sibling.lfs
        files.append(
            RemoteFile(
                sibling.rfilename,
                large.size if large else sibling.size,
                large.sha256 if large else sibling.blob_id,
            )
        )
    counted = getattr(found.safetensors, "parameters", None)
    return Repository(
        name=name,
        revision=revision,
        commit=str(found.sha),
        files=tuple(files),
        gated=str(found.gated) if found.gated else None,
        parameters=dict(counted) if counted else None,
    )


def web_page(name: str) -> str:
    """Where a browser finds the repository."""
    return f"{redact_url(constants.ENDPOINT)}/{name}"


def explain(error: BaseException, name: str, revision: str) -> CheckpointError:
    """What the Hub, or the way to it, refused, as one line that says what to do."""
    if isinstance(error, CheckpointError):
        return error
    shown = f"checkpoint {name}@{revision} cannot be fetched"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return UnreachableError(
            f"{shown}: HF_HUB_OFFLINE is set and it is not in the local cache; unset it, or fetch "
            f"it where there is a network: nightherd checkpoint download {name}"
        )
    if isinstance(error, hub.GatedRepoError):
        return CheckpointError(f"{shown}: {_gated(name, status)}")
    if isinstance(error, hub.RevisionNotFoundError):
        return CheckpointError(
            f"{shown}: the repository has no revision {revision!r}; see {web_page(name)}/commits"
        )
    if isinstance(error, hub.DisabledRepoError):
        return CheckpointError(f"{shown}: the Hub has disabled this repository")
    # To those without a token the Hub says 401 for what does not exist.
    hidden = status == 401 and get_token() is None
    if isinstance(error, hub.RepositoryNotFoundError) or hidden:
        who = "the account of this token" if get_token() else "anyone without a token"
        return CheckpointError(
            f"{shown}: the Hub has no such repository, or keeps it from {who}; check the name, "
            "and for a private one run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, hub.HFValidationError):
        return CheckpointError(f"{shown}: {clean(error)}")
    if status == 401:
        return CheckpointError(
            f"{shown}: the Hub refuses the token, it is wrong or has expired; make another under "
            "Settings, Access Tokens, then run `hf auth login` or set HF_TOKEN"
        )
    if status == 403:
        return CheckpointError(
            f"{shown}: the token may not read it; allow that under Settings, Access Tokens "
            f"(fine-grained tokens: also public gated repositories): {clean(error, 160)}"
        )
    if status == 404:
        return CheckpointError(f"{shown}: the Hub answers 404, not found; check the name")
    if status == 429:
        return UnreachableError(f"{shown}: the Hub asks to wait (too many requests); try later")
    if status is not None:
        return UnreachableError(f"{shown}: the Hub answers {status}; try later")
    if isinstance(error, HTTP_ERROR | ConnectionError | TimeoutError):
        return UnreachableError(
            f"{shown}: the Hub cannot be reached ({clean(error, 120)}) and it is not in the local "
            "cache; check the network, HF_ENDPOINT and the proxy"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{shown}: no space left under {constants.HF_HUB_CACHE}; free some, or set HF_HOME to "
            "another disk"
        )
    return CheckpointError(f"{shown}: {clean(error)}")


def _gated(name: str, status: int | None) -> str:
    if get_token() is None:
        return (
            f"it is gated and no token was sent; request access on {web_page(name)}, wait for the "
            "approval (Settings, Gated Repositories), then run `hf auth login` or set HF_TOKEN"
        )
    if status == 401:
        return (
            "it is gated and the Hub does not know the token; run `hf auth login` again or set "
            "HF_TOKEN to a valid one"
        )
    return (
        "it is gated and the account of this token has no access; request it on "
        f"{web_page(name)} and wait for the approval (Settings, Gated Repositories shows it), or "
        "use another token by `hf auth login` or HF_TOKEN"
    )


def clean(error: BaseException, limit: int = 300) -> str:
    """What an error says, on one line, without tokens and what stands in URLs behind the path."""
    text = " ".join(str(error).split()) or type(error).__name__
    token = get_token()
    if token:
        text = text.replace(token, "***")
    text = _TOKEN.sub("***", _URL.sub(lambda url: redact_url(url[0].split("?")[0]), text))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quiet() -> None:
    """Keeps huggingface_hub from warning on its own: its lines hold signed URLs."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
