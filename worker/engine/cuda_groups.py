"""Which rows of a decoding step begin with the same blocks, so that these are read once. No torch.

Blocks are the same when their content is (`Sequence.chain`), wherever they lie. A sequence's tokens
never change, so what was found of it once stays true: a step looks anew only when other rows run.

What grouping gains: rows with a common beginning read it from the L2 cache if they run side by
side, at about 5.5 TB/s on an H100 or H200, hardly faster than memory (3.0 and 4.3 TB/s copied). A
tile of 64 query rows reads it once for all of them. At the 1B shape (32 query heads of 64, 8 of
keys) with 1,024 rows in groups of 64 over 448 positions a layer reads 0.94 GB, which takes 170 us
from L2; in tiles 59 MB and 4 GFLOP, about 20 us, and 10 us for the parts, which the plain kernel
writes as well. So a step of 16 layers gains about 2 ms of 7 or 8. Reckoned, not measured; so are
the limits below.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import filterfalse

import numpy as np
import numpy.typing as npt

from worker.engine.sequence import Sequence

Ints = npt.NDArray[np.int32]

LEAST_ROWS = 8
"""Of a group: a tile costs as much as one or two rows of the plain kernel."""
LEAST_BLOCKS = 4
"""That a group has in common: one split of the plain kernel."""
LEAST_SAVED = 32 << 20
"""Bytes that a layer need not read: 6 us from L2, twice what one more kernel takes."""
TILE_ROWS = 64
"""Query rows that read keys and values together: as many as a warp group multiplies at a time; more
only where a key-value head has more query heads."""
_LEAST_TILES = 16
_NONE = 0
"""No group; chains are positive."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a step, as `prefix.attend_prefixes` reads them; rows are numbered as there."""

    tiles: Ints
    """[tiles, 4]: where the tile's rows begin in `members`, how many they are, the row that has the
    common blocks at its beginning, and how many blocks those are."""
    members: Ints
    """The step's rows, those of a group together: [rows]."""
    shared: Ints
    """How many of a row's first blocks its group has in common, 0 without one: [rows]."""


class PrefixIndex:
    """Knows the beginnings of the sequences that decode, and how many have each."""

    def __init__(self, *, block: int, heads_per_kv_head: int, block_bytes: int) -> None:
        """`block` positions are a block, of `block_bytes` a layer."""
        self._block = block
        self._block_bytes = block_bytes
        self.rows_per_tile = max(1, TILE_ROWS // heads_per_kv_head)
        self._paths: dict[Sequence, list[int]] = {}
        """The chain of a sequence's blocks when it was first seen."""
        self._users: dict[int, int] = {}
        """Of each block, by its chain: how many sequences' paths it is in."""
        self._depth: dict[int, int] = {}
        """How many blocks there are up to its end."""
        self._label: dict[Sequence, int] = {}
        """The longest beginning that enough sequences have, by the chain of its last block."""
        self._any = self._stale = False
        self._last: list[Sequence] = []
        self._found: Groups | None = None

    def groups(self, sequences: Many[Sequence]) -> Groups | None:
        """The groups of a step of these rows; None where grouping does not pay."""
        rows = list(sequences)
        if rows != self._last:
            for sequence in filterfalse(self._paths.__contains__, rows):
                self._join(sequence)
            if self._stale:
                self._relabel()
            self._last = rows
            self._found = self._grouped(rows) if self._any else None
        return self._found

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        path = self._paths.pop(sequence, None)
        if path is None:
            return
        self._last, self._found = [], None
        self._label.pop(sequence, None)
        for chain in path:
            self._users[chain] -= 1
            if self._users[chain] == LEAST_ROWS - 1:
                self._stale = True
            if not self._users[chain]:
                del self._users[chain], self._depth[chain]

    def most_tiles(self, rows: int) -> int:
        """What the tiles of a step of so many rows are padded to, at most."""
        return padded_tiles(rows // self.rows_per_tile + rows // LEAST_ROWS)

    def _join(self, sequence: Sequence) -> None:
        # The row's own position is never in a common block, not even where it fills that.
        path = sequence.chain[: (sequence.length - 1) // self._block]
        self._paths[sequence] = path
        self._label[sequence] = _NONE
        for depth, chain in enumerate(path, 1):
            self._users[chain] = self._users.get(chain, 0) + 1
            self._depth[chain] = depth
        # Where too few have the first block, none have more.
        self._stale = self._stale or (bool(path) and self._users[path[0]] >= LEAST_ROWS)

    def _relabel(self) -> None:
        users = self._users
        known: dict[int, int] = {}
        for sequence, path in self._paths.items():
            if len(path) < LEAST_BLOCKS:
                continue
            label = known.get(path[-1])
            if label is None:
                # Ever fewer sequences have ever more blocks in common.
                depth = bisect_left(path, True, key=lambda chain: users[chain] < LEAST_ROWS)
                label = path[depth - 1] if depth >= LEAST_BLOCKS else _NONE
                known[path[-1]] = label
            self._label[sequence] = label
        self._any = any(known.values())
        self._stale = False

    def _grouped(self, rows: list[Sequence]) -> Groups | None:
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
            if label == _NONE or count < LEAST_ROWS:
                continue
            depth, leader, before = self._depth[label], int(members[begin]), len(tiles)
            shared[members[begin : begin + count]] = depth
            for offset in range(0, count, self.rows_per_tile):
                part = min(self.rows_per_tile, count - offset)
                tiles.append((begin + offset, part, leader, depth))
            saved += (count - (len(tiles) - before)) * depth
        if not tiles or saved * self._block_bytes < LEAST_SAVED:
            return None
        return Groups(np.array(tiles, np.int32), members.astype(np.int32), shared)


def padded_tiles(tiles: int) -> int:
    """The number of tiles of the graph for so many: a power of two, as idle ones cost little."""
    return max(_LEAST_TILES, 1 << (tiles - 1).bit_length()) if tiles else 0
