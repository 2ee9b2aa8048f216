"""The model runner in plain torch, for any CPU and any CUDA device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from worker.engine.model.linears import Linear, layer_linears, output_linear
from worker.engine.model.weights import embedding, final_norm, layer_norms, rotary_table, shape_of
from worker.engine.runner import Choices
from worker.engine.scheduler import Span, StepPlan
from worker.engine.sequence import Sequence
from worker.engine.torch.attention import PagedAttention
from worker.engine.torch.sampler import Sampler

ROW_MULTIPLE = 16
"""Rows of a step are padded to a multiple of it: then matrix products of libraries for the CPU
give a row the same bits whatever the number of rows, up to some number."""
_MAX_TRIED_ROWS = 256


class TorchRunner:
    """Computes all rows of a step, prefill chunks and decode rows alike, in one forward pass."""

    name = "torch"

    @torch.inference_mode()
    def __init__(
        self, model: Any, *, vocab_size: int, num_blocks: int, block_size: int = 32
    ) -> None:
        """Takes the weights out of a transformers model, which is of no use afterwards.

        Raises `UnsupportedModelError` for a model that the engine does not cover.
        """
        self.vocab_size = vocab_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._shape = shape_of(model)
        self._embedding = embedding(model)
        self._device = self._embedding.device
        dtype = self._embedding.dtype
        self._cos, self._sin = rotary_table(model, self._shape.context)
        self._layers: list[_TorchLayer] = []
        for index in range(self._shape.layers):
            self._layers.append(_TorchLayer(model, index, self._shape.norm_eps))
        self._norm = final_norm(model)
        self._output = output_linear(model, self._make_output)
        self._attention = PagedAttention(self._shape, num_blocks, block_size, dtype, self._device)
        self._sampler = Sampler(vocab_size, self._device)

    def _make_output(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        # If it is the embedding itself, a packed copy would take the memory twice.
        return _Linear(weight, bias, pack=weight.data_ptr() != self._embedding.data_ptr())

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Choices:
        """Computes all positions of the plan into the KV cache, and chooses the next tokens."""
        if not plan.spans:
            return Choices([], [])
        hidden = self._forward(plan)
        ends = [row for row, span in _last_rows(plan) if span.chooses]
        if not ends:
            return Choices([], [])
        rows = self._tensor(ends + ends[:1] * (_padded(len(ends)) - len(ends)))
        chosen = _rms_norm(hidden.index_select(0, rows), self._norm, self._shape.norm_eps)
        logits = self._output(chosen)[: len(ends), : self.vocab_size]
        return self._sampler.choose(
            logits.float(), [span.sequence for span in plan.spans if span.chooses]
        )

    def forget(self, sequence: Sequence) -> None:
        self._sampler.forget(sequence)

    def lost(self) -> bool:
        """Whether a CUDA error has made the context unusable for good."""
        if self._device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self._device)
        except Exception:  # whatever driver and runtime raise
            return True
        return False

    def close(self) -> None:
        """Frees the weights and the KV cache."""
        self._layers = []
        del self._attention, self._embedding, self._output

    def _forward(self, plan: StepPlan) -> torch.Tensor:
        """The last layer's output, [padded rows, hidden]."""
        rows = _padded(plan.rows)
        tokens: list[int] = []
        for span in plan.spans:
            tokens.extend(span.sequence.token_ids[span.start : span.start + span.count])
        tokens.extend([0] * (rows - len(tokens)))
        positions = self._attention.prepare(plan.spans, rows)
        # [rows, 1, head_dim / 2]: the same for all heads.
        cos, sin = (table.index_select(0, positions)[:, None] for table in (self._cos, self._sin))
        hidden = functional.embedding(self._tensor(tokens), self._embedding)
        for index, layer in enumerate(self._layers):
            hidden = self._attend(index, layer, hidden, cos, sin)
            hidden = layer.feed_forward(hidden)
        return hidden

    def _attend(
        self,
        index: int,
        layer: _TorchLayer,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """The attention half of a layer, with its residual."""
        shape = self._shape
        qkv = layer.qkv(_rms_norm(hidden, layer.input_norm, shape.norm_eps))
        query, key, value = (
            part.reshape(len(hidden), -1, shape.head_dim)
            for part in torch.split_with_sizes(
                qkv, [shape.query_width, shape.kv_width, shape.kv_width], dim=1
            )
        )
        if layer.q_norm is not None:
            query = _rms_norm(query, layer.q_norm, shape.norm_eps)
        if layer.k_norm is not None:
            key = _rms_norm(key, layer.k_norm, shape.norm_eps)
        self._attention.write(index, _rotate(key, cos, sin), value)
        return hidden + layer.o(self._attention.attend(index, _rotate(query, cos, sin)))

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


class _TorchLayer:
    """A layer's norms and matrices."""

    def __init__(self, model: Any, index: int, norm_eps: float) -> None:
        norms, linears = layer_norms(model, index), layer_linears(model, index, _Linear)
        self._norm_eps = norm_eps
        self.input_norm, self._post_norm = norms.input, norms.post
        self.q_norm, self.k_norm = norms.q, norms.k
        self.qkv, self.o = linears.qkv, linears.o
        self._gate_up, self._down = linears.gate_up, linears.down

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The feed-forward half of a layer, with its residual."""
        gate, up = self._gate_up(_rms_norm(hidden, self._post_norm, self._norm_eps)).chunk(2, 1)
        return hidden + self._down(functional.silu(gate) * up)


class _Linear:
    """`x @ weight.T + bias`, in oneDNN's packed layout where torch has it: 1.2 to 2.8 times as
    fast as `functional.linear`, which packs anew in each call."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, pack: bool = True
    ) -> None:
        self._packed = pack and weight.device.type == "cpu" and _packing_works(weight.dtype)
        self._weight = _pack(weight) if self._packed else weight
        self._bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, in] to [rows, out]."""
        if rows.device.type != "cpu":
            return functional.linear(rows, self._weight, self._bias)
        product: Callable[..., torch.Tensor] = _packed_linear if self._packed else functional.linear
        # MKL sums in another order for other numbers of rows, on Intel's CPUs: so always as many.
        most = _packed_rows(rows.dtype) if self._packed else ROW_MULTIPLE
        if len(rows) <= most:
            return product(rows, self._weight, self._bias)
        parts = torch.split(rows, most)
        return torch.cat([product(part, self._weight, self._bias) for part in parts])


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _packed_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


@functools.cache
def _packed_rows(dtype: torch.dtype) -> int:
    """How many rows a packed product may have, at most, for none to depend on their number: by AMX
    oneDNN sums in another order from 48 rows on."""
    given = torch.Generator().manual_seed(0)
    most = _MAX_TRIED_ROWS
    for outputs, inputs in ((512, 512), (576, 1536)):
        weight = _pack(torch.randn(outputs, inputs, generator=given).to(dtype))
        rows = torch.randn(_MAX_TRIED_ROWS, inputs, generator=given).to(dtype)
        parts = torch.split(rows, ROW_MULTIPLE)
        wanted = torch.cat([_packed_linear(part, weight, None) for part in parts])
        for count in range(2 * ROW_MULTIPLE, most + 1, ROW_MULTIPLE):
            if not torch.equal(_packed_linear(rows[:count], weight, None), wanted[:count]):
                most = count - ROW_MULTIPLE
                break
    return most


@functools.cache
def _packing_works(dtype: torch.dtype) -> bool:
    """Whether this torch, on this CPU, has the private operations for packed weights."""
    try:
        rows, weight = torch.eye(ROW_MULTIPLE, dtype=dtype), torch.ones(8, ROW_MULTIPLE).to(dtype)
        out = _packed_linear(rows, _pack(weight), None)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return bool(torch.equal(out, rows @ weight.T))


def _rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In float32, rounded before the weight is multiplied in: as transformers' LlamaRMSNorm."""
    wide = rows.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(rows.dtype)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding that turns halves (Su et al. 2021, as transformers lays it out):
    [rows, heads, head_dim], in float32, rounded once."""
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(heads.dtype)


def _last_rows(plan: StepPlan) -> Iterator[tuple[int, Span]]:
    """(row, span) of each span's last row."""
    row = -1
    for span in plan.spans:
        row += span.count
        yield row, span


def _padded(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
