"""The moment of a firing, and the placeholders of a path that it fills in."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nightherd.errors import UsageError
from producer.prompts.template import BadRowError, compile_template, one_line


@dataclass(frozen=True, slots=True)
class Moment:
    """What stands in `{{ scheduled_for }}` and `{{ firing }}`, and in a query's parameters."""

    scheduled_for: datetime
    """The scheduled time, in the schedule's zone."""
    previous: datetime | None
    """The scheduled time before."""
    firing: int | None
    """The firing's number; None where there is none yet."""

    def variables(self) -> dict[str, Any]:
        """For templates, by name."""
        named: dict[str, Any] = {"scheduled_for": self.scheduled_for}
        return named if self.firing is None else {**named, "firing": self.firing}


def fill(text: str, moment: Moment, what: str) -> str:
    """A path with its placeholders filled in; `what` names the option in `UsageError`."""
    template = compile_template(text, what, moment.variables())
    unknown = sorted(template.names - {"scheduled_for", "firing"})
    if unknown:
        raise UsageError(
            one_line(
                f"{what}: {{{{ {unknown[0]} }}}} means nothing here; "
                "{{ scheduled_for }} and {{ firing }} may stand in it"
            )
        )
    if moment.firing is None and "firing" in template.names:
        raise UsageError(f"{what}: {{{{ firing }}}} has no number yet; it gets one when it fires")
    try:
        return template.render({})
    except BadRowError as error:
        message = str(error)
        raise UsageError(
            message if message.startswith(what) else one_line(f"{what}: {message}")
        ) from None
