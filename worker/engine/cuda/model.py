"""The forward pass on CUDA: fused weights, fused kernels, the paged KV cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from worker.engine.cuda.kernel_selection import BLOCK, CudaKernels
from worker.engine.cuda.kernels.reference import Prefixes, Splits, tiles_of, to_device
from worker.engine.model.linears import Linear, layer_linears, output_linear
from worker.engine.model.weights import (
    Shape,
    embedding,
    final_norm,
    layer_norms,
    rotary_table,
    shape_of,
)

log = logging.getLogger("nightherd.engine")


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's rows on the device, int32 each: see `step.Layout`."""

    tokens: torch.Tensor
    positions: torch.Tensor
    first: torch.Tensor
    blocks: torch.Tensor
    prefixes: Prefixes | None = None
    splits: Splits | None = None


Attend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From (joined queries, keys and values, the layer's cache) to [rows, heads * head_dim]."""


class _CudaLayer:
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

    def __init__(self, model: Any, kernels: CudaKernels) -> None:
        """Takes the weights out of a transformers model, which is of no use afterwards.

        Raises `UnsupportedModelError` for a model that the engine does not cover.
        """
        self.shape = shape_of(model)
        self.kernels = kernels
        self.embedding = embedding(model)
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self._cos, self._sin = rotary_table(model, self.shape.context)
        self._layers: list[_CudaLayer] = []
        for index in range(self.shape.layers):
            self._layers.append(_CudaLayer(model, index))
        self._norm, self._output = final_norm(model), output_linear(model, plain_linear)
        self.caches: list[torch.Tensor] = []

    def make_cache(self, blocks: int) -> None:
        """The KV cache, all zeros: what was never written must be finite."""
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
            normed = self._add_and_norm(residual, layer.input_norm, added)
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
            normed = self._add_and_norm(residual, layer.post_norm, added)
            gate_up = layer.gate_up(normed)
            added = layer.down(kernels.silu_mul(gate_up))
        if added is None:
            raise AssertionError("a model without layers")
        normed = self._add_and_norm(residual[ends], self._norm, added[ends])
        return self._output(normed)

    def _add_and_norm(
        self, residual: torch.Tensor, weight: torch.Tensor, added: torch.Tensor | None
    ) -> torch.Tensor:
        if added is None:
            return self.kernels.rms_norm(residual, weight, self.shape.norm_eps)
        return self.kernels.rms_norm(added, weight, self.shape.norm_eps, residual)

    def decode_attention(self, rows: Rows) -> Attend:
        """Attention of rows that each are the last position of their sequence."""
        shape = self.shape

        def attend(qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            query = qkv[:, : shape.query_width].view(len(qkv), shape.heads, shape.head_dim)
            return self.kernels.decode_attention(
                query,
                cache,
                rows.positions,
                rows.first,
                rows.blocks,
                splits=rows.splits,
                prefixes=rows.prefixes,
            )

        return attend

    def close(self) -> None:
        self._layers, self.caches = [], []
        del self.embedding, self._output


class PrefillAttention:
    """Attention of a step's spans of several rows: rows [0, `rows`) of the step, packed.

    Spans that begin at position 0 come first: the step itself has all their keys and values, which
    `varlen` reads where they are. Spans after a cached prefix read the paged cache.
    """

    def __init__(
        self,
        shape: Shape,
        spans: list[tuple[int, int]],
        rows: Rows,
        kernels: CudaKernels,
        varlen: Callable[..., torch.Tensor] | None,
        dtype: torch.dtype,
    ) -> None:
        """`spans` are (first position, rows); without `varlen` all read the paged cache."""
        self._shape, self._rows, self._kernels, self._varlen = shape, rows, kernels, varlen
        counts = [count for _, count in spans]
        begins = np.cumsum([0, *counts])
        self.rows = int(begins[-1])
        whole = sum(start == 0 for start, _ in spans) if varlen is not None else 0
        self._whole_rows = int(begins[whole])
        device = rows.positions.device
        if whole:
            self._longest = max(counts[:whole])
            self._cu_seqlens = to_device(begins[: whole + 1].astype(np.int32), device)
        if whole < len(spans):
            starts = [start for start, _ in spans]
            later = [*zip(begins[whole:-1].tolist(), counts[whole:], starts[whole:], strict=True)]
            group = shape.heads // shape.kv_heads
            self._tiles = to_device(tiles_of(later, group, dtype), device)

    def __call__(self, qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """[rows, heads * head_dim] of the first rows of `qkv`, already rotated and written."""
        shape, rows, whole = self._shape, self._rows, self._whole_rows
        parts = qkv[: self.rows].view(self.rows, -1, shape.head_dim)
        sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
        query, key, value = torch.split_with_sizes(parts, sizes, dim=1)
        if whole == self.rows:
            return self._attend_whole(query, key, value)
        out = self._kernels.prefill_attention(
            query, cache, rows.positions, rows.first, rows.blocks, self._tiles
        )
        if whole:
            out[:whole] = self._attend_whole(query[:whole], key[:whole], value[:whole])
        return out

    def _attend_whole(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if self._varlen is None:
            raise AssertionError("whole prompts without varlen")
        out = self._varlen(
            query, key, value, self._cu_seqlens, self._cu_seqlens, self._longest, self._longest
        )
        return out.reshape(len(query), -1)


def varlen_attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """`f(query, key, value, cu_q, cu_k, max_q, max_k)`, causal, by torch's flash attention; None,
    with a warning, where it does not run.

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

        if _is_correct(varlen, shape, dtype, device):
            return varlen
        log.warning("torch's varlen_attn gives wrong results here: prefill goes on without, slower")
    except Exception as error:  # whatever torch and driver raise
        log.warning("torch's varlen_attn does not run here (%s): prefill is slower", error)
    return None


def _is_correct(varlen: Any, shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `varlen` gives what plain attention does, for two prompts."""
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    query = torch.randn(17, heads, dim, device=device).to(dtype)
    key, value = torch.randn(2, 17, kv_heads, dim, device=device).to(dtype)
    prompts = (slice(0, 5), slice(5, 17))
    sums = torch.tensor([0, 5, 17], dtype=torch.int32, device=device)
    out = varlen(query, key, value, sums, sums, 12, 12).float()
    wanted = torch.cat([_causal_attention(query[rows], key[rows], value[rows]) for rows in prompts])
    return torch.allclose(out, wanted, atol=0.05, rtol=0.05)


def _causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Plain attention of one prompt, [rows, heads, head_dim], in float32."""
    query, key, value = (part.transpose(0, 1).float()[None] for part in (query, key, value))
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1)
