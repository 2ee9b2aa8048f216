"""Which rows of a decoding step have a common prefix, so that its blocks are read once. No torch.

Blocks are the same when their content is (`Sequence.prefix_ids`), wherever they lie. A sequence's
tokens never change, so what was found of it once stays true: groups are built anew only when other
rows run.

What grouping gains: rows with a common prefix read it from the L2 cache if they run side by side,
at about 5.5 TB/s on an H100 or H200, hardly faster than memory (3.0 and 4.3 TB/s copied). A tile of
64 query rows reads it once for all of them. At the 1B shape (32 query heads of 64, 8 of keys) with
1,024 rows in groups of 64 over 448 positions a layer reads 0.94 GB, which takes 170 us from L2; in
tiles 59 MB and 4 GFLOP, about 20 us, and 10 us for the parts, which the decode kernel writes as
well. So a step of 16 layers gains about 2 ms of 7 or 8. Reckoned, not measured; so are the limits
below.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import filterfalse

import numpy as np
import numpy.typing as npt

from worker.engine.sequence import Sequence

Ints = npt.NDArray[np.int32]

MIN_GROUP_ROWS = 8
"""Rows of the smallest group: a tile costs as much as one or two rows of the decode kernel."""
MIN_SHARED_BLOCKS = 4
"""Blocks that a group has in common, at least: one split of the decode kernel."""
MIN_SAVED_BYTES = 32 << 20
"""Bytes that grouping spares a layer, at least: 6 us from L2, twice what one more kernel takes."""
TILE_ROWS = 64
"""Query rows that read keys and values together: as many as a warp group multiplies at a time; more
only where a key-value head has more query heads."""
_MIN_TILES = 16
_NO_GROUP = 0
"""The label of a sequence in no group; prefix ids are positive."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a step, as `prefix.attend_prefixes` reads them; rows are numbered as there."""

    tiles: Ints
    """[tiles, 4]: where the tile's rows begin in `members`, how many they are, the row whose block
    table is read for the common blocks (the leader), and how many blocks those are."""
    members: Ints
    """The step's rows, ordered so that a group's are consecutive: [rows]."""
    shared: Ints
    """How many of a row's first blocks its group has in common, 0 without one: [rows]."""


class PrefixIndex:
    """Counts how many of the sequences that decode have each prefix, and builds groups of them."""

    def __init__(self, *, block: int, heads_per_kv_head: int, block_bytes: int) -> None:
        """`block` positions are a block, of `block_bytes` a layer."""
        self._block = block
        self._block_bytes = block_bytes
        self.rows_per_tile = max(1, TILE_ROWS // heads_per_kv_head)
        self._paths: dict[Sequence, list[int]] = {}
        """The prefix ids of a sequence's blocks when it was first seen."""
        self._users: dict[int, int] = {}
        """How many sequences' paths contain each prefix id."""
        self._depth: dict[int, int] = {}
        """How many blocks the prefix of each id has."""
        self._label: dict[Sequence, int] = {}
        """The id of each sequence's longest prefix that enough sequences have."""
        self._any_group = self._stale = False
        self._last_rows: list[Sequence] = []
        self._last_groups: Groups | None = None

    def groups(self, sequences: Iterable[Sequence]) -> Groups | None:
        """The groups of a step of these rows, one a sequence; None where grouping does not pay."""
        rows = list(sequences)
        if rows != self._last_rows:
            for sequence in filterfalse(self._paths.__contains__, rows):
                self._add(sequence)
            if self._stale:
                self._relabel()
            self._last_rows = rows
            self._last_groups = self._build(rows) if self._any_group else None
        return self._last_groups

    def forget(self, sequence: Sequence) -> None:
        """Stops counting a sequence that has ended."""
        path = self._paths.pop(sequence, None)
        if path is None:
            return
        self._last_rows, self._last_groups = [], None
        self._label.pop(sequence, None)
        for prefix_id in path:
            self._users[prefix_id] -= 1
            if self._users[prefix_id] == MIN_GROUP_ROWS - 1:
                self._stale = True
            if not self._users[prefix_id]:
                del self._users[prefix_id], self._depth[prefix_id]

    def max_tiles(self, rows: int) -> int:
        """The most tiles, padding included, of a step of so many rows."""
        return padded_tiles(rows // self.rows_per_tile + rows // MIN_GROUP_ROWS)

    def _add(self, sequence: Sequence) -> None:
        # The row's own position is never in a common block, not even where it fills the block.
        path = sequence.prefix_ids[: (sequence.length - 1) // self._block]
        self._paths[sequence] = path
        self._label[sequence] = _NO_GROUP
        for depth, prefix_id in enumerate(path, 1):
            self._users[prefix_id] = self._users.get(prefix_id, 0) + 1
            self._depth[prefix_id] = depth
        # Where too few have the first block, too few have longer prefixes.
        self._stale = self._stale or (bool(path) and self._users[path[0]] >= MIN_GROUP_ROWS)

    def _relabel(self) -> None:
        users = self._users
        labels: dict[int, int] = {}
        for sequence, path in self._paths.items():
            if len(path) < MIN_SHARED_BLOCKS:
                continue
            label = labels.get(path[-1])
            if label is None:
                # The longer a prefix, the fewer sequences have it.
                depth = bisect_left(
                    path, True, key=lambda prefix_id: users[prefix_id] < MIN_GROUP_ROWS
                )
                label = path[depth - 1] if depth >= MIN_SHARED_BLOCKS else _NO_GROUP
                labels[path[-1]] = label
            self._label[sequence] = label
        self._any_group = any(labels.values())
        self._stale = False

    def _build(self, rows: list[Sequence]) -> Groups | None:
        labels = np.fromiter(map(self._label.__getitem__, rows), np.int64, len(rows))
        members = np.argsort(labels, kind="stable")
        ranked = labels[members]
        begins = np.flatnonzero(np.diff(ranked, prepend=-1))
        counts = np.diff(begins, append=len(rows))
        shared = np.zeros(len(rows), np.int32)
        tiles: list[tuple[int, int, int, int]] = []
        saved = 0
        for begin, count in zip(begins.tolist(), counts.tolist(), strict=True):
            label = int(ranked[begin])
            if label == _NO_GROUP or count < MIN_GROUP_ROWS:
                continue
            depth, leader, before = self._depth[label], int(members[begin]), len(tiles)
            shared[members[begin : begin + count]] = depth
            for offset in range(0, count, self.rows_per_tile):
                part = min(self.rows_per_tile, count - offset)
                tiles.append((begin + offset, part, leader, depth))
            saved += (count - (len(tiles) - before)) * depth
        if not tiles or saved * self._block_bytes < MIN_SAVED_BYTES:
            return None
        return Groups(np.array(tiles, np.int32), members.astype(np.int32), shared)


def padded_tiles(tiles: int) -> int:
    """The number of tiles of the graph for so many: a power of two, as idle ones cost little."""
    return max(_MIN_TILES, 1 << (tiles - 1).bit_length()) if tiles else 0
