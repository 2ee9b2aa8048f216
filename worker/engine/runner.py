"""The interface of a model to the engine: compute a step, choose the next tokens. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from worker.engine.interface import PositionLogprobs
from worker.engine.scheduler import StepPlan
from worker.engine.sequence import Sequence


@dataclass(slots=True)
class Choices:
    """The tokens chosen in a step, one for each span that `chooses`, in the plan's order."""

    token_ids: list[int]
    best: list[float]
    """The greatest processed logit of each: minus infinity where the parameters left nothing to
    choose, NaN or plus infinity where the model's logits were not finite."""
    logprobs: dict[int, PositionLogprobs] = field(default_factory=dict)
    """By index in `token_ids`, for sequences whose request wants them."""


class ModelRunner(Protocol):
    """A loaded model with its KV cache. One thread uses it."""

    name: str
    """For the provenance of results."""
    block_size: int
    num_blocks: int
    vocab_size: int
    """Ids below it may be chosen."""

    def execute(self, plan: StepPlan) -> Choices:
        """Computes all positions of the plan into the KV cache, and chooses the next tokens.

        All keys and values of a layer are written before any are read. Raises whatever the
        backend raises; the KV cache cannot be trusted then.
        """

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence, which has ended."""

    def lost(self) -> bool:
        """After a step that failed: whether the device is unusable from now on."""

    def close(self) -> None:
        """Frees what the model holds."""


PendingStep = Callable[[], Choices]
"""A started step: waits for it, and returns its choices or raises what went wrong."""


@runtime_checkable
class AsyncRunner(ModelRunner, Protocol):
    """A runner whose device computes a step while the engine processes the tokens of the last one.

    The last token of a sequence in such a step may be unresolved (`Sequence.num_unresolved`): it
    was chosen by the step before, and the runner reads it from the device's memory.
    """

    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts a step. Pending steps are called once each, in the order of their launch."""

    def supports_overlap(self, sequence: Sequence) -> bool:
        """Whether its next token can be chosen before the CPU knows its last one."""
