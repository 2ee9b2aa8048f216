"""The kernels that a card gets: each is tested against its reference when a worker starts.

A kernel that does not compile there, wants more shared memory than there is, or gives wrong numbers
is replaced by plain torch where that is possible; a warning says so, and what that costs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Set
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch

from worker.engine import noise
from worker.engine.cuda.groups import TILE_ROWS
from worker.engine.cuda.kernels import reference
from worker.engine.cuda.kernels.reference import Prefixes, splits_of, tiles_of
from worker.engine.model.weights import Shape
from worker.engine.validation import one_line

log = logging.getLogger("nightherd.engine")

BLOCK = 64
"""Positions of a block of the KV cache."""
GROUPS, SAMPLE = "attend_prefixes", "sample"
"""Kernels that a card can do without: see `CudaKernels.missing`."""

_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 2e-4}
_COST_WITHOUT = {
    "rms_norm": "plain torch computes the norms, decoding is a few percent slower",
    "silu_mul": "plain torch computes it, decoding is a few percent slower",
    "mask_logits": "plain torch applies grammars, a little slower",
    "prefill_attention": "plain torch reads cached prefixes, prompts after them take longer",
    GROUPS: "rows with a common prefix each read it by themselves",
    SAMPLE: "torch's sampler samples, and every step is waited for: decoding is slower",
}
"""What it costs to go on without a kernel; any other is needed."""


class CudaKernels(Protocol):
    """`kernels.reference`, or `fused_kernels`: the same functions."""

    missing: Set[str]
    """What does not run on this card. `GROUPS`: `decode_attention` takes no prefixes. `SAMPLE`:
    `sample` is not to be called."""

    decode_attention: Callable[..., torch.Tensor]
    prefill_attention: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    silu_mul: Callable[..., torch.Tensor]
    rotate_and_write: Callable[..., None]
    sample: Callable[..., None]
    mask_logits: Callable[..., None]


def fused_kernels() -> Any:
    """The Triton kernels; raises `ImportError` where there is no Triton."""
    from worker.engine.cuda.kernels import attention, layers, prefill, sampling

    kernels = ModuleType("fused_kernels")
    for module in (attention, layers, prefill, sampling):
        for name in CudaKernels.__annotations__:
            if hasattr(module, name):
                setattr(kernels, name, getattr(module, name))
    vars(kernels)["missing"] = frozenset()
    return kernels


@dataclass(frozen=True, slots=True)
class TrialCase:
    """The model and the device that kernels are tested for."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    head_norms: bool = False
    """Whether the model norms each head before its rotation (Qwen3)."""

    def random(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers, the same on each machine."""
        made = torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))
        return made.to(self.device, dtype or self.dtype)

    def ints(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def paged(self, rows: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, as views of the joined queries, keys and values, and a KV cache."""
        shape = self.shape
        qkv = self.random(rows, shape.query_width + 2 * shape.kv_width)
        query = qkv[:, : shape.query_width].view(rows, shape.heads, shape.head_dim)
        return query, self.random(blocks, 2, shape.kv_heads, BLOCK, shape.head_dim)


class KernelError(Exception):
    """A kernel that nothing can replace does not run."""


@torch.inference_mode()
def select_kernels(case: TrialCase) -> CudaKernels:
    """The Triton kernels that pass their test on the card, and the references of the others.

    Raises `ImportError` without Triton, `KernelError` for one that nothing can replace.
    """
    kernels = fused_kernels()
    # Kernels run on the thread's current device, whatever their tensors are on.
    with torch.cuda.device(case.device):
        for name, trial in TRIALS.items():
            try:
                _compare(case, trial(kernels, case), trial(reference, case))
            except Exception as error:  # whatever Triton, its compiler and the driver raise
                if name not in _COST_WITHOUT:
                    raise KernelError(f"{name}: {one_line(error)}") from error
                log.warning(
                    "the kernel %s cannot be used here (%s): %s; please report it, with the "
                    "versions that nightherd doctor shows",
                    name,
                    one_line(error),
                    _COST_WITHOUT[name],
                )
                if name in (GROUPS, SAMPLE):
                    kernels.missing |= {name}
                else:
                    setattr(kernels, name, getattr(reference, name))
    tested: CudaKernels = kernels
    return tested


def _compare(case: TrialCase, got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        if ours.dtype == torch.int32:
            right = torch.equal(ours, theirs)
        else:
            limit = _TOLERANCE[case.dtype] * (1 + theirs.float().abs())
            near = (ours.float() - theirs.float()).abs() <= limit
            right = bool((near | (ours == theirs)).all())
        if not right:
            raise ArithmeticError("its numbers are not those of plain torch")


def _rms_norm(kernels: Any, case: TrialCase) -> list[torch.Tensor]:
    rows, residual = case.random(3, case.shape.hidden), case.random(3, 1 + case.shape.hidden)
    residual = residual[:, 1:].contiguous()
    weight, eps = case.random(case.shape.hidden), case.shape.norm_eps
    first = kernels.rms_norm(rows, weight, eps)
    return [first, kernels.rms_norm(rows, weight, eps, residual), residual]


def _silu_mul(kernels: Any, case: TrialCase) -> list[torch.Tensor]:
    return [kernels.silu_mul(case.random(3, 2 * case.shape.intermediate))]


def _rotate_and_write(kernels: Any, case: TrialCase) -> list[torch.Tensor]:
    shape = case.shape
    qkv = case.random(4, shape.query_width + 2 * shape.kv_width)
    angles = case.random(80, shape.head_dim // 2, dtype=torch.float32)
    cache = torch.zeros(
        4, 2, shape.kv_heads, BLOCK, shape.head_dim, dtype=case.dtype, device=case.device
    )
    norm = case.random(shape.head_dim) if case.head_norms else None
    kernels.rotate_and_write(
        qkv,
        angles.cos(),
        angles.sin(),
        case.ints(0, 65, 70, -1),
        case.ints(0, 1, 1, 0),
        case.ints(2, 3, 0),
        cache,
        heads=shape.heads,
        q_norm=norm,
        k_norm=norm,
        eps=shape.norm_eps,
    )
    return [qkv[:3], cache]


def _decode_attention(kernels: Any, case: TrialCase) -> list[torch.Tensor]:
    """With splits and without: the kernel in two variants, and the one that merges splits."""
    query, cache = case.paged(4, 6)
    positions = [300, 5, 64, -1]
    given = (case.ints(0, 0, 2, 0), case.ints(4, 1, 5, 0, 3, 2))
    splits = _splits(case, positions)
    outs = [
        kernels.decode_attention(query, cache, case.ints(*positions), *given, splits=splits),
        kernels.decode_attention(query, cache, case.ints(200, 5, 64, -1), *given, splits=None),
    ]
    return [out[:3] for out in outs]


def _splits(case: TrialCase, positions: list[int]) -> Any:
    lengths = [position + 1 for position in positions]
    shape = case.shape
    return splits_of(lengths, BLOCK, case.device, heads=shape.heads, head_dim=shape.head_dim)


def _attend_prefixes(kernels: Any, case: TrialCase) -> list[torch.Tensor]:
    """Three rows with five common blocks, and one by itself."""
    query, cache = case.paged(4, 9)
    positions = [330, 100, 320, 383]
    tables = [[0, 1, 2, 3, 4, 5], [8, 7, 0, 0, 0, 0], [0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 7]]
    most = max(1, TILE_ROWS // (case.shape.heads // case.shape.kv_heads))
    tiles = [[begin, min(most, 3 - begin), 0, 5] for begin in range(0, 3, most)]
    prefixes = Prefixes(
        torch.tensor([*tiles, [0, 0, 0, 0]], dtype=torch.int32, device=case.device),
        case.ints(0, 2, 3, 1),
        case.ints(5, 0, 5, 5),
        2,
    )
    return [
        kernels.decode_attention(
            query,
            cache,
            case.ints(*positions),
            case.ints(0, 6, 12, 18),
            case.ints(*(block for table in tables for block in table)),
            splits=_splits(case, positions),
            prefixes=prefixes,
        )
    ]


def _prefill_attention(kernels: Any, case: TrialCase) -> list[torch.Tensor]:
    """A whole prompt, and rows after a cached prefix."""
    query, cache = case.paged(73, 4)
    group = case.shape.heads // case.shape.kv_heads
    tiles = torch.from_numpy(tiles_of([(0, 70, 0), (70, 3, 64)], group, case.dtype))
    return [
        kernels.prefill_attention(
            query,
            cache,
            case.ints(*range(70), 64, 65, 66),
            case.ints(*[0] * 70, *[2] * 3),
            case.ints(3, 1, 0, 2),
            tiles.to(case.device),
        )
    ]


def _sample(kernels: Any, case: TrialCase) -> list[torch.Tensor]:
    """Greedy and sampled tokens, of all tokens and of few, from logits that are far apart."""
    vocab = case.shape.vocab_rows
    logits = 4 * case.random(4, vocab)

    def column(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=case.device)

    tokens, best = case.ints(0, 0, 0, 0), column(0, 0, 0, 0)
    kernels.sample(
        logits,
        vocab,
        column(0.0, 1.0, 0.7, 1.0),
        case.ints(vocab, vocab, 20, vocab),
        column(1.0, 1.0, 1.0, 0.8),
        column(float("-inf"), float("-inf"), float("-inf"), -2.0),
        torch.tensor([noise.stream_of(seed) for seed in range(4)], device=case.device),
        case.ints(0, 1, 2, 3),
        tokens,
        best,
    )
    return [tokens, best]


def _mask_logits(kernels: Any, case: TrialCase) -> list[torch.Tensor]:
    vocab = case.shape.vocab_rows
    logits = case.random(3, vocab)
    words = torch.arange(2 * -(-vocab // 32), dtype=torch.int32, device=case.device) * 40503
    kernels.mask_logits(logits, case.ints(2, 0), words.view(2, -1))
    return [logits]


TRIALS: dict[str, Callable[[Any, TrialCase], list[torch.Tensor]]] = {
    "rms_norm": _rms_norm,
    "silu_mul": _silu_mul,
    "rotate_and_write": _rotate_and_write,
    "decode_attention": _decode_attention,
    GROUPS: _attend_prefixes,
    "prefill_attention": _prefill_attention,
    SAMPLE: _sample,
    "mask_logits": _mask_logits,
}
