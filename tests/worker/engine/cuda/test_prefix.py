"""Attention that reads a group's common blocks once, against the same rows one by one."""

from __future__ import annotations

import random

import pytest
import torch

from worker.engine.cuda.kernels import attention, prefix, reference
from worker.engine.cuda.kernels.reference import Prefixes, Splits

BLOCK = 64
SPLIT_BLOCKS = reference.SPLIT_BLOCKS
TILE = prefix.TILE_ROWS
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def assert_close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), wanted.float(), rtol=limit, atol=limit)


class Grouped:
    """Rows in random order, some of which begin with the same blocks.

    `groups` are (common blocks, lengths of the rows). The leader's blocks hold the common keys and
    values; where the others' tables name blocks of their own for them, those hold NaN. So does
    whatever was never written.
    """

    def __init__(
        self,
        groups: list[tuple[int, list[int]]],
        group: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        padding: int = 2,
        kv_heads: int = 2,
    ) -> None:
        rng = random.Random(3)
        torch.manual_seed(0)
        rows = [(at, length) for at, (_, lengths) in enumerate(groups) for length in lengths]
        rng.shuffle(rows)
        counts = [-(-length // BLOCK) for _, length in rows]
        ids = rng.sample(range(sum(counts) + 3), sum(counts))
        shape = (sum(counts) + 3, 2, kv_heads, BLOCK, head_dim)
        self.cache = torch.full(shape, torch.nan)
        starts = [sum(counts[:row]) for row in range(len(rows))]
        members = [[row for row, (at, _) in enumerate(rows) if at == g] for g in range(len(groups))]
        self.tables: list[list[int]] = []
        """What each row really attends over."""
        for row, (at, length) in enumerate(rows):
            common, leader = groups[at][0], members[at][0]
            own = ids[starts[row] : starts[row] + counts[row]]
            self.tables.append([*ids[starts[leader] : starts[leader] + common], *own[common:]])
            for position in range(0 if row == leader else common * BLOCK, length):
                self.cache[own[position // BLOCK], :, :, position % BLOCK] = torch.randn(
                    2, kv_heads, head_dim
                )
        self.cache = self.cache.to(dtype).to(device)

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.positions = ints([length - 1 for _, length in rows] + [-1] * padding)
        self.first = ints(starts + [0] * padding)
        self.blocks = ints(ids)
        tiles, group_members, per_tile = [], [], max(1, TILE // group)
        for (common, lengths), mine in zip(groups, members, strict=True):
            for offset in range(0, len(mine) if common else 0, per_tile):
                part = min(per_tile, len(lengths) - offset)
                tiles.append([len(group_members) + offset, part, mine[0], common])
            group_members.extend(mine)
        shared = [groups[at][0] for at, _ in rows]
        self.prefixes = Prefixes(
            # The last one is padding.
            torch.tensor([*tiles, [0, 0, 0, 0]], dtype=torch.int32, device=device),
            ints(group_members + [0] * padding),
            ints(shared + [0] * padding),
            max(1, *(reference.split_count(common * BLOCK, BLOCK) for common, _ in groups)),
        )
        heads = kv_heads * group
        # Strided as it is within the joined queries, keys and values.
        wide = torch.randn(len(rows) + padding, (heads + 2 * kv_heads) * head_dim).to(dtype)
        query = wide.to(device)[:, : heads * head_dim]
        self.query = query.view(len(rows) + padding, heads, head_dim)
        self.real = len(rows)

    def splits(self, padding: int = 0) -> Splits:
        """Of all rows, and `padding` more."""
        _, heads, head_dim = self.query.shape
        return reference.splits_of(
            (self.positions + 1).tolist(),
            BLOCK,
            self.query.device,
            heads=heads,
            head_dim=head_dim,
            padding=padding,
        )

    def attended(
        self, padding: int = 0, lse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By the kernels, with groups: results and log-sum-exps of the rows that are real."""
        if lse is None:
            lse = torch.zeros(self.query.shape[:2], device=self.query.device)
        out = attention.decode_attention(
            self.query,
            self.cache,
            self.positions,
            self.first,
            self.blocks,
            splits=self.splits(padding),
            lse=lse,
            prefixes=self.prefixes,
        )
        assert out.isfinite().all()
        return out[: self.real], lse[: self.real]

    def wanted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By the reference, without groups, from tables without duplicates."""
        counts = [len(table) for table in self.tables]
        starts = [sum(counts[:row]) for row in range(self.real)]
        lse = torch.zeros(self.real, self.query.shape[1], device=self.query.device)
        out = reference.decode_attention(
            self.query[: self.real],
            self.cache,
            self.positions[: self.real],
            torch.tensor(starts, device=self.query.device),
            torch.tensor([page for table in self.tables for page in table]).to(self.blocks),
            splits=None,
            lse=lse,
        )
        return out, lse


def lengths_after(blocks: int, count: int) -> list[int]:
    """Contexts that end one position after the common blocks, and around what follows."""
    begin = blocks * BLOCK
    split = (blocks // SPLIT_BLOCKS + 1) * SPLIT_BLOCKS * BLOCK
    ends = [begin + 1, begin + BLOCK, begin + BLOCK + 1, split - 1, split, split + 1, split + 90]
    return [max(begin + 1, ends[row % len(ends)]) for row in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_groups_and_lone_rows(
    group: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """A common prefix within a split, one of whole splits, one row more than a tile."""
    more = TILE // group + 1 if group >= 4 else 4
    grouped = Grouped(
        [
            (SPLIT_BLOCKS, lengths_after(SPLIT_BLOCKS, 3)),
            (1, lengths_after(1, more)),
            (0, [1, 64, SPLIT_BLOCKS * BLOCK + 3]),
            (SPLIT_BLOCKS + 3, lengths_after(SPLIT_BLOCKS + 3, 1)),
        ],
        group,
        head_dim,
        dtype,
        device,
        kv_heads=2 if group == 3 else 1,
    )
    for got, wanted in zip(grouped.attended(), grouped.wanted(), strict=True):
        assert_close(got, wanted, dtype)
    reached = reference.decode_attention(
        grouped.query,
        grouped.cache,
        grouped.positions,
        grouped.first,
        grouped.blocks,
        splits=grouped.splits(),
        prefixes=grouped.prefixes,
    )
    assert_close(reached[: grouped.real], grouped.wanted()[0], torch.float32)


@pytest.mark.parametrize("common", range(1, 2 * SPLIT_BLOCKS + 2))
def test_common_blocks_end_anywhere(common: int, device: torch.device) -> None:
    grouped = Grouped(
        [(common, lengths_after(common, 7))], 2, 64, torch.float32, device, kv_heads=1
    )
    for got, wanted in zip(grouped.attended(), grouped.wanted(), strict=True):
        assert_close(got, wanted, torch.float32)


def test_a_context_of_one_split(device: torch.device) -> None:
    """Where the decode kernel could write its result directly, a group's parts are merged too."""
    grouped = Grouped([(2, [129, 150, 192, 256])], 4, 64, torch.float32, device)
    assert grouped.splits().rows.tolist() == [0, 1, 2, 3]
    for got, wanted in zip(grouped.attended(), grouped.wanted(), strict=True):
        assert_close(got, wanted, torch.float32)


def test_all_of_a_row_may_be_common(device: torch.device) -> None:
    grouped = Grouped([(2, [129, 200]), (5, [330, 340])], 4, 64, torch.float32, device)
    for row, shared in enumerate(grouped.prefixes.shared.tolist()[: grouped.real]):
        if grouped.positions[row] in (128, 329):
            grouped.positions[row] = shared * BLOCK - 1
    for got, wanted in zip(grouped.attended(), grouped.wanted(), strict=True):
        assert_close(got, wanted, torch.float32)


@pytest.mark.parametrize("step", [1, 3])
def test_groups_whose_rows_go_in_passes(
    step: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are the same, and also with padding of splits, as a graph may have it."""
    grouped = Grouped(
        [(5, lengths_after(5, 5)), (0, [70, 300])], 4, 64, torch.float32, device, kv_heads=1
    )
    whole, lse = grouped.attended()
    again = grouped.attended(padding=4)
    assert torch.equal(torch.cat(again, 1), torch.cat([whole, lse], 1))
    monkeypatch.setattr(reference, "PARTS_BYTES", step * 4 * 8 * 65)
    assert len(grouped.splits().passes) > 2
    again = grouped.attended()
    assert torch.equal(torch.cat(again, 1), torch.cat([whole, lse], 1))


def test_common_blocks_are_read_from_their_leader_only(device: torch.device) -> None:
    """What the tests above rest on: other rows' tables name blocks of their own, which hold NaN."""
    grouped = Grouped([(5, lengths_after(5, 3))], 4, 64, torch.float32, device)
    plain = reference.decode_attention(
        grouped.query,
        grouped.cache,
        grouped.positions,
        grouped.first,
        grouped.blocks,
        splits=grouped.splits(),
    )
    assert plain[: grouped.real].isnan().any(1).sum() == 2
