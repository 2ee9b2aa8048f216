"""Each Triton kernel against plain torch: ragged shapes, dtypes, groups and widths of heads."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from worker.engine import noise
from worker.engine.cuda.kernels import attention, layers, reference, sampling
from worker.engine.cuda.kernels.reference import Splits

BLOCK = 64
SPLIT = reference.SPLIT_BLOCKS * BLOCK
LENGTHS = [1, 2, 63, 64, 65, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 17]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def assert_close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), wanted.float(), rtol=limit, atol=limit)


class Paged:
    """Random sequences in random blocks of a cache that holds NaN wherever nothing was written."""

    def __init__(
        self,
        lengths: list[int],
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        block: int = BLOCK,
    ) -> None:
        rng = random.Random(1)
        torch.manual_seed(0)
        counts = [-(-length // block) for length in lengths]
        ids = rng.sample(range(sum(counts) + 3), sum(counts))
        self.cache = torch.full(
            (sum(counts) + 3, 2, kv_heads, block, head_dim), torch.nan, dtype=dtype, device=device
        )
        self.first = torch.tensor([sum(counts[:i]) for i in range(len(counts))], device=device)
        self.first = self.first.int()
        self.blocks = torch.tensor(ids, dtype=torch.int32, device=device)
        self.positions = torch.tensor([length - 1 for length in lengths], device=device).int()
        for start, length in zip(self.first.tolist(), lengths, strict=True):
            for position in range(length):
                page = ids[start + position // block]
                self.cache[page, :, :, position % block] = torch.randn(2, kv_heads, head_dim)


def splits_of(query: torch.Tensor, positions: torch.Tensor, padding: int = 0) -> Splits:
    lengths = (positions + 1).tolist()
    _, heads, dim = query.shape
    return reference.splits_of(
        lengths, BLOCK, query.device, heads=heads, head_dim=dim, padding=padding
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_decode_attention(
    group: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = LENGTHS if group == 4 else [1, 65, SPLIT + 1]
    paged = Paged([*lengths, 5], 2, head_dim, dtype, device)
    paged.positions[-1] = -1  # padding
    rows = len(lengths) + 1
    # Strided as it is within the joined queries, keys and values.
    query = torch.randn(rows, 2 * (group + 2) * head_dim, device=device).to(dtype)
    query = query[:, : 2 * group * head_dim].view(rows, 2 * group, head_dim)
    given = (query, paged.cache, paged.positions, paged.first, paged.blocks)
    splits = splits_of(query, paged.positions, padding=3)
    lse, wanted_lse = torch.zeros(2, rows, 2 * group, device=device)
    got = attention.decode_attention(*given, splits=splits, lse=lse)
    wanted = reference.decode_attention(*given, splits=splits, lse=wanted_lse)
    assert_close(got[:-1], wanted[:-1], dtype)
    assert_close(lse[:-1], wanted_lse[:-1], dtype)
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_is_batch_invariant(dtype: torch.dtype, device: torch.device) -> None:
    """A row has the same bits among longer ones, and where no splits are merged."""
    paged = Paged([SPLIT - 5, 3 * SPLIT + 1, 70], 2, 64, dtype, device)
    query = torch.randn(3, 8, 64, device=device).to(dtype)
    together = attention.decode_attention(
        query,
        paged.cache,
        paged.positions,
        paged.first,
        paged.blocks,
        splits=splits_of(query, paged.positions, padding=6),
    )
    for row in range(3):
        one = slice(row, row + 1)
        short = paged.positions[row] < SPLIT
        alone = attention.decode_attention(
            query[one],
            paged.cache,
            paged.positions[one],
            paged.first[one],
            paged.blocks,
            splits=None if short else splits_of(query, paged.positions[one]),
        )
        assert torch.equal(alone[0], together[row])


def test_rows_with_many_splits_go_in_passes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = Paged([3, SPLIT + 9, 64, 2 * SPLIT, 1], 2, 64, torch.float32, device)
    query = torch.randn(5, 4, 64, device=device)
    given = (query, paged.cache, paged.positions, paged.first, paged.blocks)
    lse, again = torch.zeros(2, 5, 4, device=device)
    splits = splits_of(query, paged.positions)
    assert splits.passes == ((5, 7),)
    whole = attention.decode_attention(*given, splits=splits, lse=lse)
    for most, passes in (
        (3, ((2, 3), (4, 6), (5, 7))),
        (1, ((1, 1), (2, 3), (3, 4), (4, 6), (5, 7))),
    ):
        monkeypatch.setattr(reference, "PARTS_BYTES", most * 4 * 4 * 65)
        splits = splits_of(query, paged.positions)
        assert splits.passes == passes
        assert torch.equal(attention.decode_attention(*given, splits=splits, lse=again), whole)
        assert torch.equal(lse, again)


def test_a_long_context_adds_only_its_own_splits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among many short ones it is one grid, with a program for each split that there is."""
    lengths = [3] * 40 + [9 * SPLIT + 1] + [70] * 40
    paged = Paged(lengths, 1, 64, torch.float32, device)
    query = torch.randn(len(lengths), 2, 64, device=device)
    splits = splits_of(query, paged.positions)
    assert splits.rows.tolist() == [*range(40), *[40] * 10, *range(41, 81)]
    grids: list[Any] = []
    decode = attention._decode

    class Watched:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return decode[grid]

    monkeypatch.setattr(attention, "_decode", Watched())
    given = (query, paged.cache, paged.positions, paged.first, paged.blocks)
    got = attention.decode_attention(*given, splits=splits)
    assert grids == [(90, 1)]
    assert_close(got, reference.decode_attention(*given, splits=splits), torch.float32)


def test_parts_of_a_context_are_merged_by_their_log_sum_exp(device: torch.device) -> None:
    """As for a common prefix: its part and the row's own part give the whole."""
    shared, length = 2 * BLOCK, 2 * BLOCK + 40
    paged = Paged([length], 2, 64, torch.float32, device)
    query = torch.randn(1, 8, 64, device=device)
    outs, lses = [], []
    for first, count in ((0, shared), (2, length - shared), (0, length)):
        lses.append(torch.zeros(1, 8, device=device))
        position = torch.tensor([count - 1], dtype=torch.int32, device=device)
        begin = torch.tensor([first], dtype=torch.int32, device=device)
        outs.append(
            attention.decode_attention(
                query, paged.cache, position, begin, paged.blocks, splits=None, lse=lses[-1]
            ).view(8, 64)
        )
    weights = torch.stack(lses[:2]).softmax(0)[:, 0, :, None]
    assert_close(outs[0] * weights[0] + outs[1] * weights[1], outs[2], torch.float32)
    assert_close(torch.logaddexp(lses[0], lses[1]), lses[2], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [96, 576, 2048])
def test_rms_norm(hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    rows, residual = torch.randn(2, 5, hidden, device=device).to(dtype)
    weight = torch.randn(hidden, device=device).to(dtype)
    assert_close(layers.rms_norm(rows, weight, 1e-5), reference.rms_norm(rows, weight, 1e-5), dtype)
    own, theirs = residual.clone(), residual.clone()
    got = layers.rms_norm(rows, weight, 1e-5, own)
    assert_close(got, reference.rms_norm(rows, weight, 1e-5, theirs), dtype)
    # The interpreter passes bfloat16 off where a card rounds.
    assert_close(own, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [31, 1024, 1500])
def test_silu_mul(width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = (20 * torch.randn(3, 2 * width, device=device)).to(dtype)
    assert_close(layers.silu_mul(gate_up), reference.silu_mul(gate_up), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 128), (3, 64), (4, 128), (8, 64), (4, 96)])
@pytest.mark.parametrize("norms", [False, True])
def test_rotate_and_write(
    norms: bool, group: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [1, 64, 65, 130, 7]
    paged = Paged(lengths, 2, head_dim, dtype, device)
    paged.positions[4] = -1
    angles = torch.rand(200, head_dim // 2, device=device) * 6
    qkv = torch.randn(5, (group * 2 + 4) * head_dim, device=device).to(dtype)
    qkv[2, -3] = torch.inf
    weights = torch.rand(2, head_dim, device=device).to(dtype) if norms else (None, None)
    results = []
    for module in (layers, reference):
        own, cache = qkv.clone(), paged.cache.clone()
        module.rotate_and_write(
            own,
            angles.cos(),
            angles.sin(),
            paged.positions,
            paged.first,
            paged.blocks,
            cache,
            heads=2 * group,
            q_norm=weights[0],
            k_norm=weights[1],
            eps=1e-6,
        )
        results.append((own, cache))
    (got, cache), (wanted, wanted_cache) = results
    limit = TOLERANCE[dtype]
    for ours, theirs in ((got, wanted), (cache, wanted_cache)):
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=limit, atol=limit, equal_nan=True
        )
    assert torch.equal(got[4], qkv[4])
    page = int(paged.blocks[paged.first[2] + 1])
    assert cache[page, 0, 1, 0].isnan().any()
    assert cache[page, 1, 1, 0].isfinite().all()


def sample_arguments(
    device: torch.device, rows: list[dict[str, Any]], vocab: int
) -> dict[str, Any]:
    """The arguments of `sample` for rows of parameters."""

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([row.get(name, default) for row in rows], dtype=dtype, device=device)

    return {
        "vocab_size": vocab,
        "temperatures": column("temperature", 1.0, torch.float32),
        "top_k": column("top_k", vocab, torch.int32),
        "top_p": column("top_p", 1.0, torch.float32),
        "log_min_p": column("min_p", 0.0, torch.float32).log(),
        "streams": torch.tensor(
            [noise.stream_of(row.get("seed", 7)) for row in rows], dtype=torch.int64, device=device
        ),
        "indices": column("index", 0, torch.int32),
        "tokens": torch.full((len(rows),), -1, dtype=torch.int32, device=device),
        "best": torch.zeros(len(rows), device=device),
    }


def sample_with(module: Any, logits: torch.Tensor, given: dict[str, Any]) -> tuple[Any, Any]:
    own = {**given, "tokens": given["tokens"].clone(), "best": given["best"].clone()}
    module.sample(logits, **own)
    return own["tokens"].tolist(), own["best"].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [40, 2500])
def test_sampling(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(3)
    rng = random.Random(5)
    rows: list[dict[str, Any]] = [{"temperature": 0.0}]
    for seed in range(13):
        rows.append(
            {
                "temperature": rng.choice([0.3, 1.0, 1.7]),
                "top_k": rng.choice([1, 3, 30, vocab, vocab + 5]),
                "top_p": rng.choice([1.0, 0.9, 0.5, 0.01]),
                "min_p": rng.choice([0.0, 0.0, 0.05]),
                "seed": (seed << 40) + seed,
                "index": rng.choice([0, 1, 1000]),
            }
        )
    # Wider than the vocabulary: what is beyond it is never chosen.
    logits = (3 * torch.randn(len(rows), vocab + 7, device=device)).to(dtype)
    logits[:, vocab:] = 100
    given = sample_arguments(device, rows, vocab)
    wanted = sample_with(reference, logits, given)
    assert sample_with(sampling, logits, given) == wanted
    assert len(set(wanted[0])) > 5


def test_the_noise_is_that_of_the_engine(device: torch.device) -> None:
    """Equal logits, so that the noise alone decides, for large seeds and some indices."""
    rows = [{"seed": seed * 2**31 + 5, "index": seed % 9} for seed in range(60)]
    logits = torch.zeros(60, 700, device=device)
    got, _ = sample_with(sampling, logits, sample_arguments(device, rows, 700))
    keys = [noise.noise_key(row["seed"], row["index"]) for row in rows]
    assert got == noise.gumbel_noise(keys, 700, device).argmax(1).tolist()


def test_the_noise_decides_over_many_tiles(device: torch.device) -> None:
    """Noise is not computed for most tokens, as they cannot win; all that could must have it."""
    vocab = 5 * sampling._NOISE_TILE + 13
    torch.manual_seed(8)
    rows = [{"seed": 11 * seed, "temperature": [1.0, 1e-4, 3.0][seed % 3]} for seed in range(9)]
    logits = torch.randn(9, vocab, device=device) * 0.5 - 20
    logits[3:6] = logits[3:6].round()
    given = sample_arguments(device, rows, vocab)
    wanted = sample_with(reference, logits, given)
    assert sample_with(sampling, logits, given) == wanted
    assert len({token // sampling._NOISE_TILE for token in wanted[0]}) > 3


def test_sampling_without_finite_logits(device: torch.device) -> None:
    logits = torch.randn(4, 50, device=device)
    logits[0, 3] = torch.nan
    logits[1] = -torch.inf
    logits[2, 4] = torch.inf
    given = sample_arguments(device, [{"top_p": 0.5}] * 4, 50)
    tokens, best = sample_with(sampling, logits, given)
    assert best[:3] == [math.inf, -math.inf, math.inf]
    assert math.isfinite(best[3])
    assert all(0 <= token < 50 for token in tokens)


def test_ties_go_to_the_lowest_id(device: torch.device) -> None:
    logits = torch.zeros(1, 3000, device=device)
    logits[0, [1100, 20, 2047, 1044]] = 1.0
    assert sample_with(sampling, logits, sample_arguments(device, [{"temperature": 0.0}], 3000))[
        0
    ] == [20]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [33, 1500])
def test_grammar_mask(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.randn(4, vocab, device=device).to(dtype)
    words = torch.randint(-(2**31), 2**31 - 1, (2, -(-vocab // 32)), device=device).int()
    rows = torch.tensor([3, 1], dtype=torch.int32, device=device)
    wanted = logits.clone()
    sampling.mask_logits(logits, rows, words)
    reference.mask_logits(wanted, rows, words)
    assert torch.equal(logits, wanted)
    assert logits[[1, 3]].isneginf().any()
    assert logits[[0, 2]].isfinite().all()
