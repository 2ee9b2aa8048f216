"""One sample on its way through the engine."""

from __future__ import annotations

from typing import Any

from worker.engine.interface import EngineRequest, Grammar


class Sequence:
    """A sample's tokens, and how far the KV cache has them.

    Index arithmetic: `[0, prompt_length)` is the prompt, `[prompt_length, length)` was generated,
    `[0, computed)` is valid in the KV cache. The token at `length - 1` has been chosen and not been
    computed yet, so while it decodes `computed == length - 1`.

    A runner may start a step before the tokens of the one before are known here: `[known, length)`
    has been chosen, or will be by a step under way, and is not in `token_ids` yet.
    """

    __slots__ = (
        "ahead",
        "block_ids",
        "chain",
        "computed",
        "grammar",
        "order",
        "place",
        "request",
        "sampling",
        "token_ids",
    )

    def __init__(self, request: EngineRequest, place: int, order: int) -> None:
        self.request = request
        self.place = place
        """Which of the request's samples it is."""
        self.order = order
        """By arrival: unique, and kept over preemptions."""
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.ahead = 0
        """How many of its last tokens are not known yet."""
        self.computed = 0
        self.block_ids: list[int] = []
        """Its pages of the KV cache: block i holds positions [i * block_size, …)."""
        self.grammar: Grammar | None = None
        self.sampling: Any = None
        """What a model runner keeps for it from step to step."""
        self.chain: list[int] = []
        """What identifies the content up to the end of each of its published blocks."""

    @property
    def known(self) -> int:
        return len(self.token_ids)

    @property
    def length(self) -> int:
        return len(self.token_ids) + self.ahead

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def generated(self) -> int:
        return len(self.token_ids) + self.ahead - len(self.request.prompt_token_ids)

    @property
    def exhausted(self) -> bool:
        """Whether the tokens that are not known yet are the last that it may have."""
        return self.ahead > 0 and self.generated >= self.request.max_new_tokens

    @property
    def pending(self) -> int:
        """Positions to be computed before the next token can be chosen; 1 while it decodes."""
        return len(self.token_ids) + self.ahead - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first: by priority, then by arrival."""
        return (-self.request.priority, self.order)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.order}, prompt {self.prompt_length}, generated {self.generated}, "
            f"computed {self.computed}, blocks {len(self.block_ids)})"
        )
