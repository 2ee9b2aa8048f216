"""What a check of `nightherd doctor` found, and how long it may take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nightherd.errors import NightherdError

PATIENCE_SECONDS = 5.0
"""How long a check may take in all."""

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw. A `problem` keeps jobs from running; a `note` is worth knowing, no more."""

    check: str
    level: Level
    what: str
    remedy: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For programs: what `what` says in words."""

    def as_json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "level": self.level,
            "what": self.what,
            "remedy": self.remedy,
            **({"facts": dict(self.facts)} if self.facts else {}),
        }


Check = Callable[[], list[Finding]]


def failed(check: str, error: NightherdError, remedy: str) -> Finding:
    """An error as a finding; its message mostly ends with a remedy of its own, after a `;`."""
    what, separator, own = " ".join(str(error).split()).partition("; ")
    return Finding(check, "problem", what, own if separator else remedy)


class Probe:
    """A check that runs in a thread from now on; `findings` waits for it, but not for ever.

    A file system or a service that hangs may hang the thread; the process ends without it.
    """

    def __init__(self, name: str, check: Check, *, seconds: float = PATIENCE_SECONDS) -> None:
        self._name = name
        self._check = check
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._found: list[Finding] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._check()
        except NightherdError as error:
            self._found = [failed(self._name, error, "correct that and try again")]
        except Exception as error:
            # Whatever it is, the other checks matter more than a traceback.
            said = " ".join(f"{type(error).__name__}: {error}".split())
            remedy = "report it, with the output of `nightherd doctor --json`"
            self._found = [Finding(self._name, "problem", f"the check failed: {said}", remedy)]

    def findings(self) -> list[Finding]:
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._found is None:
            return [
                Finding(
                    self._name,
                    "problem",
                    f"no answer within {self._seconds:g} s",
                    "see whether it hangs, is locked by another process, or is out of reach",
                )
            ]
        return self._found
