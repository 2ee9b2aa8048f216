"""Checked rows on disk between the check of a job's rows and their storing."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterator
from typing import IO

from models.store.storing import NewRequest
from producer.inputs.reader import Row

_SPOOL_IN_MEMORY = 16 * 2**20


class Spool:
    """Checked rows on disk, so that ten million of them need no memory and are checked once."""

    def __init__(self) -> None:
        self._file: IO[str] = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - closed by `close`
            max_size=_SPOOL_IN_MEMORY, mode="w+", encoding="utf-8"
        )
        self.samples = array("L")

    def add(self, row: Row, samples: int) -> None:
        self._file.write(json.dumps([row.body, row.params, row.custom_id]))
        self._file.write("\n")
        self.samples.append(samples)

    def __iter__(self) -> Iterator[NewRequest]:
        self._file.seek(0)
        for index, (line, samples) in enumerate(zip(self._file, self.samples, strict=True)):
            body, params, custom_id = json.loads(line)
            yield NewRequest(index, body, params, custom_id, samples)

    def close(self) -> None:
        self._file.close()
