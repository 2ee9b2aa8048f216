"""Pages of the KV cache: who has which, and which content is in them.

A full block is *published* under the content of everything up to its end, so that another sequence
with the same beginning shares it. Blocks that nobody uses keep their content until they are needed,
the least recently used first. (Paged attention: Kwon et al. 2023; automatic prefix caching: vLLM.)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from worker.engine.sequence import Sequence

_Key = tuple[int, tuple[int, ...]]
"""(the chain so far, the block's own tokens): equal exactly when the content is."""

_ROOT = 0


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
        self.hit_tokens = 0
        """Positions that admitted sequences found in the cache, over all time."""

    @property
    def available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, length: int) -> int:
        """Blocks that `length` positions take."""
        return -(-length // self.block_size)

    def match(self, sequence: Sequence) -> int:
        """How many of a new sequence's positions are in the cache: a multiple of the block size.

        At most `length - 1`: the last position must be computed to choose what follows.
        """
        return len(self._matching(sequence)) * self.block_size

    def _matching(self, sequence: Sequence) -> list[int]:
        found: list[int] = []
        chain = _ROOT
        for start in range(0, sequence.length - self.block_size, self.block_size):
            key = (chain, tuple(sequence.token_ids[start : start + self.block_size]))
            block = self._published.get(key)
            if block is None:
                break
            found.append(block)
            chain = self._chain_of[key]
        return found

    def fits(self, sequence: Sequence, length: int, *, reserve: int = 0) -> bool:
        """Whether a new sequence could have blocks for `length` positions, leaving `reserve`."""
        found = self._matching(sequence)
        shared_idle = sum(block in self._idle for block in found)
        needed = self.blocks_for(length) - len(found)
        return needed + shared_idle + reserve <= self.available

    def admit(self, sequence: Sequence) -> None:
        """Gives a new sequence the cached blocks of its beginning; they count as computed."""
        for block in self._matching(sequence):
            key = self._key[block]
            if key is None:
                raise AssertionError(f"block {block} is published without content")
            self._take(block)
            sequence.block_ids.append(block)
            sequence.chain.append(self._chain_of[key])
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
        return True

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
