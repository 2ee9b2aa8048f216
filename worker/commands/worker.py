"""`nightherd worker`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from nightherd.settings import Settings


class SizeOption(click.ParamType[int]):
    """Bytes, as `2GiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from nightherd.settings import parse_size

        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(f"{value!r}: it {error}", param, ctx)


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
@click.option(
    "--serve-as", multiple=True, metavar="NAME", help="Also take jobs submitted for this name."
)
@click.option(
    "--chat-template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A Jinja file to use instead of the checkpoint's chat template.",
)
@click.option(
    "--kv-memory", type=SizeOption(), help="Memory of the KV cache, as 2GiB; a setting too."
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Prompt and output together, at most, where less than the checkpoint's is enough.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads, on a CPU; a setting too.")
@click.option("--only-job", metavar="JOB", help="Work on this job alone; exit when it has ended.")
def worker(
    checkpoint: str,
    device: str,
    dtype: str,
    serve_as: tuple[str, ...],
    chat_template: Path | None,
    kv_memory: int | None,
    context: int | None,
    threads: int | None,
    only_job: str | None,
) -> None:
    """Serve a checkpoint: claim chunks of its jobs and generate, until told to stop.

    One worker a GPU. SIGTERM or Ctrl-C saves what has finished, hands the rest back and exits
    within seconds.

    \b
    Example:
      nightherd worker --checkpoint demo
      nightherd worker --checkpoint meta-llama/Llama-3.1-8B-Instruct --device cuda:0
      nightherd worker --checkpoint /weights/llama --serve-as meta-llama/Llama-2-7b-hf
    """
    from nightherd.catalogue import checkpoint_key
    from nightherd.log import configure_logging
    from nightherd.settings import load_settings
    from worker.process.app import WorkerOptions, serve

    settings = load_settings()
    key, aliases = checkpoint_key(checkpoint), tuple(serve_as_key(name) for name in serve_as)
    if only_job is not None:
        only_job = _open_job(settings, only_job, (key, *aliases))
        if only_job is None:
            return
    configure_logging(settings.log_level)
    serve(
        WorkerOptions(
            checkpoint_key=key,
            serve_as=aliases,
            device=device,
            dtype=dtype,
            chat_template=chat_template,
            only_job=only_job,
            kv_memory=kv_memory,
            context=context,
            threads=threads,
        ),
        settings,
    )
    # All is saved and handed back. The interpreter's own end takes seconds with torch in it, and
    # waits for an engine's last step.
    logging.shutdown()
    os._exit(0)


def _open_job(settings: Settings, prefix: str, keys: tuple[str, ...]) -> str | None:
    """The whole id of a job that asks for one of these checkpoints; None if it has ended.

    A worker would wait for ever for a job that asks for another checkpoint.
    """
    from nightherd.errors import UsageError
    from producer.commands.common import notice, read, resolve
    from producer.fleet.open_database import open_database
    from producer.jobs.status import job_view

    database = open_database(settings)
    try:
        job_id = resolve(database, prefix)
        view = read(database, lambda connection: job_view(connection, job_id))
    finally:
        database.close()
    if not view.open:
        notice(f"job {job_id} is {view.state}; there is nothing to do", always=True)
        return None
    if view.checkpoint not in keys:
        raise UsageError(
            f"job {job_id} asks for the checkpoint {view.checkpoint}, and this worker serves "
            f"{', '.join(keys)}; give --checkpoint {view.checkpoint} or "
            f"--serve-as {view.checkpoint}"
        )
    return job_id


def serve_as_key(name: str) -> str:
    """The key under which jobs name it: a folder on another machine need not exist here."""
    from nightherd.catalogue import checkpoint_key
    from nightherd.errors import CheckpointError

    if name.startswith("/"):
        return name
    try:
        return checkpoint_key(name)
    except CheckpointError:
        return name
