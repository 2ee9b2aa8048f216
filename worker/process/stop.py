"""How a worker is told to stop: by a signal, or by one of its own threads."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_REQUESTED = 0
"""The byte of a request from within the process; a signal writes its number."""


class Interrupted(BaseException):
    """Raised in the main thread, out of what may be left half-done, when told to stop."""


class Stop:
    """Whether this process was told to stop, by a signal or by one of its own threads.

    A handler of Python's runs between two instructions of the main thread, which may hold any
    lock, that of an `Event` included, and may be within a library's call for minutes. So signals
    also write into a wake pipe (a socket pair), at once, and a thread in `wait` reads it and sets
    `draining`. Being told several times is the same as once.
    """

    def __init__(self) -> None:
        self.draining = threading.Event()
        """Set once the worker must claim nothing more."""
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._requested = False
        self._interruptible = False

    def listen(self) -> None:
        """Handles the signals from now on, until the process has ended. In the main thread."""
        signal.set_wakeup_fd(self._wake_in.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            # nohup has the hang-up ignored, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._requested = True
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def request(self) -> None:
        """Tells the process to stop; from any thread."""
        self._requested = True
        # Where it is full, a request is in it already.
        with contextlib.suppress(BlockingIOError):
            self._wake_in.send(bytes([_REQUESTED]))

    def wait(self) -> None:
        """Waits until the process is told to stop, then sets `draining`. In one thread."""
        while self._wake_out.recv(1)[0] not in (_REQUESTED, *_SIGNALS):
            pass
        self.draining.set()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block of the main thread that ends with `Interrupted` when a signal comes."""
        self._interruptible = True
        try:
            if self._requested:
                raise Interrupted
            yield
        finally:
            self._interruptible = False
