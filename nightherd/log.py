"""Logging of the long-running processes: one line an event, on standard error, secrets left out."""

from __future__ import annotations

import logging
import re
import sys
import time

_SECRET = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://[^:/@\s]*):[^@\s]+@")


class _Formatter(logging.Formatter):
    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
        )

    def format(self, record: logging.LogRecord) -> str:
        # Libraries put URLs into messages and tracebacks; no password may reach a log.
        return _SECRET.sub(r"\g<scheme>:***@", super().format(record))


def configure_logging(level: str) -> None:
    """Sends the log to standard error; libraries only from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("nightherd").setLevel(level)


class OncePerState:
    """Logs a condition when it begins and when it ends, however often `begin` is called between."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._active = False

    def begin(self, message: str, *args: object) -> None:
        if not self._active:
            self._active = True
            self._logger.warning(message, *args)

    def end(self, message: str, *args: object) -> None:
        if self._active:
            self._active = False
            self._logger.info(message, *args)
