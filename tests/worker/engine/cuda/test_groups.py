"""Which rows of a step have a common prefix, and what the runner for CUDA makes of it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import tiny_llama
from tests.engines import VOCAB, admit_freely, ask
from tests.worker.engine.cuda.test_cuda_runner import fake_capture
from worker.engine.block_manager import BlockManager
from worker.engine.cuda import groups as cuda_groups
from worker.engine.cuda.cuda_runner import CudaRunner
from worker.engine.cuda.groups import Groups, PrefixIndex, padded_tiles
from worker.engine.cuda.kernel_selection import fused_kernels
from worker.engine.cuda.kernels import reference
from worker.engine.cuda.step import Layout, pack
from worker.engine.engine import BatchEngine
from worker.engine.scheduler import Scheduler, Span
from worker.engine.sequence import Sequence

BLOCK = 64


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are so low that the tests' small groups are built."""
    monkeypatch.setattr(cuda_groups, "MIN_GROUP_ROWS", 3)
    monkeypatch.setattr(cuda_groups, "MIN_SHARED_BLOCKS", 1)
    monkeypatch.setattr(cuda_groups, "MIN_SAVED_BYTES", 1)


def make_index(heads_per_kv_head: int = 32) -> PrefixIndex:
    """With two rows a tile, unless `heads_per_kv_head` is given."""
    return PrefixIndex(block=BLOCK, heads_per_kv_head=heads_per_kv_head, block_bytes=1 << 20)


def decoding_sequence(prefix_ids: list[int], own: int = 5) -> Sequence:
    """A sequence of such blocks, and `own` positions after them."""
    made = Sequence(ask((2,) * (BLOCK * len(prefix_ids) + own)), 0, 0)
    made.prefix_ids = list(prefix_ids)
    made.computed = made.length - 1
    return made


def rows_by_group(groups: Groups | None, rows: int) -> list[tuple[int, list[int]]]:
    """(common blocks, rows) of each group, put together from its tiles."""
    found: dict[tuple[int, int], list[int]] = {}
    shared = np.zeros(rows, np.int32)
    for begin, count, leader, blocks in groups.tiles.tolist() if groups else ():
        members = groups.members[begin : begin + count].tolist() if groups else []
        assert count == len(members) > 0
        found.setdefault((leader, blocks), []).extend(members)
        shared[members] = blocks
    if groups:
        assert groups.shared.tolist() == shared.tolist()
        assert sorted(groups.members.tolist()) == list(range(rows))
    for (leader, _), members in found.items():
        assert leader == members[0]
    return sorted((blocks, members) for (_, blocks), members in found.items())


def expected_groups(paths: list[list[int]], least: int) -> list[tuple[int, list[int]]]:
    """What `rows_by_group` should give, from the prefix ids of all rows."""
    ends: dict[int, list[int]] = {}
    for row, path in enumerate(paths):
        wide = [each for each in path if sum(each in other for other in paths) >= least]
        if wide:
            ends.setdefault(wide[-1], []).append(row)
    depth = {prefix_id: at for path in paths for at, prefix_id in enumerate(path, 1)}
    return sorted((depth[end], rows) for end, rows in ends.items() if len(rows) >= least)


@pytest.mark.usefixtures("small")
def test_rows_join_the_longest_prefix_that_enough_have() -> None:
    system = [1, 2]
    sequences = [
        *(decoding_sequence([*system, 3, 4]) for _ in range(5)),
        *(decoding_sequence([*system, 5, 6 + index]) for index in range(2)),
        decoding_sequence([30, 31]),
        decoding_sequence(system),
        decoding_sequence([*system, 3]),
        decoding_sequence([]),
    ]
    groups = make_index().groups(sequences)
    assert groups is not None
    assert rows_by_group(groups, 11) == [(2, [5, 6, 8]), (4, [0, 1, 2, 3, 4])]
    assert groups.tiles[:, 1].tolist() == [2, 1, 2, 2, 1]


@pytest.mark.usefixtures("small")
def test_the_rows_own_block_is_never_in_common() -> None:
    """One that fills its last block in this step still reads that block as its own."""
    sequences = [decoding_sequence([1, 2], own=0) for _ in range(3)]
    assert rows_by_group(make_index().groups(sequences), 3) == [(1, [0, 1, 2])]


def test_groups_must_be_worth_it() -> None:
    rows, blocks = cuda_groups.MIN_GROUP_ROWS, cuda_groups.MIN_SHARED_BLOCKS
    path = list(range(1, blocks + 1))
    bytes_ = cuda_groups.MIN_SAVED_BYTES // ((rows - 1) * blocks)

    def found(sequences: list[Sequence], block_bytes: int = bytes_ + 1) -> Groups | None:
        made = PrefixIndex(block=BLOCK, heads_per_kv_head=4, block_bytes=block_bytes)
        return made.groups(sequences)

    assert rows_by_group(found([decoding_sequence(path) for _ in range(rows)]), rows)
    assert found([decoding_sequence(path) for _ in range(rows - 1)]) is None
    assert found([decoding_sequence(path[:-1]) for _ in range(rows)]) is None
    assert found([decoding_sequence(path) for _ in range(rows)], bytes_ - 1) is None


@pytest.mark.usefixtures("small")
def test_groups_follow_the_running_sequences() -> None:
    """Sequences come and go in any order, as they are preempted and end; no count is left."""
    rng = random.Random(2)
    made = make_index(heads_per_kv_head=4)
    running: list[Sequence] = []
    away: list[Sequence] = []
    paths: dict[int, list[int]] = {}
    seen = 0
    for _ in range(400):
        for _ in range(rng.choice([0, 0, 1, 4])):
            # A path is that of its parent and one block more, as a chain's number stands for all.
            path, node = [], 0
            for _ in range(rng.choice([0, 1, 2, 4])):
                node = 3 * node + rng.choice([1, 1, 1, 2, 3])
                path.append(node)
            running.append(decoding_sequence(path))
            paths[id(running[-1])] = path
        rng.shuffle(away)
        while away and rng.random() < 0.3:
            running.append(away.pop())
        while running and rng.random() < 0.6:
            gone = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.2:
                away.append(gone)
            else:
                made.forget(gone)
        for sequence in running:
            sequence.prefix_ids.append(-rng.randrange(1, 1 << 30))  # what it generates
        groups = made.groups(running)
        wanted = expected_groups([paths[id(sequence)] for sequence in running], 3)
        if not away:  # else they may be counted where they are not
            assert rows_by_group(groups, len(running)) == wanted
            seen += len(wanted)
        for blocks, rows in rows_by_group(groups, len(running)):
            assert len({tuple(paths[id(running[row])][:blocks]) for row in rows}) == 1
    assert seen > 100
    for sequence in running + away:
        made.forget(sequence)
    assert not any((made._users, made._depth, made._label, made._paths))


def test_the_same_rows_keep_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_index()
    sequences = [decoding_sequence([1, 2, 3, 4, 5]) for _ in range(40)]
    first = made.groups(sequences)
    assert first is not None
    monkeypatch.setattr(made, "_build", lambda rows: None)
    assert made.groups(list(sequences)) is first
    assert made.groups(sequences[:-1]) is None


def test_tiles_come_in_few_numbers() -> None:
    assert [padded_tiles(tiles) for tiles in (0, 1, 16, 17, 64, 65)] == [0, 16, 16, 32, 64, 128]
    rng = random.Random(4)
    for heads in (1, 3, 4, 8, 64, 71):
        made = make_index(heads)
        for rows in (8, 24, 100, 1024):
            sizes, left = [], rows
            while left >= cuda_groups.MIN_GROUP_ROWS:
                sizes.append(min(left, cuda_groups.MIN_GROUP_ROWS + rng.choice([0, 1, 9, 60])))
                left -= sizes[-1]
            tiles = sum(-(-size // made.rows_per_tile) for size in sizes)
            assert padded_tiles(tiles) <= made.max_tiles(rows)


def test_a_step_with_groups_is_packed_into_one_array() -> None:
    sequences = [decoding_sequence([1]), decoding_sequence([2]), decoding_sequence([1])]
    for index, sequence in enumerate(sequences):
        sequence.block_ids = [10 + index, 20 + index]
    groups = Groups(
        np.array([[0, 2, 0, 1]], np.int32),
        np.array([0, 2, 1], np.int32),
        np.array([1, 0, 1], np.int32),
    )
    layout = Layout(rows=5, choices=5, tiles=16)
    array = np.full(300, -7, np.int32)
    spans = [Span(sequence, sequence.length - 1, 1) for sequence in sequences]
    used = pack(array, layout, spans, [np.zeros(6, np.int32)] * 3, {}, groups)
    views = layout.views(array)
    assert views["tiles"].tolist() == [[0, 2, 0, 1], *[[0, 0, 0, 0]] * 15]
    assert views["members"].tolist() == [0, 2, 1, 0, 0]
    assert views["shared"].tolist() == [1, 0, 1, 0, 0]
    assert views["blocks"][: used - layout.size].tolist() == [10, 20, 11, 21, 12, 22]
    array[:] = 0
    for view in views.values():
        view += 1
    assert array.max() == 1
    assert Layout(5, 5).size + 16 * 4 + 2 * 8 == layout.size


# In the runner.


def run_engine(kernels: Any, requests: list[Any], rounds: int = 1, **given: Any) -> list[Any]:
    """Tokens of all samples, and the graph sizes that ran."""
    runner = CudaRunner(
        tiny_llama(),
        kernels=kernels,
        vocab_size=VOCAB,
        max_sequences=given.get("max_sequences", 16),
        max_rows=256,
        context=256,
        capture=fake_capture,
    )
    runner.make_cache(given.get("blocks", 80))
    manager = BlockManager(runner.num_blocks, BLOCK)
    scheduler = Scheduler(
        manager, max_sequences=runner._max_sequences, budget=256, separate_prefill=True
    )
    admit_freely(scheduler)
    engine = BatchEngine(runner, scheduler, 256)
    engine.start()
    try:
        outputs = []
        for _ in range(rounds):
            handles = [engine.add(request) for request in requests]
            for handle in handles:
                for future in handle.futures:
                    output = future.result(timeout=60)
                    assert output.finish_reason == "length", output
                    outputs.append(output.token_ids)
    finally:
        engine.stop(timeout=20)
    assert engine.broken is None
    assert not runner._prefixes._paths
    return [outputs, {size[0].tiles for size in runner._graphs._uses}, scheduler.preemptions]


def make_requests(lengths: list[int], samples: int, out: int) -> list[Any]:
    rng = random.Random(8)
    asked = []
    for index, length in enumerate(lengths):
        given: dict[str, Any] = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}][
            (index + 1) % 3
        ]
        seeds = tuple(range(index, index + (samples if index % 3 else 1)))
        asked.append(
            ask(rng.choices(range(VOCAB), k=length), seeds=seeds, max_new_tokens=out, **given)
        )
    return asked


@pytest.fixture
def ungrouped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run_engine` of a runner that never groups."""

    def run(*given: Any, **more: Any) -> list[Any]:
        with monkeypatch.context() as patched:
            patched.setattr(cuda_groups, "MIN_GROUP_ROWS", 1 << 30)
            return run_engine(*given, **more)

    return run


@pytest.mark.usefixtures("small")
def test_samples_of_a_prompt_are_those_without_groups(ungrouped: Any) -> None:
    """With rows in no group, prompts that end with a block and within one, greedy and sampled."""
    asked = make_requests([70, 65, 128, 20, 191, 64], samples=5, out=20)
    wanted, sizes, _ = ungrouped(reference, asked)
    assert sizes == {0}
    got, sizes, _ = run_engine(reference, asked)
    assert got == wanted
    assert 16 in sizes


@pytest.mark.usefixtures("small")
def test_requests_that_hit_the_prefix_cache_give_the_same_in_groups(ungrouped: Any) -> None:
    """A system prompt, its questions asked twice, with too few blocks for all of them."""
    rng = random.Random(9)
    system = rng.choices(range(VOCAB), k=130)
    asked = [
        ask(
            (*system, *rng.choices(range(VOCAB), k=1 + 9 * index % 60)),
            seeds=(index,),
            max_new_tokens=66,
            temperature=float(index % 2),
            # The kernel cannot sample this one.
            frequency_penalty=0.5 * (index == 4),
        )
        for index in range(9)
    ]
    more: dict[str, Any] = {"rounds": 2, "max_sequences": 8, "blocks": 11}
    wanted, _, _ = ungrouped(reference, asked, **more)
    got, sizes, preemptions = run_engine(reference, asked, **more)
    assert got == wanted
    assert 16 in sizes
    assert preemptions


@pytest.mark.usefixtures("small")
def test_the_kernels_themselves_give_the_same_in_groups(ungrouped: Any) -> None:
    asked = make_requests([6, 66], samples=3, out=4)
    wanted, _, _ = ungrouped(reference, asked)
    got, sizes, _ = run_engine(fused_kernels(), asked)
    assert got == wanted
    assert 16 in sizes
