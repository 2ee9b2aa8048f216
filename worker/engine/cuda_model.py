"""The forward pass on CUDA: fused weights, fused kernels, the paged KV cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from worker.engine.linears import Linear, layer_linears, output_linear
from worker.engine.triton_kernels.reference import Prefixes
from worker.engine.weights import (
    Shape,
    embedding,
    final_norm,
    layer_norms,
    rotary_table,
    shape_of,
)

log = logging.getLogger("nightherd.engine")

BLOCK = 64


class Kernels(Protocol):
    """`triton_kernels.reference`, or `fused_kernels`: the same functions."""

    decode_attention: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    silu_mul: Callable[..., torch.Tensor]
    rotate_and_write: Callable[..., None]
    sample: Callable[..., None]
    mask_logits: Callable[..., None]


def fused_kernels() -> Any:
    """The Triton kernels; raises `ImportError` where there is no Triton."""
    from worker.engine.triton_kernels import attention, layers, sampling

    kernels = ModuleType("fused_kernels")
    for module in (attention, layers, sampling):
        for name in Kernels.__annotations__:
            if hasattr(module, name):
                setattr(kernels, name, getattr(module, name))
    return kernels


@torch.inference_mode()
def kernels_for(device: torch.device) -> Kernels:
    """The Triton kernels, once one of them has run there; raises whatever stands in its way."""
    kernels: Kernels = fused_kernels()
    # Kernels run on the thread's current device, whatever their tensors are on.
    with torch.cuda.device(device):
        rows = torch.ones(2, 64, dtype=torch.bfloat16, device=device)
        out = kernels.rms_norm(rows, rows[0], 1e-5)
    if not torch.allclose(out.float(), rows.float(), atol=0.01):
        raise RuntimeError("a kernel gives wrong results")
    return kernels


@dataclass(frozen=True, slots=True)
class Rows:
    """What the device knows of a step's rows, int32 each: see `cuda_step.Layout`."""

    tokens: torch.Tensor
    positions: torch.Tensor
    first: torch.Tensor
    blocks: torch.Tensor
    prefixes: Prefixes | None = None


Attend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From (joined queries, keys and values, the layer's cache) to [rows, heads * head_dim]."""


class _Layer:
    """A layer's norms and matrices."""

    def __init__(self, model: Any, index: int) -> None:
        norms = layer_norms(model, index)
        self.input_norm, self.post_norm = norms.input, norms.post
        self.q_norm, self.k_norm = norms.q, norms.k
        linears = layer_linears(model, index, plain_linear)
        self.qkv, self.o = linears.qkv, linears.o
        self.gate_up, self.down = linears.gate_up, linears.down


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    return lambda rows: functional.linear(rows, weight, bias)


class CudaModel:
    """Weights, rotary table and KV cache."""

    def __init__(self, model: Any, kernels: Kernels) -> None:
        """Takes the weights out of a transformers model, which is of no use afterwards.

        Raises `UnsupportedModelError` for a model that the engine does not cover.
        """
        self.shape = shape_of(model)
        self.kernels = kernels
        self.embedding = embedding(model)
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self._cos, self._sin = rotary_table(model, self.shape.context)
        self._layers: list[_Layer] = []
        for index in range(self.shape.layers):
            self._layers.append(_Layer(model, index))
        self._norm, self._output = final_norm(model), output_linear(model, plain_linear)
        self.caches: list[torch.Tensor] = []

    def make_cache(self, blocks: int) -> None:
        """Zeros: what is never written must be finite."""
        self.caches = []
        shape = (blocks, 2, self.shape.kv_heads, BLOCK, self.shape.head_dim)
        self.caches = [
            torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self._layers
        ]

    def forward(self, rows: Rows, ends: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Writes keys and values of all rows; the logits of rows `ends`: [ends, vocab_rows]."""
        shape, kernels = self.shape, self.kernels
        residual = functional.embedding(rows.tokens, self.embedding)
        added: torch.Tensor | None = None
        for layer, cache in zip(self._layers, self.caches, strict=True):
            normed = self._norm_of(residual, layer.input_norm, added)
            qkv = layer.qkv(normed)
            kernels.rotate_and_write(
                qkv,
                self._cos,
                self._sin,
                rows.positions,
                rows.first,
                rows.blocks,
                cache,
                heads=shape.heads,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=shape.norm_eps,
            )
            added = layer.o(attend(qkv, cache))
            normed = self._norm_of(residual, layer.post_norm, added)
            gate_up = layer.gate_up(normed)
            added = layer.down(kernels.silu_mul(gate_up))
        if added is None:
            raise AssertionError("a model without layers")
        normed = self._norm_of(residual[ends], self._norm, added[ends])
        return self._output(normed)

    def _norm_of(
        self, residual: torch.Tensor, weight: torch.Tensor, added: torch.Tensor | None
    ) -> torch.Tensor:
        if added is None:
            return self.kernels.rms_norm(residual, weight, self.shape.norm_eps)
        return self.kernels.rms_norm(added, weight, self.shape.norm_eps, residual)

    def decode_attention(self, rows: Rows, splits: int) -> Attend:
        """For rows that each are the last of their sequence."""
        shape = self.shape

        def attend(qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            query = qkv[:, : shape.query_width].view(len(qkv), shape.heads, shape.head_dim)
            return self.kernels.decode_attention(
                query,
                cache,
                rows.positions,
                rows.first,
                rows.blocks,
                splits=splits,
                prefixes=rows.prefixes,
            )

        return attend

    def close(self) -> None:
        self._layers, self.caches = [], []
        del self.embedding, self._output


class PrefillAttention:
    """Attention of a step's spans of several rows: rows [0, `rows`) of the step, packed."""

    def __init__(
        self,
        shape: Shape,
        spans: Many[tuple[int, int, Many[int]]],
        device: torch.device,
        varlen: Callable[..., torch.Tensor] | None,
    ) -> None:
        """`spans` are (first position, rows, block ids); without `varlen` plain attention computes,
        span by span."""
        self._shape, self._spans, self._varlen = shape, spans, varlen
        counts = np.array([count for _, count, _ in spans])
        ends = np.array([start + count for start, count, _ in spans])
        self.rows = int(counts.sum())
        self._most = int(counts.max(initial=0)), int(ends.max(initial=0))
        self._cu_q, self._cu_k = (_sent(_cumulated(sizes), device) for sizes in (counts, ends))
        self._fresh = varlen is not None and bool((counts == ends).all())
        """Whether the step itself has all keys and values."""
        if not self._fresh:
            # Of each key, in order: its block and its place there.
            places = [np.arange(end) for end in ends]
            blocks = [
                np.array(ids, np.int64)[place // BLOCK]
                for (_, _, ids), place in zip(spans, places, strict=True)
            ]
            nothing = np.empty(0, np.int64)
            self._blocks = _sent(np.concatenate([nothing, *blocks]), device)
            self._places = _sent(np.concatenate([nothing, *places]) % BLOCK, device)

    def __call__(self, qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """[rows, heads * head_dim] of the first rows of `qkv`, already rotated and written."""
        shape = self._shape
        parts = qkv[: self.rows].view(self.rows, -1, shape.head_dim)
        sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
        query, key, value = torch.split_with_sizes(parts, sizes, dim=1)
        if not self._fresh:
            key = cache[:, 0][self._blocks, :, self._places]
            value = cache[:, 1][self._blocks, :, self._places]
        if self._varlen is None:
            return self._plainly(query, key, value)
        out = self._varlen(query, key, value, self._cu_q, self._cu_k, *self._most)
        return out.reshape(self.rows, -1)

    def _plainly(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        outs, row, begin = [], 0, 0
        for start, count, _ in self._spans:
            rows, keys = slice(row, row + count), slice(begin, begin + start + count)
            outs.append(_causal(query[rows], key[keys], value[keys]).reshape(count, -1))
            row, begin = rows.stop, keys.stop
        return torch.cat(outs)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of a sequence's last positions over all: [rows, heads, head_dim], as `query`."""
    places = torch.arange(len(key), device=query.device)
    out = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=places[None] <= places[len(key) - len(query) :, None],
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _cumulated(sizes: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


def _sent(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """On the device, without waiting for what it does now."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def varlen_attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """`f(query, key, value, cu_q, cu_k, max_q, max_k)`, causal from the end, by torch's flash
    attention; None, said once, where it does not run.

    torch 2.11 knows grouped heads without saying so, 2.12 wants `enable_gqa`.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, Any] = {}
        known = inspect.signature(varlen_attn).parameters
        if "window_size" in known:
            options["window_size"] = (-1, 0)
        else:
            options["is_causal"] = True
        if "enable_gqa" in known:
            options["enable_gqa"] = True

        def varlen(*given: Any) -> torch.Tensor:
            out = varlen_attn(*given, **options)
            return out if isinstance(out, torch.Tensor) else out[0]

        if _is_right(varlen, shape, dtype, device):
            return varlen
        log.warning("torch's varlen_attn gives wrong results here: prefill goes on without, slower")
    except Exception as error:  # whatever torch and driver raise
        log.warning("torch's varlen_attn does not run here (%s): prefill is slower", error)
    return None


def _is_right(varlen: Any, shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    """Against plain attention, for two spans, one of them after a cached prefix."""
    query = torch.randn(8, shape.heads, shape.head_dim, device=device).to(dtype)
    key, value = torch.randn(2, 17, shape.kv_heads, shape.head_dim, device=device).to(dtype)
    cu_q, cu_k = (
        torch.tensor(sums, dtype=torch.int32, device=device) for sums in ([0, 5, 8], [0, 5, 17])
    )
    out = varlen(query, key, value, cu_q, cu_k, 5, 12).float()
    wanted = torch.cat(
        [
            _causal(query[rows].float(), key[keys].float(), value[keys].float())
            for rows, keys in ((slice(0, 5), slice(0, 5)), (slice(5, 8), slice(5, 17)))
        ]
    )
    return torch.allclose(out, wanted, atol=0.05, rtol=0.05)
