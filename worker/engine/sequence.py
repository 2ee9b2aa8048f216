"""The tokens of one sample, and how many of them are in the KV cache."""

from __future__ import annotations

from typing import Any

from worker.engine.interface import EngineRequest, Grammar


class Sequence:
    """A sample's tokens, its KV cache blocks, and how many positions are computed.

    Index arithmetic: `[0, prompt_length)` is the prompt, `[prompt_length, length)` was generated,
    `[0, computed)` is valid in the KV cache. The token at `length - 1` has been chosen and not been
    computed yet, so while it decodes `computed == length - 1`.

    An `AsyncRunner` may start a step before the tokens of the last one are processed:
    `[num_known_tokens, length)` are chosen by a pending step, and not in `token_ids` yet.
    """

    __slots__ = (
        "block_ids",
        "computed",
        "grammar",
        "index",
        "num_unresolved",
        "order",
        "prefix_ids",
        "request",
        "sampling",
        "token_ids",
    )

    def __init__(self, request: EngineRequest, index: int, order: int) -> None:
        self.request = request
        self.index = index
        """Which of the request's samples it is."""
        self.order = order
        """Number by arrival: unique, and kept when it is preempted."""
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_unresolved = 0
        """Tokens at its end that a pending step chooses, and that are not known yet."""
        self.computed = 0
        self.block_ids: list[int] = []
        """Its blocks of the KV cache: `block_ids[i]` holds positions [i * block_size, …)."""
        self.grammar: Grammar | None = None
        self.sampling: Any = None
        """The sampling state that a model runner keeps for it."""
        self.prefix_ids: list[int] = []
        """For each of its full blocks in the prefix cache: the id of all tokens up to its end."""

    @property
    def num_known_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def length(self) -> int:
        return len(self.token_ids) + self.num_unresolved

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def generated(self) -> int:
        return len(self.token_ids) + self.num_unresolved - len(self.request.prompt_token_ids)

    @property
    def exhausted(self) -> bool:
        """Whether its unresolved tokens are the last that it may generate."""
        return self.num_unresolved > 0 and self.generated >= self.request.max_new_tokens

    @property
    def pending(self) -> int:
        """Positions to be computed before the next token can be chosen; 1 while it decodes."""
        return len(self.token_ids) + self.num_unresolved - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller ranks run first: by priority, then by arrival."""
        return (-self.request.priority, self.order)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.order}, prompt {self.prompt_length}, generated {self.generated}, "
            f"computed {self.computed}, blocks {len(self.block_ids)})"
        )
