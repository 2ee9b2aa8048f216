"""Downloads into the shared cache: several files at once, resumed, verified. No torch.

huggingface_hub's own download begins a file anew when a process is ended in the middle of it, and
believes what arrives. Here a file grows under a name of its own, goes on where it stopped, and
appears in the cache only when its hash is the one that the Hub gave.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import errors as hub
from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url, hf_raise_for_status

from nightherd.errors import CheckpointError
from nightherd.machine import size as in_words
from worker.checkpoint.files import UNWANTED, WANTED, weight_files
from worker.checkpoint.hub import cache
from worker.checkpoint.hub.progress import Bar
from worker.checkpoint.hub.repository import (
    HTTP_ERROR,
    RESPONSE_SECONDS,
    RemoteFile,
    Repository,
    explain,
    quiet,
    request_headers,
)

log = logging.getLogger("nightherd.checkpoint")

PARALLEL = 4
"""Files that are fetched at once."""
ATTEMPTS = 5
"""How often in a row a file may break off without a byte gained."""
_STALLED_SECONDS = 30.0


class _BrokenOffError(Exception):
    """A file gains nothing any more."""


class _CancelledError(Exception):
    """Another file failed, or the user interrupted."""


def wanted_files(repository: Repository, all_files: bool = False) -> list[RemoteFile]:
    """What of a repository is downloaded: safetensors, JSON, tokenizer; or everything."""
    return [
        file
        for file in repository.files
        if all_files
        or (
            any(fnmatch(file.name, pattern) for pattern in WANTED)
            and not any(fnmatch(file.name, pattern) for pattern in UNWANTED)
        )
    ]


def missing_files(repository: Repository, all_files: bool = False) -> list[RemoteFile]:
    """What of that is not in the cache."""
    folder = cache.snapshot(repository.name, repository.commit)
    return [
        file for file in wanted_files(repository, all_files) if not (folder / file.name).exists()
    ]


def download(repository: Repository, *, all_files: bool = False, verify: bool = False) -> Path:
    """Fetches what is missing and returns the snapshot's folder.

    `verify` also reads again what was there before; what is damaged is fetched anew. Raises
    `CheckpointError` where the weights are of another format, the disk is too small, or a file
    cannot be had whole.
    """
    quiet()
    if not all_files:
        weight_files(repository)
    folder = cache.snapshot(repository.name, repository.commit)
    for file in wanted_files(repository, all_files):
        _check_name(file)
    try:
        if verify:
            _drop_damaged(repository, all_files)
        missing = missing_files(repository, all_files)
        if missing:
            _fetch_all(repository, missing)
        with contextlib.suppress(PermissionError):  # a cache that others fill
            cache.write_ref(repository.name, repository.revision, repository.commit)
    except OSError as error:
        raise explain(error, repository.name, repository.revision) from None
    return folder


def _check_name(file: RemoteFile) -> None:
    # Both become paths: a server may not lead out of the cache.
    path = PurePosixPath(file.name)
    safe_etag = re.fullmatch(r"[\w-]{1,128}", file.etag) if file.etag else True
    if path.is_absolute() or ".." in path.parts or not safe_etag:
        raise CheckpointError(f"the repository has a file of an unlikely name: {file.name!r}")


def _drop_damaged(repository: Repository, all_files: bool) -> None:
    """Deletes what does not have the hash that it should have, and says so."""
    folder = cache.snapshot(repository.name, repository.commit)
    present = [
        file
        for file in wanted_files(repository, all_files)
        if file.etag and (folder / file.name).exists()
    ]
    with Bar("verifying", sum(file.size or 0 for file in present)) as bar:
        for file in present:
            path = folder / file.name
            if cache.content_hash(path, str(file.etag), bar.advance) not in (file.etag, None):
                cache.remove(path)
                bar.say(f"{file.name} in the cache was damaged; it is deleted and fetched again")


def _fetch_all(repository: Repository, files: Sequence[RemoteFile]) -> None:
    total = sum(file.size or 0 for file in files)
    blobs = cache.storage(repository.name) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    partial = sum(_size(_partial(blobs, file.etag)) for file in files if file.etag)
    free = shutil.disk_usage(blobs).free
    if total - partial > free:
        raise CheckpointError(
            f"checkpoint {repository.label} needs {in_words(total - partial)}, and "
            f"{in_words(free)} are free under {cache.cache_folder()}; free some, or set HF_HOME "
            "to another disk"
        )
    log.info("fetching %d files of %s, %s", len(files), repository.label, in_words(total))
    started = time.monotonic()
    cancelled = threading.Event()
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="download")
    with Bar(f"fetching {repository.name}", total) as bar:
        # The small ones first: what is wrong with them shows at once.
        futures: list[Future[None]] = [
            pool.submit(_fetch, repository, file, bar, cancelled)
            for file in sorted(files, key=lambda file: file.size or 0)
        ]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [error for future in done if (error := future.exception()) is not None]
            real = [error for error in failed if not isinstance(error, _CancelledError)]
            if real:
                raise explain(real[0], repository.name, repository.revision) from None
        finally:
            # Also on Ctrl-C: they stop at their next block.
            cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)
    log.info("fetched %s in %.0f s", repository.label, time.monotonic() - started)


def _fetch(repository: Repository, file: RemoteFile, bar: Bar, cancelled: threading.Event) -> None:
    """Brings one file into the snapshot."""
    url = hf_hub_url(repository.name, file.name, revision=repository.commit)
    etag, size = file.etag, file.size
    if not etag:
        # An old server, whose listing has no hashes.
        known = get_hf_file_metadata(url, timeout=RESPONSE_SECONDS)
        etag, size = str(known.etag), known.size
        _check_name(RemoteFile(file.name, size, etag))
    store = cache.storage(repository.name)
    blob = store / "blobs" / etag
    pointer = cache.snapshot(repository.name, repository.commit) / file.name
    with _lock(store, etag, cancelled):
        if blob.exists():
            bar.advance(size or 0)
        else:
            partial = _partial(blob.parent, etag)
            try:
                _receive(url, partial, size, bar, cancelled)
            except _BrokenOffError:
                raise CheckpointError(
                    f"checkpoint {repository.label}: the connection broke off {ATTEMPTS} times in "
                    f"{file.name}, at {in_words(_size(partial))} of {in_words(size or 0)}; run the "
                    "command again, it goes on from there"
                ) from None
            found = cache.content_hash(partial, etag, lambda _: None)
            if found not in (etag, None):
                partial.unlink()
                raise CheckpointError(
                    f"checkpoint {repository.label}: {file.name} arrived damaged (its hash is "
                    f"{found}, the Hub says {etag}) and was deleted; run the command again"
                )
            partial.replace(blob)
        cache.link(blob, pointer)


def _partial(blobs: Path, etag: str | None) -> Path:
    # Not huggingface_hub's own name for such files, which it may remove.
    return blobs / f"{etag}.nightherd.incomplete"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextlib.contextmanager
def _lock(store: Path, etag: str, cancelled: threading.Event) -> Iterator[None]:
    """One process at a time fetches a file: workers that start together share one download."""
    path = store.parent / ".locks" / store.name / f"{etag}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if cancelled.wait(0.2):
                    raise _CancelledError from None
        yield


def _receive(
    url: str, partial: Path, size: int | None, bar: Bar, cancelled: threading.Event
) -> None:
    """Fetches a file to its end, going on where an earlier attempt stopped."""
    bar.advance(_size(partial))
    failures = 0
    while True:
        have = _size(partial)
        try:
            if size is None or have < size or not partial.exists():
                _receive_once(url, partial, have, bar, cancelled)
            if size is not None and _size(partial) > size:
                bar.advance(-_size(partial))
                partial.unlink()
                raise ConnectionError("more arrived than there is")
            if size is None or _size(partial) == size:
                return
            raise ConnectionError("the connection broke off")
        except (HTTP_ERROR, ConnectionError, TimeoutError) as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if isinstance(error, hub.HfHubHTTPError) and status < 500 and status != 429:
                raise
            failures = 1 if _size(partial) > have else failures + 1
            if failures >= ATTEMPTS:
                raise _BrokenOffError from None
            if cancelled.wait(0.25 * 2**failures):
                raise _CancelledError from None


def _receive_once(url: str, partial: Path, have: int, bar: Bar, cancelled: threading.Event) -> None:
    headers = request_headers()
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=headers, timeout=_STALLED_SECONDS) as answer:
        if have and answer.status_code == 416:
            # It has become shorter: what is here is of no use.
            bar.advance(-have)
            partial.unlink()
            return
        hf_raise_for_status(answer)
        resuming = have > 0 and answer.status_code == 206
        if have and not resuming:
            bar.advance(-have)
        with partial.open("ab" if resuming else "wb") as out:
            # Blocks as they arrive: what is still being gathered when it breaks off would be lost.
            for block in answer.iter_bytes():
                out.write(block)
                bar.advance(len(block))
                if cancelled.is_set():
                    raise _CancelledError
