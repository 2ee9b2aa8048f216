"""Prompts' rows over cached blocks: read where they lie, never copied."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.checkpoints import tiny_llama
from tests.engines import VOCAB, ask
from worker.engine.cuda.cuda_runner import CudaRunner
from worker.engine.cuda.kernels import prefill, reference
from worker.engine.cuda.kernels.reference import tiles_of
from worker.engine.cuda.model import PrefillAttention, Rows
from worker.engine.scheduler import Span, StepPlan
from worker.engine.sequence import Sequence

BLOCK = 64
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Spans:
    """Rows of spans (first position, count), in random blocks of a cache that holds NaN wherever
    nothing was written."""

    def __init__(
        self,
        spans: list[tuple[int, int]],
        group: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_heads: int = 2,
    ) -> None:
        rng = random.Random(1)
        torch.manual_seed(0)
        counts = [-(-(start + count) // BLOCK) for start, count in spans]
        ids = rng.sample(range(sum(counts) + 3), sum(counts))
        cache = torch.full((sum(counts) + 3, 2, kv_heads, BLOCK, head_dim), torch.nan)
        begin, rows = 0, 0
        positions: list[int] = []
        first: list[int] = []
        self.spans: list[tuple[int, int, int]] = []
        for (start, count), blocks in zip(spans, counts, strict=True):
            for position in range(start + count):
                cache[ids[begin + position // BLOCK], :, :, position % BLOCK] = torch.randn(
                    2, kv_heads, head_dim
                )
            positions += range(start, start + count)
            first += [begin] * count
            self.spans.append((rows, count, start))
            begin, rows = begin + blocks, rows + count
        self.cache = cache.to(dtype).to(device)
        self.positions, self.first, self.blocks = (
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in (positions, first, ids)
        )
        heads = kv_heads * group
        # Strided as it is within the joined queries, keys and values.
        wide = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(dtype).to(device)
        self.query = wide[:, : heads * head_dim].view(rows, heads, head_dim)
        self.tiles = torch.from_numpy(tiles_of(self.spans, group, dtype)).to(device)

    @property
    def given(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.cache, self.positions, self.first, self.blocks


def assert_close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), wanted.float(), rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_prefill_attention(
    group: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Whole prompts, and pieces that begin at, before and behind the end of a block."""
    given = [(0, 70), (64, 3), (63, 2), (130, 90), (0, 2), (191, 1)]
    spans = Spans(given, group, head_dim, dtype, device, kv_heads=2 if group < 4 else 1)
    got = prefill.prefill_attention(*spans.given, spans.tiles)
    assert_close(got, reference.prefill_attention(*spans.given, spans.tiles), dtype)
    # The reference, against another one: each row as if it decoded.
    rows = reference.decode_attention(*spans.given, splits=None)
    assert_close(got, rows, dtype)


def test_tiles_cover_each_row_once_and_the_longest_come_first() -> None:
    for group, dtype in ((1, torch.bfloat16), (4, torch.bfloat16), (4, torch.float32)):
        tiles = tiles_of([(0, 300, 0), (300, 1, 299), (301, 129, 0)], group, dtype).tolist()
        rows = sorted(row for begin, count in tiles for row in range(begin, begin + count))
        assert rows == list(range(430))
        most = (128 if dtype == torch.bfloat16 else 64) // group
        assert max(count for _, count in tiles) == most
        assert tiles[0] == [300, 1]
        assert tiles[1][0] == (300 - 1) // most * most
    assert tiles_of([(0, 2, 9)], 200, torch.bfloat16).tolist() == [[1, 1], [0, 1]]


# In the runner.


class CountingKernels:
    """The references, which count the calls of paged prefill attention."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def prefill_attention(self, *given: Any) -> torch.Tensor:
        self.calls += 1
        return reference.prefill_attention(*given)


def attention_of(
    spans: list[tuple[int, int]], varlen: Any, kernels: Any, device: torch.device
) -> tuple[PrefillAttention, torch.Tensor, Spans, torch.Tensor]:
    """The rows' attention by `PrefillAttention`, on the joined queries, keys and values."""
    shape = CudaRunner(
        tiny_llama(), kernels=reference, vocab_size=VOCAB, max_sequences=4, max_rows=64, context=64
    )._model.shape
    group = shape.heads // shape.kv_heads
    made = Spans(spans, group, shape.head_dim, torch.float32, device, kv_heads=shape.kv_heads)
    positions = made.positions.long()
    pages = made.blocks[made.first + positions // BLOCK].long()
    written = made.cache[pages, :, :, positions % BLOCK].flatten(1)
    qkv = torch.cat([made.query.flatten(1), written], dim=1)
    rows = Rows(made.positions, made.positions, made.first, made.blocks)
    attend = PrefillAttention(shape, spans, rows, kernels, varlen, torch.float32)
    return attend, attend(qkv, made.cache), made, qkv


def varlen_by_torch(
    query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *most: int
) -> torch.Tensor:
    """`varlen_attn` of whole prompts in plain torch, which checks its arguments."""
    assert torch.equal(cu_q, cu_k)
    assert len(query) == len(key) == len(value) == int(cu_q[-1])
    assert most == (int(cu_q.diff().max()),) * 2
    group = query.shape[1] // key.shape[1]
    outs = []
    for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        q, k, v = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        k, v = (part.repeat_interleave(group, dim=0) for part in (k, v))
        outs.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    return torch.cat(outs, dim=1).transpose(0, 1)


@pytest.mark.parametrize("varlen", [None, varlen_by_torch])
@pytest.mark.parametrize(
    ("spans", "calls"),
    [([(0, 40), (0, 7)], 0), ([(0, 40), (0, 7), (64, 5), (70, 3)], 1), ([(64, 5), (3, 70)], 1)],
)
def test_whole_prompts_are_read_from_the_step_and_others_from_pages(
    spans: list[tuple[int, int]], calls: int, varlen: Any, device: torch.device
) -> None:
    kernels = CountingKernels()
    attend, out, made, _ = attention_of(spans, varlen, kernels, device)
    assert attend.rows == len(made.query)
    assert_close(out, reference.decode_attention(*made.given, splits=None), torch.float32)
    assert kernels.calls == (1 if varlen is None else calls)


def test_a_cached_prefix_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many prompts after one long prefix: no tensor as large as their keys is ever made."""
    largest = [0]

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                largest[0] = max(largest[0], out.numel())
            return out

    kernels = CountingKernels()
    runner = CudaRunner(
        tiny_llama(), kernels=kernels, vocab_size=VOCAB, max_sequences=16, max_rows=64, context=256
    )
    runner.make_cache(20)
    monkeypatch.setattr(
        kernels,
        "prefill_attention",
        lambda query, *given: query.new_zeros(len(query), query.shape[1] * query.shape[2]),
        raising=False,
    )
    shared = [0, 1]
    spans = []
    for order in range(16):
        sequence = Sequence(ask((*[7] * 128, 1, 2, order)), 0, order)
        sequence.block_ids = [*shared, 2 + order]
        spans.append(Span(sequence, 128, 3))
    runner.launch(StepPlan(spans))()
    with Counting():
        runner.launch(StepPlan(spans))()
    shape = runner._model.shape
    # The prefix's keys, once for each sequence, are larger than any tensor that the step needs.
    assert 0 < largest[0] < 16 * 128 * shape.kv_width
