"""`nightherd bench`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

from producer.commands.common import json_option, notice, print_json, table
from worker.commands.worker import SizeOption

if TYPE_CHECKING:
    import torch

    from nightherd.settings import Settings
    from worker.speed import SpeedReport


@click.command()
@click.option(
    "--checkpoint",
    required=True,
    metavar="PATH|NAME",
    help="A folder, `org/name[@revision]` on the Hub, or `demo`.",
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda:N", help="Where to run."
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    help="Weights' type; auto: bfloat16 where the device computes in it, or the checkpoint is "
    "stored in it and a CPU has the C kernels; else float32.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads, on a CPU; a setting too.")
@click.option(
    "--kv-memory", type=SizeOption(), help="Memory of the KV cache, as 2GiB; a setting too."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.1, max=3600),
    default=16.0,
    show_default=True,
    help="How long to measure, beside the load.",
)
@json_option
def bench(
    checkpoint: str,
    device: str,
    dtype: str,
    threads: int | None,
    kv_memory: int | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Measure how fast a checkpoint generates here, and what the machine's limit is.

    Prompt tokens a second in steps of several sizes, and generated tokens a second for 1, 16, 64
    and 128 sequences at once (1, 64, 256, 512 and 1024 on a GPU); then the settings that suit this
    machine. The limit is that of the matrices alone, at the rate of the fastest matrix product, and
    of reading all weights once a step. Run it on a machine that does nothing else.

    \b
    Example:
      nightherd bench --checkpoint demo
      nightherd bench --checkpoint meta-llama/Llama-3.2-1B --dtype bfloat16 --json
    """
    from nightherd.settings import load_settings

    changes = {"threads": threads, "kv_memory": kv_memory}
    settings = load_settings().model_copy(
        update={name: value for name, value in changes.items() if value is not None}
    )
    facts, report = _measure(checkpoint, device, dtype, settings, seconds)
    if as_json:
        print_json({**facts, **as_dict(report)})
        return
    click.echo("  ".join(str(fact) for fact in facts.values()))
    click.echo(shown(report))


def candidates(on_cpu: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of sequences and budgets that are tried: the device's defaults, less, and, where a
    machine may have use for it, more."""
    from worker.engine.build import CPU_BUDGET, CPU_SEQUENCES, CUDA_BUDGET, CUDA_SEQUENCES

    most, budget = (CPU_SEQUENCES, CPU_BUDGET) if on_cpu else (CUDA_SEQUENCES, CUDA_BUDGET)
    batches = (1, most // 8, most // 2, most) + (() if on_cpu else (2 * most,))
    return batches, (budget // 2, budget, 2 * budget)


def _measure(
    checkpoint: str, device: str, dtype: str, settings: Settings, seconds: float
) -> tuple[dict[str, Any], SpeedReport]:
    """Loads the checkpoint and measures it; first what it is and where it runs."""
    from nightherd.catalogue import checkpoint_key
    from nightherd.errors import CheckpointError
    from nightherd.log import configure_logging
    from worker import speed as measuring
    from worker.checkpoint.device import device_name, only_for_kernels
    from worker.checkpoint.load import open_checkpoint
    from worker.checkpoint.memory import available
    from worker.engine.build import EngineOptions, build_engine
    from worker.engine.model.weights import UnsupportedModelError, embedding, shape_of
    from worker.kernel_folder import kernel_folder, kernels_of

    key = checkpoint_key(checkpoint)
    notice(f"loading {checkpoint}")
    configure_logging("WARNING")
    logging.getLogger("nightherd.kernels").setLevel(logging.INFO)
    kernels = kernels_of(settings)
    opened = open_checkpoint(key, device=device, dtype=dtype, home=settings.home, kernels=kernels)
    model, text = opened.model, opened.text
    torch_device = model.device
    _set_threads(torch_device, settings.threads)
    try:
        shape = shape_of(model.model)
    except UnsupportedModelError as error:
        raise CheckpointError(f"the engine does not cover {checkpoint}: {error}") from None
    notice("measuring the machine")
    limits = measuring.machine_limits(shape, embedding(model.model).dtype, torch_device)
    batches, budgets = candidates(torch_device.type == "cpu")
    engine = build_engine(
        model.model,
        vocab_size=text.vocab_size,
        context_length=text.context_length,
        device=torch_device,
        available=available(torch_device),
        library_folder=kernel_folder(settings),
        options=EngineOptions(
            kind=settings.engine,
            max_batch=max(batches),
            budget=max(budgets),
            kv_memory=settings.kv_memory,
            threads=settings.threads,
            prefix_cache=False,
            cpu_level=settings.cpu_level,
            widen=only_for_kernels(dtype, torch_device, kernels),
        ),
    )
    test = measuring.SpeedTest(engine, text.vocab_size, text.context_length)
    facts = {
        "checkpoint": checkpoint,
        "device": device_name(torch_device),
        "dtype": model.dtype,
        "engine": engine.name,
    }
    engine.start()
    try:
        return facts, measuring.measure(test, limits, batches, budgets, seconds, notice)
    finally:
        engine.stop()


def _set_threads(device: torch.device, threads: int | None) -> None:
    """As many for the measurement of the machine as the engine will have."""
    import os

    import torch

    if device.type == "cpu":
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def as_dict(report: SpeedReport) -> dict[str, Any]:
    """The report as JSON has it."""
    limits = report.limits
    return {
        "prefill": [
            {"token_budget": budget, "tokens_per_second": rate, "limit": limits.prefill}
            for budget, rate in report.prefill.items()
        ],
        "decode": [
            {"batch": batch, "tokens_per_second": rate, "limit": limits.decode(batch)}
            for batch, rate in report.decode.items()
        ],
        "best": {"max_batch": report.best_batch, "token_budget": report.best_budget},
        "machine": {"matrix_flops": limits.flops, "memory_bytes_per_second": limits.bandwidth},
    }


def shown(report: SpeedReport) -> str:
    """The report for people."""
    limits = report.limits
    rows = [
        (f"prefill, {budget} tokens a step", rate, limits.prefill, _share(rate, limits.prefill))
        for budget, rate in report.prefill.items()
    ]
    rows += [
        (f"decode, {batch} at once", rate, limits.decode(batch), _share(rate, limits.decode(batch)))
        for batch, rate in report.decode.items()
    ]
    batch, budget = report.best_batch, report.best_budget
    machine = (
        f"this machine: {limits.flops / 1e9:,.0f} GFLOP/s in such matrices, "
        f"{limits.bandwidth / 1e9:,.1f} GB/s read from memory as large as the weights"
    )
    return "\n".join(
        (
            table(rows, ("", "TOKENS/S", "LIMIT", "SHARE")),
            f"best here: NIGHTHERD_MAX_BATCH={batch} NIGHTHERD_TOKEN_BUDGET={max(batch, budget)}",
            machine,
        )
    )


def _share(rate: float, limit: float) -> str:
    return f"{rate / limit:.0%}"
