"""Chooses a model's engine, and how much of the machine it may use."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nightherd.engine_kinds import EngineSetting, requested_kind
from nightherd.errors import CheckpointError
from worker.engine.block_manager import BlockManager
from worker.engine.cpu.compiler import CpuKernels, LibraryError
from worker.engine.cpu.level import Level
from worker.engine.cpu.library import BLOCK
from worker.engine.cpu.openmp import end_team
from worker.engine.engine import BatchEngine
from worker.engine.interface import Engine
from worker.engine.model.weights import (
    Shape,
    UnsupportedModelError,
    embedding,
    layer_norms,
    shape_of,
)
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import Scheduler

log = logging.getLogger("nightherd.engine")

_CPU_SHARE, _CPU_MAX = 0.25, 4 << 30
"""The KV cache's part of the available memory, and its maximum in bytes: one machine may have
several workers."""
_CUDA_SHARE = 0.8
CPU_SEQUENCES, CUDA_SEQUENCES, PLAIN_SEQUENCES = 128, 512, 32
CPU_BUDGET, CUDA_BUDGET = 256, 8192
_PROFILE_BLOCKS = 16
"""Of the KV cache, while the card is measured."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user may set; None means the device's default."""

    kind: EngineSetting = "auto"
    max_batch: int | None = None
    """Sequences that run at once."""
    budget: int | None = None
    """Rows of a step, at most."""
    kv_memory: int | None = None
    """Bytes of the KV cache, all taken at the start; None: a default, taken as it fills."""
    context: int | None = None
    """Prompt and output together, at most; the checkpoint's own where that is less."""
    threads: int | None = None
    """Of the CPU."""
    prefix_cache: bool = True
    cpu_level: Level | None = None
    """The instructions that the C kernels may use, if below the machine's own."""
    widen: bool = False
    """The model is in bfloat16 only because the C kernels are fast in it: any other engine on a CPU
    converts it to float32."""


def build_engine(
    model: Any,
    *,
    vocab_size: int,
    context_length: int,
    device: torch.device,
    available: int,
    pad_token_id: int = 0,
    library_folder: Path,
    options: EngineOptions | None = None,
) -> Engine:
    """The fastest engine that covers a transformers model; the model is the engine's from then on.

    `vocab_size` is the tokenizer's, `available` the free bytes of the device now that the model is
    loaded. Raises `CheckpointError` if one sequence as long as `options.context` does not fit into
    the KV cache, or if the engine of `options.kind` cannot be had here.
    """
    options = options or EngineOptions()
    context = min(context_length, options.context or context_length)
    kind = requested_kind(options.kind, device.type)
    if kind in ("cpu", "cuda") and kind != device.type:
        raise CheckpointError(
            f"the engine {kind} does not run on the device {device}; set NIGHTHERD_ENGINE to "
            f"{device.type} or auto"
        )
    options = replace(options, kind=kind)
    if kind != "transformers":
        try:
            return _batch_engine(
                model, vocab_size, context, device, available, library_folder, options
            )
        except UnsupportedModelError as error:
            if kind != "auto":
                raise CheckpointError(
                    f"the engine does not cover this checkpoint: {error}; set NIGHTHERD_ENGINE=auto"
                ) from None
            log.warning(
                "the engine does not cover this checkpoint (%s): transformers' generate runs it, "
                "at a tenth of the speed",
                error,
            )
    from worker.engine.transformers.transformers_engine import TransformersEngine

    if device.type == "cpu":
        _widen(model, options, available)
    end_team()
    return TransformersEngine(
        model,
        vocab_size=vocab_size,
        max_batch=options.max_batch or PLAIN_SEQUENCES,
        pad_token_id=pad_token_id,
        context_length=context,
    )


def _batch_engine(
    model: Any,
    vocab_size: int,
    context: int,
    device: torch.device,
    available: int,
    library_folder: Path,
    options: EngineOptions,
) -> BatchEngine:
    shape = shape_of(model)
    on_cpu = device.type == "cpu"
    sequences = options.max_batch or (CPU_SEQUENCES if on_cpu else CUDA_SEQUENCES)
    budget = max(sequences, options.budget or (CPU_BUDGET if on_cpu else CUDA_BUDGET))
    threads = options.threads or len(os.sched_getaffinity(0))
    runner: ModelRunner | None = None
    if device.type == "cuda" and options.kind in ("auto", "cuda"):
        # By default Triton's cache of compiled kernels is in the user's home.
        os.environ.setdefault("TRITON_CACHE_DIR", str(library_folder / "triton"))
        runner = _cuda_runner(
            model, vocab_size, context, device, available, sequences, budget, options
        )
    memory = _default_memory(on_cpu, available)
    if on_cpu and options.kind in ("auto", "cpu"):
        try:
            runner = _cpu_runner(
                model,
                vocab_size,
                context,
                available,
                sequences,
                budget,
                threads,
                library_folder,
                options,
            )
        except (LibraryError, UnsupportedModelError) as error:
            if options.kind == "cpu":
                raise CheckpointError(f"the kernels cannot be used: {error}") from None
            log.warning(
                "the C kernels cannot be used (%s): plain torch computes, at a third of the speed; "
                "nightherd doctor says whether anything is missing",
                error,
            )
    if runner is None:
        from worker.engine.torch.attention import CACHE_DTYPE
        from worker.engine.torch.torch_runner import TorchRunner

        if on_cpu:
            available = _widen(model, options, available)
            memory = _default_memory(on_cpu, available)
            torch.set_num_threads(threads)
        blocks = _blocks(shape, CACHE_DTYPE, context, sequences, memory, available, options)
        runner = TorchRunner(model, vocab_size=vocab_size, num_blocks=blocks, block_size=BLOCK)
        if on_cpu:
            end_team()
    blocks = runner.num_blocks
    manager = BlockManager(blocks, runner.block_size, prefix_cache=options.prefix_cache)
    log.info(
        "engine %s: a KV cache of %s tokens, %d sequences at once, %d rows a step%s",
        runner.name,
        f"{blocks * runner.block_size:,}",
        sequences,
        budget,
        f", {threads} threads" if on_cpu else "",
    )
    scheduler = Scheduler(
        manager, max_sequences=sequences, budget=budget, separate_prefill=runner.name == "cuda"
    )
    return BatchEngine(runner, scheduler, context)


def _cpu_runner(
    model: Any,
    vocab_size: int,
    context: int,
    available: int,
    sequences: int,
    budget: int,
    threads: int,
    library_folder: Path,
    options: EngineOptions,
) -> ModelRunner:
    """The runner with C kernels; raises `LibraryError` and `UnsupportedModelError`."""
    from worker.engine.cpu.cpu_runner import CpuRunner, block_bytes, check_model
    from worker.engine.cpu.library import load_library

    kernels = CpuKernels.here(library_folder, options.cpu_level)
    shape, dtype = check_model(model), embedding(model).dtype
    size = block_bytes(load_library(kernels), shape, dtype)
    memory = _default_memory(True, available)
    blocks = _blocks(shape, dtype, context, sequences, memory, available, options, block_bytes=size)
    try:
        return CpuRunner(
            model,
            vocab_size=vocab_size,
            num_blocks=blocks,
            max_rows=budget,
            max_sequences=sequences,
            threads=threads,
            kernels=kernels,
            reserve=options.kv_memory is not None,
        )
    except MemoryError as error:
        raise CheckpointError(f"{error}; give less with {_remedy(options)}") from None


def _widen(model: Any, options: EngineOptions, available: int) -> int:
    """Converts the model to float32 if bfloat16 was chosen only for the C kernels; returns the
    available bytes afterwards. Raises `CheckpointError` if they do not suffice."""
    if not options.widen or embedding(model).dtype != torch.bfloat16:
        return available
    more = sum(int(each.nbytes) for each in model.parameters() if each.dtype == torch.bfloat16)
    if more > available:
        raise CheckpointError(
            f"without the C kernels the checkpoint computes in float32, which takes {_size(more)} "
            f"more, and {_size(available)} is free; give --dtype bfloat16, which is many times "
            "slower, or see what nightherd doctor says of the kernels"
        )
    log.info("computes in float32: bfloat16 by plain torch takes many times as long here")
    model.float()
    return available - more


def _cuda_runner(
    model: Any,
    vocab_size: int,
    context: int,
    device: torch.device,
    available: int,
    sequences: int,
    budget: int,
    options: EngineOptions,
) -> ModelRunner | None:
    """The runner with fused kernels; None, with a warning, where they do not run."""
    from worker.engine.cuda.cuda_runner import CudaRunner
    from worker.engine.cuda.graphs import cuda_capture
    from worker.engine.cuda.kernel_selection import BLOCK as CUDA_BLOCK
    from worker.engine.cuda.kernel_selection import TrialCase, select_kernels
    from worker.engine.cuda.memory import measure

    shape, dtype = shape_of(model), embedding(model).dtype
    head_norms = layer_norms(model, 0).q is not None
    try:
        kernels = select_kernels(TrialCase(shape, dtype, device, head_norms))
    except Exception as error:  # whatever Triton, its compiler and the driver raise
        if options.kind == "cuda":
            raise CheckpointError(f"the kernels cannot be used: {error}") from None
        log.warning(
            "the Triton kernels cannot be used (%s): plain torch computes, at a fraction of the "
            "speed; install triton, as torch for CUDA does",
            error,
        )
        return None
    runner = CudaRunner(
        model,
        kernels=kernels,
        vocab_size=vocab_size,
        max_sequences=sequences,
        max_rows=budget,
        context=context,
        capture=cuda_capture(device),
    )
    memory = 0
    if options.kv_memory is None:
        runner.make_cache(_PROFILE_BLOCKS)
        memory = measure(runner, device).cache
    blocks = _blocks(shape, dtype, context, sequences, memory, available, options, block=CUDA_BLOCK)
    runner.make_cache(blocks)
    return runner


def _default_memory(on_cpu: bool, available: int) -> int:
    """Bytes of the KV cache if no setting says how many."""
    if on_cpu:
        return min(int(_CPU_SHARE * available), _CPU_MAX)
    return int(_CUDA_SHARE * available)


def _blocks(
    shape: Shape,
    dtype: torch.dtype,
    context: int,
    sequences: int,
    memory: int,
    available: int,
    options: EngineOptions,
    *,
    block: int = BLOCK,
    block_bytes: int | None = None,
) -> int:
    """The number of the KV cache's blocks, for `memory` bytes unless a setting says how many.

    Raises `CheckpointError` if they do not fit; warns if the whole context does not.
    """
    size = block_bytes or 2 * shape.layers * shape.kv_width * block * dtype.itemsize
    if options.kv_memory is not None:
        memory = options.kv_memory
    whole = -(-context // block)
    blocks = min(memory // size, sequences * whole)
    if options.kv_memory is not None and blocks * size > available:
        raise CheckpointError(
            f"a KV cache of {_size(blocks * size)} does not fit: {_size(available)} is free; give "
            "less with --kv-memory"
        )
    if blocks < 1 or (options.context is not None and blocks < whole):
        raise CheckpointError(
            f"a KV cache of {_size(memory)} holds {blocks * block:,} tokens, and one sequence of "
            f"{context:,} takes {_size(whole * size)}; give more with --kv-memory, or a smaller "
            "--context"
        )
    if blocks < whole:
        log.warning(
            "the KV cache of %s holds %s tokens, fewer than the checkpoint's context of %s: "
            "requests beyond that fail; --kv-memory gives more",
            _size(memory),
            f"{blocks * block:,}",
            f"{context:,}",
        )
    return int(blocks)


def _remedy(options: EngineOptions) -> str:
    """The option or setting to lower first when memory is lacking."""
    return "NIGHTHERD_MAX_BATCH" if options.kv_memory is None else "--kv-memory"


def _size(count: float) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 28 else f"{count / (1 << 20):.1f} MiB"
