"""One tree of errors; the docstring of each is its meaning, the message names the remedy.

::

    NightherdError                 1  anything else
    ├── UsageError                 2  bad input: an option, a file, a row, a parameter
    │   ├── InputError             2  a bad input file: carries one problem a row
    │   ├── ParameterError         2  a generation parameter is unknown or out of range
    │   └── SettingsError          2  a setting is unknown or invalid
    ├── NotFoundError              3  no such job, row, schedule
    ├── ServiceError               4  a service cannot be reached
    │   ├── DatabaseError          4  the database refuses or does not answer
    │   ├── SchemaError            4  the database has another schema than this program
    │   └── BrokerError            4  the broker refuses or does not answer
    ├── ConflictError              1  the job's state does not allow this
    └── CheckpointError            1  a checkpoint cannot be used

The number is the exit code of the command line. A message says what was wrong with the value,
where, and what to do about it. `RowError` stands apart: it is the failure of one request, stored
as its result, and never ends a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

EXIT_FAILED_ROWS = 5
"""`run`, `status --wait`: the job ended, some rows failed."""
EXIT_NOT_COMPLETED = 6
"""`run`, `status --wait`: the job was cancelled or expired."""


RowErrorCode = Literal[
    "invalid_request",
    "context_length_exceeded",
    "unsupported_parameter",
    "out_of_memory",
    "engine_error",
    "poison",
]
"""Why one request, or one sample of it, failed: `error.code` of its result. docs/operations.md says
what each means."""


class NightherdError(Exception):
    """An error whose message, in one line, is for the user."""

    exit_code = 1


class UsageError(NightherdError):
    """What the user gave cannot be used: an option, a file, a value."""

    exit_code = 2


class InputError(UsageError):
    """An input file has bad rows; nothing was stored.

    `problems` holds one line a bad row, each with its line number.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class ParameterError(UsageError):
    """A generation parameter is unknown, of the wrong type or out of range."""


class SettingsError(UsageError):
    """A setting (`NIGHTHERD_*`) is unknown or invalid."""


class NotFoundError(NightherdError):
    """No such job, row or schedule."""

    exit_code = 3


class ServiceError(NightherdError):
    """A service that the command needs cannot be reached."""

    exit_code = 4


class DatabaseError(ServiceError):
    """The database refuses or does not answer."""


class SchemaError(ServiceError):
    """The database's schema is older or newer than this program's."""


class BrokerError(ServiceError):
    """The broker refuses or does not answer."""


class ConflictError(NightherdError):
    """The job's state does not allow this."""


class CheckpointError(NightherdError):
    """A checkpoint cannot be found, read or used on this machine."""


class RowError(Exception):
    """One request fails, alone: `code` and `message` become its stored result."""

    def __init__(self, code: RowErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
