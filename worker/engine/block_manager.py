"""Pages of the KV cache: who has which, and which content is in them.

A full block is *published* under the content of everything up to its end, so that another sequence
with the same beginning shares it. Blocks that nobody uses keep their content until they are needed,
the least recently used first. (Paged attention: Kwon et al. 2023; automatic prefix caching: vLLM.)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from worker.engine.sequence import Sequence

_Key = tuple[int, tuple[int, ...]]
"""(the chain so far, the block's own tokens): equal exactly when the content is."""

_ROOT = 0


class Match(NamedTuple):
    """Blocks of a new sequence's beginning that are in the cache."""

    blocks: list[int]
    idle: int
    """How many of them nobody has now."""


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` positions. Knows numbers only, no tensors."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._key: list[_Key | None] = [None] * num_blocks
        self._published: dict[_Key, int] = {}
        self._chain_of: dict[_Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Published and unused, the least recently used first."""
        self._next_chain = _ROOT + 1
        self.held = 0
        """Blocks of all sequences, those that several share counted for each."""
        self.hit_tokens = 0
        """Positions that admitted sequences found in the cache, over all time."""

    @property
    def available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that sequences have."""
        return self.num_blocks - self.available

    def blocks_for(self, length: int) -> int:
        """Blocks that `length` positions take."""
        return -(-length // self.block_size)

    def match(self, sequence: Sequence) -> Match:
        """What a new sequence's beginning has in the cache.

        At most `length - 1` positions: the last must be computed to choose what follows.
        """
        found: list[int] = []
        chain = _ROOT
        for start in range(0, sequence.length - self.block_size, self.block_size):
            key = (chain, tuple(sequence.token_ids[start : start + self.block_size]))
            block = self._published.get(key)
            if block is None:
                break
            found.append(block)
            chain = self._chain_of[key]
        return Match(found, sum(block in self._idle for block in found))

    def fits(self, length: int, match: Match) -> bool:
        """Whether a new sequence could have blocks for `length` positions now."""
        needed = self.blocks_for(length) - len(match.blocks)
        return needed + match.idle <= self.available

    def admit(self, sequence: Sequence, match: Match | None = None) -> None:
        """Gives a new sequence the cached blocks of its beginning; they count as computed."""
        for block in (match or self.match(sequence)).blocks:
            key = self._key[block]
            if key is None:
                raise AssertionError(f"block {block} is published without content")
            self._take(block)
            sequence.block_ids.append(block)
            sequence.chain.append(self._chain_of[key])
        self.held += len(sequence.block_ids)
        sequence.computed = len(sequence.block_ids) * self.block_size
        self.hit_tokens += sequence.computed

    def extend(self, sequence: Sequence, length: int) -> bool:
        """Makes sure that positions `[0, length)` have blocks; False, changing nothing, if not."""
        missing = self.blocks_for(length) - len(sequence.block_ids)
        if missing > self.available:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._users[block] = 1
            sequence.block_ids.append(block)
        self.held += max(0, missing)
        return True

    def shared(self, sequence: Sequence) -> int:
        """How many of a sequence's first blocks others have too."""
        users = self._users
        for place, block in enumerate(sequence.block_ids):
            if users[block] == 1:
                return place
        return len(sequence.block_ids)

    def publish(self, sequence: Sequence, computed: int) -> None:
        """Lets others share the full blocks within `[0, computed)`.

        They may be those of the step under way: a step writes all its keys and values, layer by
        layer, before it reads any. If that step fails, `forget_all` must follow.
        """
        if not self._prefix_cache:
            return
        for index in range(len(sequence.chain), computed // self.block_size):
            start = index * self.block_size
            tokens = tuple(sequence.token_ids[start : start + self.block_size])
            key = (sequence.chain[-1] if sequence.chain else _ROOT, tokens)
            if key not in self._published:
                block = sequence.block_ids[index]
                self._published[key] = block
                self._key[block] = key
                self._chain_of[key] = self._next_chain
                self._next_chain += 1
            # Else another sequence computed the same at the same time: it goes on from there.
            sequence.chain.append(self._chain_of[key])

    def release(self, sequence: Sequence) -> None:
        """Takes all blocks back; the sequence has nothing computed any more."""
        self.held -= len(sequence.block_ids)
        # The end of a chain is useless without its beginning, so it is evicted first.
        for block in reversed(sequence.block_ids):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if self._key[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None
        sequence.block_ids.clear()
        sequence.chain.clear()
        sequence.computed = 0

    def forget_all(self) -> None:
        """No content can be trusted any more (a step failed). Call when all are released."""
        self._published.clear()
        self._chain_of.clear()
        self._key = [None] * self.num_blocks
        self._free.extend(self._idle)
        self._idle.clear()

    def _take(self, block: int) -> None:
        self._users[block] += 1
        self._idle.pop(block, None)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key = self._key[block]
        if key is not None:
            del self._published[key], self._chain_of[key]
            self._key[block] = None
        return block

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raises `AssertionError`, with the whole sum, if anything leaked. For tests."""
        users = Counter(block for sequence in sequences for block in sequence.block_ids)
        if users.total() != self.held:
            raise AssertionError(f"{self.held} blocks counted, {users.total()} held")
        used = sum(count > 0 for count in self._users)
        parts = f"free {len(self._free)} + used {used} + idle {len(self._idle)}"
        if len(self._free) + used + len(self._idle) != self.num_blocks:
            raise AssertionError(f"{parts} != {self.num_blocks} blocks")
        if len(set(self._free) | set(self._idle)) != len(self._free) + len(self._idle):
            raise AssertionError(f"a block is free twice: {parts}")
        wrong = [
            (block, count, users[block])
            for block, count in enumerate(self._users)
            if count != users[block]
        ]
        if wrong:
            raise AssertionError(f"(block, counted, real users) {wrong[:5]}: {parts}")
        for key, block in self._published.items():
            if self._key[block] != key:
                raise AssertionError(f"block {block} does not hold what is published of it")
        for block in self._idle:
            if self._key[block] is None:
                raise AssertionError(f"block {block} is idle without content")
