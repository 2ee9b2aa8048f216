"""`nightherd checkpoint`: check, download, list, convert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from producer.commands.common import json_option, notice, print_json, table

if TYPE_CHECKING:
    from producer.jobs.status import WorkerView
    from worker.checkpoint.hub.cache import CachedCheckpoint
    from worker.checkpoint.report import CheckpointReport

revision_option = click.option(
    "--revision", metavar="REV", help="A branch, tag or commit on the Hub; by default main."
)


@click.group()
def checkpoint() -> None:
    """Check, download, list and convert LLaMA checkpoints.

    \b
    Example:
      nightherd checkpoint check meta-llama/Llama-3.1-8B-Instruct
    """


@checkpoint.command()
@click.argument("name", metavar="NAME_OR_PATH")
@revision_option
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
    "--sequences",
    type=click.IntRange(1),
    metavar="N",
    help="Sequences as long as the context that must fit into the memory at once.",
)
@json_option
def check(
    name: str,
    revision: str | None,
    device: str,
    dtype: str,
    sequences: int | None,
    as_json: bool,
) -> None:
    """Say what a checkpoint is, and whether a worker here could serve it.

    Loads and downloads no weights. Exits 0 only if a worker could serve it; else each reason is
    told with its remedy.

    \b
    Example:
      nightherd checkpoint check demo
      nightherd checkpoint check meta-llama/Llama-3.1-8B-Instruct --device cuda:0 --sequences 32
      nightherd checkpoint check ./weights/llama --json | jq .memory
    """
    from nightherd.catalogue import checkpoint_key
    from nightherd.errors import CheckpointError
    from nightherd.settings import load_settings
    from worker.checkpoint.report import check
    from worker.kernel_folder import kernels_of

    settings = load_settings()
    report = check(
        checkpoint_key(name, revision),
        home=settings.home,
        device=device,
        dtype=dtype,
        sequences=sequences,
        kernels=kernels_of(settings),
    )
    if as_json:
        print_json(report.as_json())
    elif report.found is not None:
        click.echo(_as_text(report))
    if report.problems:
        for problem in report.problems[:-1]:
            click.echo(f"nightherd: {problem}", err=True)
        raise CheckpointError(report.problems[-1])


@checkpoint.command()
@click.argument("name")
@revision_option
@click.option(
    "--all-files",
    is_flag=True,
    help="Everything in the repository, not only safetensors, configuration and tokenizer.",
)
def download(name: str, revision: str | None, all_files: bool) -> None:
    """Download a checkpoint from the Hub into the cache, and print its folder.

    What was there before is verified and, where it is damaged, fetched again; a download that
    broke off goes on where it stopped. The cache is that of all Hugging Face programs (HF_HOME).

    \b
    Example:
      nightherd checkpoint download meta-llama/Llama-3.2-1B-Instruct
      nightherd checkpoint download meta-llama/Llama-2-7b --all-files
    """
    from nightherd.catalogue import checkpoint_key, hub_name, local_folder
    from nightherd.errors import CheckpointError, UsageError
    from worker.checkpoint.files import meta_format
    from worker.checkpoint.hub import download as downloads
    from worker.checkpoint.hub.repository import look_up

    key = checkpoint_key(name, revision)
    if local_folder(key) is not None:
        raise UsageError(f"{name} is a folder on this machine: there is nothing to download")
    meta = meta_format(key, ())
    if meta is not None and not all_files:
        raise CheckpointError(meta)
    repository = look_up(*hub_name(key))
    click.echo(downloads.download(repository, all_files=all_files, verify=True))


@checkpoint.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the checkpoints in the cache here, and what live workers hold.

    \b
    Example:
      nightherd checkpoint list
      nightherd checkpoint list --json | jq -r '.[].name'
    """
    from worker.checkpoint.hub.cache import as_json as cached_json
    from worker.checkpoint.hub.cache import cache_folder, cached_checkpoints

    cached = cached_checkpoints()
    workers = _live_workers()
    held = {key for one in cached for key in one.keys}
    elsewhere = [view for view in workers if not held & {view.checkpoint, *view.serves}]
    if as_json:
        rows = [cached_json(one, _holders(one.keys, workers)) for one in cached]
        rows += [
            {"name": key, "path": None, "workers": _holders((key,), elsewhere)}
            for key in dict.fromkeys(view.checkpoint for view in elsewhere)
        ]
        print_json(rows)
        return
    if not cached and not elsewhere:
        notice(f"no checkpoints in {cache_folder()}; fetch one: nightherd checkpoint download NAME")
        return
    header = ("CHECKPOINT", "COMMIT", "SIZE", "USED", "STATE", "WORKERS")
    lines = [_row(one, workers) for one in cached]
    for key in dict.fromkeys(view.checkpoint for view in elsewhere):
        lines.append((key, None, None, None, None, ", ".join(_holders((key,), elsewhere))))
    click.echo(table(lines, header))


@checkpoint.command()
@click.argument("source", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--chat/--base",
    "chat",
    default=None,
    help="Write a chat template and its end tokens, or none; by default as DIR's name says.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help="Length of the context, where it is not that of its generation of LLaMA.",
)
def convert(source: Path, target: Path, chat: bool | None, context: int | None) -> None:
    """Convert Meta's original format, or torch's pickles, to safetensors in a new folder.

    DIR holds consolidated.*.pth and params.json, with tokenizer.model in it or in the folder
    above; or pytorch_model*.bin. No code in the files is run. OUT appears when it is whole.

    \b
    Example:
      nightherd checkpoint convert Llama-2-7b-chat llama-2-7b-chat-hf
      nightherd checkpoint convert ./Meta-Llama-3-8B/original ./llama-3-8b --base
    """
    from worker.checkpoint.meta.convert import convert as convert_folder

    made = convert_folder(source, target, chat=chat, context=context)
    click.echo(made.path)
    if made.context is not None:
        kind, other = ("chat", "--base") if made.chat else ("base", "--chat")
        notice(
            f"written as a {kind} model with a context of {made.context:,} tokens; "
            f"{other} and --context would make it another"
        )


def _as_text(report: CheckpointReport) -> str:
    """The report for people: a line a fact."""
    import transformers

    from nightherd.machine import size

    facts: list[tuple[str, str]] = [("checkpoint", report.checkpoint)]
    found = {
        "folder": f"in {report.path}",
        "cache": f"in the cache, commit {(report.commit or '')[:12]}",
        "hub": f"on the Hub, commit {(report.commit or '')[:12]}; not downloaded yet",
    }[report.found or "folder"]
    facts.append(("found", found))
    if report.gated:
        facts.append(
            ("gated", f"yes, access is granted {_GRANTED.get(report.gated, 'on request')}")
        )
    if report.model_type is not None:
        kind = f"{report.architecture or '?'} ({report.model_type})"
        facts.append(("architecture", f"{kind}, transformers {transformers.__version__}"))
    if report.parameters is not None:
        stored = f" stored as {report.stored_dtype}" if report.stored_dtype else ""
        facts.append(
            ("parameters", f"{report.parameters:,}{stored}, {size(report.size_bytes or 0)}")
        )
    if report.context_length is not None:
        facts.append(("context", f"{report.context_length:,} tokens"))
        facts.append(("quantised", report.quantization or "no"))
    if report.tokenizer is not None:
        count = f", {report.vocab_size:,} ids" if report.vocab_size else ""
        facts.append(("tokenizer", f"{report.tokenizer}{count}"))
        facts.append(
            ("chat template", "yes" if report.chat_template else "no: chats need --chat-template")
        )
    facts += _memory(report)
    facts += [("note", note) for note in report.notes]
    facts.append(
        ("verdict", "a worker here can serve it" if report.ok else "cannot be served here")
    )
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts)


_GRANTED = {"auto": "at once on request", "manual": "by its owners, on request"}


def _memory(report: CheckpointReport) -> list[tuple[str, str]]:
    from nightherd.machine import size

    need = report.memory
    if need is None:
        return []
    lines = [f"{size(need.weights)} for weights"]
    if need.per_token:
        count = "1 sequence" if need.sequences == 1 else f"{need.sequences:,} sequences"
        lines.append(
            f"{size(need.cache)} for {count} of {need.context:,} tokens "
            f"({size(need.per_token)} a token)"
        )
    form = report.dtype if report.quantization is None else "as quantised"
    fits = "fits" if need.fits else "does not fit"
    return [
        ("memory", f"{' + '.join(lines)}, {form} on {report.device}"),
        ("available", f"{size(need.available)}: {fits}"),
    ]


def _live_workers() -> list[WorkerView]:
    """Live workers; none, and a notice, where the database cannot be reached."""
    from nightherd.errors import NightherdError
    from producer.commands.common import load, read
    from producer.jobs.status import worker_views

    try:
        _, database = load()
        return read(database, worker_views)
    except NightherdError as error:
        notice(f"which workers hold what is not known: {error}", always=True)
        return []


def _holders(keys: tuple[str, ...], workers: list[WorkerView]) -> list[str]:
    return [view.id for view in workers if {view.checkpoint, *view.serves} & set(keys)]


def _row(one: CachedCheckpoint, workers: list[WorkerView]) -> tuple[Any, ...]:
    from nightherd.machine import size

    return (
        f"{one.name}@{one.revisions[0]}" if one.revisions else one.name,
        one.commit[:12],
        size(one.size_bytes),
        _ago(one.last_used),
        "incomplete" if one.problem else "ready",
        ", ".join(_holders(one.keys, workers)) or None,
    )


def _ago(seconds: float) -> str:
    import time

    from producer.commands.common import duration

    return f"{duration(max(0.0, time.time() - seconds))} ago"
