"""The model runner for CPUs: weights packed once, and one call of the C kernels a step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import math
import mmap
import sys
from functools import cache
from typing import Any, cast

import numpy as np
import torch

from worker.engine.cpu.compiler import CpuKernels
from worker.engine.cpu.library import BLOCK, Layer, Model, Step, load_library
from worker.engine.cpu.sampling import SamplingTable, chosen_rows, read_choices
from worker.engine.model import weights
from worker.engine.model.weights import (
    HEAD_STEP,
    MAX_HEAD_DIM,
    LayerWeights,
    Shape,
    UnsupportedModelError,
)
from worker.engine.runner import Choices
from worker.engine.scheduler import StepPlan
from worker.engine.sequence import Sequence

log = logging.getLogger("nightherd.engine")

_MADV_POPULATE_WRITE = 23
"""`mmap` has no name for it."""
_HUGE_PAGE = 2 << 20


def check_model(model: Any) -> Shape:
    """The model's shape; raises `UnsupportedModelError` where the kernels do not cover it."""
    shape, dtype = weights.shape_of(model), weights.embedding(model).dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedModelError(f"the kernels do not compute in {dtype}")
    if shape.head_dim % HEAD_STEP or shape.head_dim > MAX_HEAD_DIM:
        raise UnsupportedModelError(f"its heads are of {shape.head_dim}, not of 16, 32, … 256")
    if shape.hidden % HEAD_STEP:
        raise UnsupportedModelError(f"its width, {shape.hidden}, is no multiple of 16")
    # The kernels pack the matrices themselves.
    weights.check_dense(model)
    return shape


def block_bytes(library: ctypes.CDLL, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of one block of the KV cache, for all layers."""
    head = int(library.nightherd_head_bytes(shape.head_dim, dtype == torch.bfloat16))
    return shape.layers * shape.kv_heads * head


class CpuRunner:
    """A `ModelRunner` on the C kernels. It takes the weights out of the transformers model."""

    name = "cpu"
    block_size = BLOCK

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int,
        num_blocks: int,
        max_rows: int,
        max_sequences: int,
        threads: int,
        kernels: CpuKernels,
        reserve: bool = False,
    ) -> None:
        """`max_rows` and `max_sequences`: of one step. `reserve`: the KV cache takes all its memory
        now, not as it fills. Raises `UnsupportedModelError` and `LibraryError`, both before the
        model is touched, and `MemoryError`."""
        self.shape = check_model(model)
        self._library = load_library(kernels)
        self._dtype = weights.embedding(model).dtype
        self._panel = int(self._library.nightherd_panel())
        self.num_blocks = num_blocks
        self.vocab_size = min(vocab_size, self.shape.vocab_rows)
        self._arena = _Arena()
        self._kept: list[torch.Tensor] = []
        """Keeps alive what the kernels have pointers to."""
        self._layers = (Layer * self.shape.layers)()
        for index in range(self.shape.layers):
            self._read_layer(model, index)
        self._model = self._read_model(model, max_rows, max_sequences, threads)
        self._make_caches(reserve=reserve)
        self._runner = self._library.nightherd_create(ctypes.byref(self._model))
        if not self._runner:
            raise MemoryError("the kernels have no memory for a step")

        self._sampling = SamplingTable(max_sequences, self.vocab_size)
        width = -(-self.shape.context // BLOCK)
        self._arrays = {
            name: np.zeros(size, np.int32)
            for name, size in (
                *((name, max_rows) for name in ("token_ids", "positions", "table_rows", "lasts")),
                *((name, max_sequences) for name in ("chosen_rows", "sampling_rows")),
            )
        }
        self._tables = np.zeros((max_sequences, width), np.int32)
        self._chosen = chosen_rows(max_sequences)
        self._step = Step(
            **{name: array.ctypes.data for name, array in self._arrays.items()},
            tables=self._tables.ctypes.data,
            table_width=width,
            chosen=self._chosen.ctypes.data,
        )

    def execute(self, plan: StepPlan) -> Choices:
        """Runs the step in C, without the GIL."""
        choosing = self._fill(plan)
        step = self._step
        step.sampling = self._sampling.rows.ctypes.data
        if self._library.nightherd_step(self._runner, ctypes.byref(step)):
            raise MemoryError("the kernels ran out of memory")
        return read_choices(self._chosen[: len(choosing)], choosing)

    def forget(self, sequence: Sequence) -> None:
        self._sampling.forget(sequence)

    def lost(self) -> bool:
        return False

    def close(self) -> None:
        if self._runner:
            self._library.nightherd_destroy(self._runner)
            self._runner = None
        self._kept.clear()

    def _fill(self, plan: StepPlan) -> list[Sequence]:
        """Writes the plan into the step's arrays; returns the sequences that choose."""
        token_ids, positions = self._arrays["token_ids"], self._arrays["positions"]
        table_rows, lasts = self._arrays["table_rows"], self._arrays["lasts"]
        ids: list[int] = []
        starts: list[int] = []
        choosing: list[Sequence] = []
        chosen: list[int] = []
        row = 0
        lasts[:] = 0
        for index, span in enumerate(plan.spans):
            sequence = span.sequence
            self._tables[index, : len(sequence.block_ids)] = sequence.block_ids
            if span.count == 1:
                ids.append(sequence.token_ids[span.start])
                starts.append(span.start)
                table_rows[row] = index
            else:
                ids += sequence.token_ids[span.start : span.start + span.count]
                starts += range(span.start, span.start + span.count)
                table_rows[row : row + span.count] = index
            row += span.count
            lasts[row - 1] = 1
            if span.chooses:
                choosing.append(sequence)
                chosen.append(row - 1)
        token_ids[:row] = ids
        positions[:row] = starts
        self._arrays["chosen_rows"][: len(chosen)] = chosen
        self._arrays["sampling_rows"][: len(chosen)] = [
            self._sampling.row_of(sequence) for sequence in choosing
        ]
        self._step.rows = row
        self._step.chosen_count = len(chosen)
        return choosing

    # Weights.

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _read_layer(self, model: Any, index: int) -> None:
        given = weights.layer_weights(model, index)
        layer = self._layers[index]
        layer.qkv = self._keep(self._packed(torch.cat([given.q, given.k, given.v])))
        layer.o = self._keep(self._packed(given.o))
        layer.gate_up = self._keep(self._packed(_interleaved(given.gate, given.up, self._panel)))
        layer.down = self._keep(self._packed(given.down))
        for name, vector in _vectors(given, self._panel).items():
            if vector is not None:
                setattr(layer, name, self._keep(_padded(vector.float(), self._panel)))
        weights.drop_layer(model, index)

    def _make_caches(self, *, reserve: bool) -> None:
        """Call it last: before, the checkpoint's file is in memory beside the packed weights."""
        size = self.num_blocks * block_bytes(self._library, self.shape, self._dtype)
        size //= self.shape.layers
        for layer in self._layers:
            layer.cache = self._keep(_map(size, reserve=reserve))

    def _read_model(self, model: Any, max_rows: int, max_sequences: int, threads: int) -> Model:
        shape = self.shape
        cos, sin = weights.rotary_table(model, shape.context)
        embedding, output = weights.embedding(model), weights.output_layer(model)
        tied = embedding.data_ptr() == output.data_ptr()
        packed = self._packed(output)
        described = Model(
            layer=cast(Any, self._layers),
            final_norm=self._keep(_padded(weights.final_norm(model).float(), self._panel)),
            cosines=self._keep(cos),
            sines=self._keep(sin),
            embedding=None if tied else self._keep(embedding.contiguous()),
            output=self._keep(packed),
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            vocab_size=self.vocab_size,
            vocab_rows=shape.vocab_rows,
            bfloat16=self._dtype == torch.bfloat16,
            max_rows=max(max_rows, max_sequences),
            max_chosen=max_sequences,
            threads=threads,
            norm_eps=shape.norm_eps,
        )
        for parameter in model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        return described

    def _packed(self, matrix: torch.Tensor) -> torch.Tensor:
        """[outputs, inputs] as the kernels read it, both filled up by zeros."""
        wide = self._dtype == torch.bfloat16
        deep = int(self._library.nightherd_deep(wide))
        outputs, inputs = matrix.shape
        filled = (outputs + -outputs % self._panel, inputs + -inputs % deep)
        packed = self._arena.empty(filled, self._dtype)
        matrix = matrix.contiguous()
        self._library.nightherd_pack(matrix.data_ptr(), outputs, inputs, wide, packed.data_ptr())
        return packed


def _padded(vector: torch.Tensor, to: int) -> torch.Tensor:
    return torch.nn.functional.pad(vector, (0, -len(vector) % to)).contiguous()


def _interleaved(gate: torch.Tensor, up: torch.Tensor, panel: int) -> torch.Tensor:
    """Alternates half a panel of rows of each, so that one panel suffices for SiLU(gate) * up."""
    half = panel // 2
    gate, up = (
        torch.nn.functional.pad(x, (*(0, 0) * (x.dim() - 1), 0, -len(x) % half)) for x in (gate, up)
    )
    parts = [x.view(-1, half, *x.shape[1:]) for x in (gate, up)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _vectors(given: LayerWeights, panel: int) -> dict[str, torch.Tensor | None]:
    """Norms and biases by the field names of `library.Layer`."""
    qkv = [given.q_bias, given.k_bias, given.v_bias]
    if any(bias is not None for bias in qkv):
        rows = [given.q, given.k, given.v]
        filled = [_bias(bias, matrix) for bias, matrix in zip(qkv, rows, strict=True)]
        qkv_bias = torch.cat(filled)
    else:
        qkv_bias = None
    gate_up_bias = None
    if given.gate_bias is not None or given.up_bias is not None:
        gate_up_bias = _interleaved(
            _bias(given.gate_bias, given.gate), _bias(given.up_bias, given.up), panel
        )
    return {
        "input_norm": given.input_norm,
        "qkv_bias": qkv_bias,
        "q_norm": given.q_norm,
        "k_norm": given.k_norm,
        "o_bias": given.o_bias,
        "post_norm": given.post_norm,
        "gate_up_bias": gate_up_bias,
        "down_bias": given.down_bias,
    }


def _bias(bias: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(matrix), dtype=matrix.dtype) if bias is None else bias


class _Arena:
    """Memory for weights, cut from large pieces: a step reads all weights, and huge pages make that
    up to a tenth faster."""

    _PIECE = 64 << 20
    _LINE = 64

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros, which is not from torch's allocator and is never freed."""
        size = math.prod(shape) * dtype.itemsize
        whole = -(-size // self._LINE) * self._LINE
        if whole > len(self._piece):
            self._piece = _map(max(whole, self._PIECE))
        piece, self._piece = self._piece[:size], self._piece[whole:]
        return piece.view(dtype).view(shape)


def _map(size: int, *, reserve: bool = False) -> torch.Tensor:
    """Zeroed bytes, on huge pages where Linux gives them; they take memory as they are written, or
    all of it now with `reserve`. Raises `MemoryError`."""
    try:
        # Private: memory that is shared gets no huge pages by default.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=flags)
    except OSError as error:
        raise MemoryError(f"no memory for {size:,} bytes: {error.strerror}") from None
    bytes_ = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -bytes_.data_ptr() % _HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    if reserve and sys.platform == "linux":
        try:
            memory.madvise(_MADV_POPULATE_WRITE, begin, size)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise MemoryError("no memory for the KV cache") from None
            _warn_cache_grows(error.strerror or str(error))
    return bytes_[begin : begin + size]


@cache
def _warn_cache_grows(reason: str) -> None:
    log.warning(
        "the KV cache takes its memory as it fills, not now (%s): its first tokens cost up to a "
        "tenth more time; Linux 5.14 and newer can take it at the start",
        reason,
    )
