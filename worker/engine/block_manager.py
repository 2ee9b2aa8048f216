"""Blocks of the KV cache: which sequences hold them, and the prefix cache.

A full block is *cached* under the tokens of its whole prefix, up to its own end, so that another
sequence with the same prefix shares it. A cached block that no sequence holds keeps its content
until the block is needed: the least recently used is evicted first. (Paged attention: Kwon et al.
2023; automatic prefix caching: vLLM.)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from worker.engine.sequence import Sequence

_Key = tuple[int, tuple[int, ...]]
"""(id of the prefix before the block, the block's own tokens): equal if and only if the content is.
"""

_EMPTY_PREFIX = 0
"""The prefix id before the first block."""


class Match(NamedTuple):
    """The cached blocks of a new sequence's prefix."""

    blocks: list[int]
    idle: int
    """How many of them no sequence holds now."""


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` positions. Knows numbers only, no tensors."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks
        self._key_of_block: list[_Key | None] = [None] * num_blocks
        self._cached: dict[_Key, int] = {}
        self._prefix_id_of: dict[_Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Cached blocks that no sequence holds, least recently used first: an ordered set."""
        self._next_prefix_id = _EMPTY_PREFIX + 1
        self.held = 0
        """Blocks that sequences hold; a shared one counts once for each of them."""
        self.hit_tokens = 0
        """Positions that admitted sequences found in the prefix cache, since the start."""

    @property
    def available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that sequences hold; a shared one counts once."""
        return self.num_blocks - self.available

    def blocks_for(self, length: int) -> int:
        """The number of blocks for `length` positions."""
        return -(-length // self.block_size)

    def match(self, sequence: Sequence) -> Match:
        """The longest cached prefix of a new sequence.

        At most `length - 1` positions: the last must be computed to choose the next token.
        """
        found: list[int] = []
        prefix_id = _EMPTY_PREFIX
        for start in range(0, sequence.length - self.block_size, self.block_size):
            key = (prefix_id, tuple(sequence.token_ids[start : start + self.block_size]))
            block = self._cached.get(key)
            if block is None:
                break
            found.append(block)
            prefix_id = self._prefix_id_of[key]
        return Match(found, sum(block in self._idle for block in found))

    def fits(self, length: int, match: Match) -> bool:
        """Whether enough blocks are available for `length` positions of a new sequence."""
        needed = self.blocks_for(length) - len(match.blocks)
        return needed + match.idle <= self.available

    def admit(self, sequence: Sequence, match: Match | None = None) -> None:
        """Gives a new sequence the cached blocks of its prefix; they count as computed."""
        for block in (match or self.match(sequence)).blocks:
            key = self._key_of_block[block]
            if key is None:
                raise AssertionError(f"block {block} is cached without a key")
            self._acquire(block)
            sequence.block_ids.append(block)
            sequence.prefix_ids.append(self._prefix_id_of[key])
        self.held += len(sequence.block_ids)
        sequence.computed = len(sequence.block_ids) * self.block_size
        self.hit_tokens += sequence.computed

    def extend(self, sequence: Sequence, length: int) -> bool:
        """Allocates blocks for `[0, length)`; False, changing nothing, if too few are available."""
        missing = self.blocks_for(length) - len(sequence.block_ids)
        if missing > self.available:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._ref_counts[block] = 1
            sequence.block_ids.append(block)
        self.held += max(0, missing)
        return True

    def num_shared(self, sequence: Sequence) -> int:
        """How many of a sequence's first blocks other sequences hold too."""
        ref_counts = self._ref_counts
        for index, block in enumerate(sequence.block_ids):
            if ref_counts[block] == 1:
                return index
        return len(sequence.block_ids)

    def cache_full_blocks(self, sequence: Sequence, computed: int) -> None:
        """Puts the full blocks within `[0, computed)` into the prefix cache.

        They may be blocks of the step that is being planned: in each layer, a step writes all keys
        and values before it reads any. If that step fails, `clear_cache` must follow.
        """
        if not self._prefix_cache:
            return
        for index in range(len(sequence.prefix_ids), computed // self.block_size):
            start = index * self.block_size
            tokens = tuple(sequence.token_ids[start : start + self.block_size])
            key = (sequence.prefix_ids[-1] if sequence.prefix_ids else _EMPTY_PREFIX, tokens)
            if key not in self._cached:
                block = sequence.block_ids[index]
                self._cached[key] = block
                self._key_of_block[block] = key
                self._prefix_id_of[key] = self._next_prefix_id
                self._next_prefix_id += 1
            # Else another sequence has computed the same content: its prefix id is used from here.
            sequence.prefix_ids.append(self._prefix_id_of[key])

    def release(self, sequence: Sequence) -> None:
        """Frees all blocks of a sequence, which then has no position computed."""
        self.held -= len(sequence.block_ids)
        # A prefix's last blocks are useless without its first ones, so they are evicted first.
        for block in reversed(sequence.block_ids):
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._key_of_block[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None
        sequence.block_ids.clear()
        sequence.prefix_ids.clear()
        sequence.computed = 0

    def clear_cache(self) -> None:
        """Empties the prefix cache, whose content a failed step has made unreliable. All sequences
        must have been released."""
        self._cached.clear()
        self._prefix_id_of.clear()
        self._key_of_block = [None] * self.num_blocks
        self._free.extend(self._idle)
        self._idle.clear()

    def _acquire(self, block: int) -> None:
        self._ref_counts[block] += 1
        self._idle.pop(block, None)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key = self._key_of_block[block]
        if key is not None:
            del self._cached[key], self._prefix_id_of[key]
            self._key_of_block[block] = None
        return block

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raises `AssertionError` if a block leaked or the counts are wrong. For tests."""
        holders = Counter(block for sequence in sequences for block in sequence.block_ids)
        if holders.total() != self.held:
            raise AssertionError(f"{self.held} blocks counted, {holders.total()} held")
        used = sum(count > 0 for count in self._ref_counts)
        parts = f"free {len(self._free)} + used {used} + idle {len(self._idle)}"
        if len(self._free) + used + len(self._idle) != self.num_blocks:
            raise AssertionError(f"{parts} != {self.num_blocks} blocks")
        if len(set(self._free) | set(self._idle)) != len(self._free) + len(self._idle):
            raise AssertionError(f"a block is free twice: {parts}")
        wrong = [
            (block, count, holders[block])
            for block, count in enumerate(self._ref_counts)
            if count != holders[block]
        ]
        if wrong:
            raise AssertionError(f"(block, counted, real holders) {wrong[:5]}: {parts}")
        for key, block in self._cached.items():
            if self._key_of_block[block] != key:
                raise AssertionError(f"block {block} is cached under a key that is not its own")
        for block in self._idle:
            if self._key_of_block[block] is None:
                raise AssertionError(f"block {block} is idle without a key")
