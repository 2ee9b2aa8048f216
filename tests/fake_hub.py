"""A small Hub on this machine, reached by HF_ENDPOINT: the Hub's URLs and headers, and its faults.

What huggingface_hub 1 and 2 ask of it: `api/models/NAME/revision/REV` (with the files' hashes),
and `NAME/resolve/COMMIT/FILE` with byte ranges.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LARGE = 10_000
"""Bytes from which a file is in LFS, and named by its sha256."""


@dataclass
class FakeRepository:
    """One repository: its files, who may read them, and what goes wrong."""

    files: dict[str, bytes]
    commit: str = COMMIT
    gated: str | None = None
    tokens: tuple[str, ...] = ()
    """Tokens that may read a gated or private repository."""
    private: bool = False
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """By file: after how many bytes the connection breaks, for the next answers in turn."""
    stall_after: dict[str, int] = field(default_factory=dict)
    """By file: after how many bytes nothing comes any more, once."""
    altered: dict[str, bytes] = field(default_factory=dict)
    """By file: what is sent in its place."""
    counted: dict[str, int] | None = None
    """Parameters by type, as the Hub tells them of safetensors."""
    status: int = 200
    """Of every answer, if it is not 200."""

    @classmethod
    def of(cls, folder: Path) -> FakeRepository:
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return cls(files)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


class FakeHub:
    """The server; `repositories` may be changed between requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, FakeRepository] = {}
        self.requests: list[Request] = []
        self.release = threading.Event()
        """Ends the stalled answers."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def fetched(self, name: str) -> list[Request]:
        """The requests for the content of a file."""
        return [
            one for one in self.requests if one.method == "GET" and one.path.endswith(f"/{name}")
        ]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path).lstrip("/")
        bearer = handler.headers.get("Authorization")
        token = bearer.removeprefix("Bearer ") if bearer else None
        self.requests.append(Request(handler.command, path, handler.headers.get("Range"), token))
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.repositories.get(name)
        if repository is not None and repository.status != 200:
            return _refuse(handler, repository.status, "", "it went wrong")
        allowed = repository is not None and token in repository.tokens
        if repository is None or (repository.private and not allowed):
            # As the real one, which does not tell strangers what is private.
            code = 404 if token else 401
            return _refuse(handler, code, "RepoNotFound" if token else "", "Repository not found")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", repository.commit):
            return _refuse(handler, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            return _send(handler, json.dumps(_description(name, repository)).encode(), {})
        if repository.gated and not allowed:
            code = 401 if token is None else 403
            return _refuse(handler, code, "GatedRepo", f"Access to model {name} is restricted.")
        return self._file(handler, repository, "/".join(rest[2:]))

    def _file(self, handler: BaseHTTPRequestHandler, repository: FakeRepository, name: str) -> None:
        if name not in repository.files:
            return _refuse(handler, 404, "EntryNotFound", "Entry not found")
        content = repository.altered.get(name, repository.files[name])
        etag = _etag(repository.files[name])
        headers = {
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        cuts = repository.cut_after.get(name)
        cut = cuts.pop(0) if cuts and handler.command == "GET" else None
        stall = repository.stall_after.pop(name, None) if handler.command == "GET" else None
        return _send(
            handler,
            content,
            headers,
            cut=stall if cut is None else cut,
            release=self.release if stall else None,
        )


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if len(content) >= LARGE else _git_hash(content)


def _git_hash(content: bytes) -> str:
    data = b"blob %d\0" % len(content) + content
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _description(name: str, repository: FakeRepository) -> dict[str, object]:
    siblings = []
    for path, content in repository.files.items():
        entry: dict[str, object] = {
            "rfilename": path,
            "size": len(content),
            "blobId": _git_hash(content),
        }
        if len(content) >= LARGE:
            entry["lfs"] = {"sha256": _etag(content), "size": len(content), "pointerSize": 130}
        siblings.append(entry)
    description: dict[str, object] = {
        "_id": "1",
        "id": name,
        "modelId": name,
        "sha": repository.commit,
        "private": repository.private,
        "gated": repository.gated or False,
        "siblings": siblings,
    }
    if repository.counted:
        total = sum(repository.counted.values())
        description["safetensors"] = {"parameters": repository.counted, "total": total}
    return description


def _refuse(handler: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
    headers = {"X-Error-Message": message}
    if code:
        headers["X-Error-Code"] = code
    _send(handler, json.dumps({"error": message}).encode(), headers, status=status)


def _send(
    handler: BaseHTTPRequestHandler,
    content: bytes,
    headers: dict[str, str],
    *,
    status: int = 200,
    cut: int | None = None,
    release: threading.Event | None = None,
) -> None:
    wanted = handler.headers.get("Range")
    if wanted and status == 200:
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = min(int(last) + 1, len(content)) if last else len(content)
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
        content, status = content[int(first) : end], 206
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "HEAD":
        return
    handler.wfile.write(content if cut is None else content[:cut])
    if cut is not None:
        handler.wfile.flush()
        if release is not None:
            release.wait(20)
        handler.close_connection = True


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
