"""Being told to stop: what signals do, and the drain that follows."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_OWN = 0


class Interrupted(BaseException):
    """Raised in the main thread, out of what may be left half-done, when told to stop."""


class Stop:
    """Whether this process was told to stop, by a signal or by one of its own threads.

    A handler of Python's runs between two instructions of the main thread, which may hold any
    lock, that of an `Event` included, and may be within a library's call for minutes. So signals
    also write into a socket, at once, and a thread in `wait` reads it and sets `draining`. Told
    again and again is the same as told once.
    """

    def __init__(self) -> None:
        self.draining = threading.Event()
        """Set once the worker must claim nothing more."""
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._asked = False
        self._interruptible = False

    def listen(self) -> None:
        """Handles the signals from now on, until the process has ended. In the main thread."""
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            # nohup has the hang-up ignored, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def ask(self) -> None:
        """Tells it to stop; from any thread."""
        self._asked = True
        # Full only of what says the same.
        with contextlib.suppress(BlockingIOError):
            self._bell.send(bytes([_OWN]))

    def wait(self) -> None:
        """Waits until it is told to stop, then sets `draining`. In one thread."""
        while self._ear.recv(1)[0] not in (_OWN, *_SIGNALS):
            pass
        self.draining.set()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block of the main thread that ends with `Interrupted` when a signal comes."""
        self._interruptible = True
        try:
            if self._asked:
                raise Interrupted
            yield
        finally:
            self._interruptible = False
