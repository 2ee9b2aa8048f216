"""What the engine asks of a model: compute a step, choose the next tokens. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from worker.engine.interface import PositionLogprobs
from worker.engine.scheduler import Plan
from worker.engine.sequence import Sequence


@dataclass(slots=True)
class Choices:
    """The tokens chosen in a step, one for each span that `chooses`, in the plan's order."""

    token_ids: list[int]
    best: list[float]
    """The greatest processed logit of each: minus infinity where the parameters left nothing to
    choose, NaN or plus infinity where the model's logits were not finite."""
    logprobs: dict[int, PositionLogprobs] = field(default_factory=dict)
    """By place in `token_ids`, for those that ask for them."""


class ModelRunner(Protocol):
    """A loaded model with its KV cache. One thread uses it."""

    name: str
    """For the provenance of results."""
    block_size: int
    num_blocks: int
    vocab_size: int
    """Ids below it may be chosen."""

    def execute(self, plan: Plan) -> Choices:
        """Computes all positions of the plan into the KV cache, and chooses the next tokens.

        All keys and values of a layer are written before any are read. Raises whatever the
        backend raises; the KV cache cannot be trusted then.
        """

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended: what is kept for it can go."""

    def lost(self) -> bool:
        """After a step that failed: whether the device can do nothing more."""

    def close(self) -> None:
        """Frees what the model holds."""


Flight = Callable[[], Choices]
"""A step under way: waits for it, and gives its choices or raises what went wrong."""


@runtime_checkable
class AheadRunner(ModelRunner, Protocol):
    """A runner whose device computes a step while the engine takes in the choices of the last one.

    A sequence of such a step may be one token ahead (`Sequence.ahead`): the runner takes that
    token, which the step before chose, from where it left it.
    """

    def launch(self, plan: Plan) -> Flight:
        """Starts a step. Flights are called once each, in the order of their launch."""

    def runs_ahead(self, sequence: Sequence) -> bool:
        """Whether its next token can be chosen before its last one is known here."""
