"""Output files: whole under their name, or not there."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from nightherd.errors import UsageError


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[IO[str]]:
    """Standard output, or a file that appears under its name only when it is whole."""
    if path is None or path == "-":
        yield sys.stdout
        return
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    try:
        descriptor, temporary = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=".part"
        )
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def refuse_unwritable(path: str | None) -> None:
    """Says before long work, not after it, that its output could not be written."""
    if path is not None and path != "-":
        with contextlib.suppress(_Checked), open_output(path):
            raise _Checked


class _Checked(Exception):
    """Leaves `open_output` without writing the file."""


def write_rows(rows: Iterable[dict[str, Any]], file: IO[str], *, text_only: bool = False) -> int:
    """One JSON object a line, or the texts alone; returns how many."""
    count = 0
    for row in rows:
        if text_only:
            file.write(row["text"] if row["text"] is not None else "")
        else:
            file.write(json.dumps(row, ensure_ascii=False))
        file.write("\n")
        count += 1
    return count
