"""Reads an input of prompts, JSONL or plain text, row by row in constant memory.

A reader yields a `Row` for each good line and a `RowProblem` for each bad one, so that a command
can report every bad row of ten million before it stores anything. Blank lines are skipped.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, BinaryIO, Literal

from nightherd.errors import InputError, NightherdError, ParameterError
from producer.inputs.row import RowMaker, kind, parse_json
from producer.prompts.builder import RowBuilder
from producer.prompts.template import BadRowError, one_line, unstorable

Format = Literal["auto", "jsonl", "text"]

MAX_CUSTOM_ID = 512
"""Characters."""

_EXTENSIONS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
}
_MAX_LINES = 1 << 40
"""More than a file has."""
_BOM = b"\xef\xbb\xbf"
_OTHER_FORMATS = (
    (b"\xff\xfe", "UTF-16: iconv -f UTF-16 -t UTF-8 converts it"),
    (b"\xfe\xff", "UTF-16: iconv -f UTF-16 -t UTF-8 converts it"),
    (b"\x1f\x8b", "gzip data: gunzip -c unpacks it"),
    (b"\x28\xb5\x2f\xfd", "zstd data: zstd -dc unpacks it"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"PAR1\x15", "a Parquet file: write it as JSONL first"),
)


@dataclass(slots=True)
class Row:
    """One request: `body` and `params` as `parse_body` and `parse_params` return them."""

    line: int
    body: dict[str, Any]
    params: dict[str, Any] | None
    custom_id: str | None
    unit: str = "line"
    """What `line` counts, for messages: `line`, `row`, or `a.jsonl line` of several files."""


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Why a line is no request; `str()` of it is the whole message, on one line."""

    line: int
    message: str
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.unit} {self.line}: {self.message}"


Rows = Iterable[Row | RowProblem]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How rows are read.

    The columns of `keep` go to the metadata of their request; `ignore_unknown` drops keys that mean
    nothing instead of refusing their rows.
    """

    format: Format = "auto"
    keep: frozenset[str] = frozenset()
    ignore_unknown: bool = False
    builder: RowBuilder | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One of several inputs that are read as one: it may be empty, and custom_ids are shared."""

    unit: str
    """As of a `Row`."""
    ids: CustomIds


def open_input(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens an input; raises `InputError` in one line where that fails."""
    try:
        return open(path, "rb", buffering=1 << 20)
    except FileNotFoundError:
        raise InputError(one_line(f"{path}: no such file")) from None
    except IsADirectoryError:
        raise InputError(one_line(f"{path} is a folder; give a file of prompts")) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(one_line(f"{path} cannot be read: {reason}")) from None


class Reader:
    """Iterates once over an input: a `Row` or a `RowProblem` for each line that is not blank.

    `file` is read from where it stands and is not closed; `name` stands for it in messages, and
    its extension tells the format. Raises `InputError` for an input without rows and where reading
    fails. `part` makes it one of several inputs that are read as one.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        options: ReadOptions | None = None,
        *,
        part: Part | None = None,
    ) -> None:
        options = options or ReadOptions()
        self.name = name
        self._file = file
        self._part = part
        self._unit = "line" if part is None else part.unit
        self._format = options.format
        self._maker = RowMaker(options.keep, options.ignore_unknown, options.builder)
        # A row that is nothing but its prompt needs no checks where nothing is made of it.
        self._takes_bare_prompts = options.builder is None and "prompt" not in options.keep
        self._ids = CustomIds() if part is None else part.ids
        self._ids.begin(self._unit)

    @property
    def models(self) -> set[str]:
        """The first hundred names of models in OpenAI Batch lines, which are ignored."""
        return self._maker.models

    @property
    def unseen(self) -> set[str]:
        """The columns to keep that no row had."""
        return self._maker.unseen

    def __iter__(self) -> Iterator[Row | RowProblem]:
        try:
            yield from self._read() if self._unit == "line" else self._with_unit()
        except OSError as error:
            reason = error.strerror or error
            raise InputError(one_line(f"{self.name} cannot be read further: {reason}")) from None
        finally:
            if self._part is None:
                self._ids.close()

    def _with_unit(self) -> Iterator[Row | RowProblem]:
        for row in self._read():
            if isinstance(row, RowProblem):
                yield replace(row, unit=self._unit)
            else:
                row.unit = self._unit
                yield row

    def _read(self) -> Iterator[Row | RowProblem]:
        is_text: bool | None = None
        empty = True
        hint = ""
        for line, raw in enumerate(self._file, 1):
            if line == 1:
                raw = raw.removeprefix(_BOM)
                other = next(
                    (what for magic, what in _OTHER_FORMATS if raw.startswith(magic)), None
                )
                if other is not None:
                    yield RowProblem(line, f"not UTF-8 text but {other}")
                    return
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                empty = False
                yield RowProblem(line, "not UTF-8 text")
                continue
            if not text or text.isspace():
                continue
            empty = False
            if is_text is None:
                is_text, hint = self._is_text(text)
                whole = None if is_text else self._whole_file(text)
                if whole is not None:
                    yield RowProblem(line, whole + hint)
                    return
            try:
                row = self._text_row(line, text) if is_text else self._json_row(line, text)
            except (BadRowError, ParameterError) as error:
                yield RowProblem(line, one_line(str(error)) + hint)
            else:
                yield row
            hint = ""
        if empty and self._part is None:
            raise InputError(one_line(f"{self.name} is empty: it has no line with a prompt"))

    def _is_text(self, first: str) -> tuple[bool, str]:
        """Whether the input is plain text, by its name or by its first line that is not blank.

        The second value goes with a problem of that line: it may be the guess that is wrong.
        """
        chosen = self._format
        if chosen == "auto":
            extension = PurePath(self.name).suffix.lower()
            chosen = _EXTENSIONS.get(extension, "auto")
            if extension in (".csv", ".tsv"):
                raise InputError(
                    one_line(
                        f"{self.name}: tables are not read; write it as JSONL, one object a line "
                        "(--format text takes each line as a prompt)"
                    )
                )
        if chosen != "auto":
            return chosen == "text", ""
        # What begins as an object does is JSON even where it does not parse: taken for text, its
        # braces would become prompts without a word.
        if re.match(r'\s*(\{\s*("|\}|$)|\[\s*([{"]|$))', first):
            return False, " (--format text takes each line as a prompt)"
        try:
            return not isinstance(parse_json(first), str), ""
        except BadRowError:
            return True, ""

    @staticmethod
    def _whole_file(first: str) -> str | None:
        """What is wrong where the whole file seems to be one JSON value."""
        start = first.strip()
        if start.startswith("["):
            return "a JSON array; write one JSON value a line (jq -c '.[]' does that)"
        if start == "{":
            return "a JSON value over several lines; write one a line (jq -c . does that)"
        return None

    def _text_row(self, line: int, text: str) -> Row:
        text = text.rstrip("\r\n")
        if "\0" in text:
            raise BadRowError(f"the text holds {unstorable(text)}")
        if self._takes_bare_prompts:
            return Row(line, {"prompt": text}, None, None)
        return Row(line, *self._maker.from_string(text), None)

    def _json_row(self, line: int, text: str) -> Row:
        value = parse_json(text)
        if type(value) is dict:
            if self._takes_bare_prompts and len(value) == 1 and type(value.get("prompt")) is str:
                return Row(line, value, None, None)
            given = value.get("custom_id")
            custom_id = None if given is None else self._custom_id(line, given)
            return Row(line, *self._maker.from_object(value), custom_id)
        if type(value) is str:
            return Row(line, *self._maker.from_string(value), None)
        raise BadRowError(
            f'{kind(value)} is no row; {{"prompt": …}}, {{"messages": […]}} and a string are'
        )

    def _custom_id(self, line: int, value: object) -> str:
        if type(value) is int:
            value = str(value)
        if not isinstance(value, str):
            raise BadRowError(f"custom_id must be a string, it is {kind(value)}")
        if not 1 <= len(value) <= MAX_CUSTOM_ID:
            raise BadRowError(
                f"custom_id has {len(value)} characters; it may have 1 to {MAX_CUSTOM_ID}"
            )
        earlier = self._ids.add(value, line)
        if earlier is not None:
            shown = one_line(value, 80)
            raise BadRowError(f"custom_id '{shown}' was already used on {earlier}")
        return value


class CustomIds:
    """The custom_ids of an input, in a temporary database on disk: ten million fit no budget.

    Of an input of several files it knows in which one a line is.
    """

    def __init__(self) -> None:
        self._db: sqlite3.Connection | None = None
        self._units: list[str] = []

    def begin(self, unit: str) -> None:
        """The lines that follow are of the next file; `unit` as of a `Row`."""
        self._units.append(unit)

    def add(self, custom_id: str, line: int) -> str | None:
        """Remembers the id; returns where it was before (`line 3`), if it was."""
        number = (len(self._units) - 1) * _MAX_LINES + line
        try:
            if self._db is None:
                self._db = self._create()
            try:
                self._db.execute("INSERT INTO ids VALUES (?, ?)", (custom_id, number))
            except sqlite3.IntegrityError:
                query = "SELECT line FROM ids WHERE id = ?"
                file, line = divmod(self._db.execute(query, (custom_id,)).fetchone()[0], _MAX_LINES)
                return f"{self._units[file]} {line}"
        except sqlite3.Error as error:
            raise NightherdError(
                f"custom_ids cannot be compared in a temporary file: {error} "
                "(SQLITE_TMPDIR names another folder for it)"
            ) from None
        return None

    @staticmethod
    def _create() -> sqlite3.Connection:
        # An empty name is a private file that SQLite removes; small ones never leave memory.
        db = sqlite3.connect("", isolation_level=None)
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA cache_size = -65536")
        db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        db.execute("BEGIN")
        return db

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
