"""The options that `submit` and `run` share, and what they make of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from producer.commands.common import Seed, TimeOrDelay, notice

if TYPE_CHECKING:
    from models.database import Database
    from nightherd.settings import Settings
    from producer.inputs.reader import Reader
    from producer.jobs.create import SubmittedJob

F = TypeVar("F", bound=Callable[..., Any])

_PARAMETERS: tuple[tuple[str, type, str], ...] = (
    ("max-tokens", int, "Tokens to generate, at most; 256 if not given."),
    ("min-tokens", int, "No end before so many tokens."),
    ("temperature", float, "0 is greedy; 1 if neither you nor the checkpoint sets it."),
    ("top-p", float, "Sample from the likeliest tokens that make up this probability."),
    ("top-k", int, "Sample from so many likeliest tokens."),
    ("min-p", float, "Drop tokens less likely than this share of the likeliest."),
    ("repetition-penalty", float, "Above 1 discourages what prompt or output has."),
    ("presence-penalty", float, "Subtracted once from tokens that the output has."),
    ("frequency-penalty", float, "Subtracted for each time that the output has a token."),
    ("n", int, "Samples for each prompt."),
    ("logprobs", int, "Store log-probabilities, with so many alternatives."),
)

_JOB_OPTIONS = (
    click.option("--checkpoint", default="demo", show_default=True, metavar="PATH|NAME",
                 help="A folder, `org/name[@revision]` on the Hub, or `demo`."),
    click.option("--name", help="A name for `jobs` and `status`."),
    click.option("--priority", type=click.IntRange(-1000, 1000), default=0, show_default=True,
                 help="Higher runs first."),
    click.option("--not-before", type=TimeOrDelay(),
                 help="Start no earlier: 2026-12-24T18:00, or a delay as 90m, 8h, 2d."),
    click.option("--deadline", type=TimeOrDelay(), help="End the job then, done or not."),
    click.option("--seed", type=Seed(),
                 help="For all random choices; drawn and shown if not given."),
    click.option("--on-complete", metavar="URL",
                 help="Tell URL (or the one in a variable, env:NAME) when the job is completed."),
    click.option("--on-failure", metavar="URL",
                 help="Tell URL of failed rows, or that the job was cancelled or expired."),
)  # fmt: skip

_INPUT_OPTIONS = (
    click.option("--format", "input_format", type=click.Choice(["auto", "jsonl", "text"]),
                 default="auto", show_default=True, help="How FILE is read."),
    click.option("--template", metavar="TEXT",
                 help="A Jinja template over each row's columns, as 'Summarise: {{ text }}'."),
    click.option("--system", metavar="TEXT",
                 help="A system message, a template too; makes each row a chat."),
    click.option("--chat", is_flag=True, help="Send each prompt as a chat's user message."),
    click.option("--task", metavar="NAME",
                 type=click.Choice(
                     ["generate", "summarize", "translate", "answer", "classify", "extract"]),
                 help="A ready-made template: generate, summarize, translate, answer, classify, "
                      "extract."),
    click.option("--task-arg", "task_args", multiple=True, metavar="KEY=VALUE",
                 help="translate: target_language=German (needed), source_language=…"),
    click.option("--labels", metavar="A,B,…", help="The labels of --task classify."),
    click.option("--schema", metavar="FILE|JSON",
                 help="The JSON schema of --task extract."),
    click.option("--keep", multiple=True, metavar="COLUMN",
                 help="Keep this column beside the request."),
    click.option("--ignore-unknown", is_flag=True, help="Drop columns that mean nothing here."),
)  # fmt: skip

_MORE_PARAMETERS = (
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text."),
    click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True,
                 help="End at this token."),
    click.option("--ignore-eos", is_flag=True, help="Do not end at the end of sequence."),
    click.option("--param", "params", multiple=True, metavar="NAME=JSON",
                 help="Any other parameter, as logit_bias='{\"13\": -100}'; "
                      "docs/parameters.md has them all."),
)  # fmt: skip


def submit_options(command: F) -> F:
    """All options of a submission, in the order of `--help`."""
    parameters = tuple(
        click.option(f"--{name}", type=kind, help=text) for name, kind, text in _PARAMETERS
    )
    decorated = command
    for option in reversed((*_JOB_OPTIONS, *_INPUT_OPTIONS, *parameters, *_MORE_PARAMETERS)):
        decorated = option(decorated)
    return decorated


@contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, str]]:
    """The input, and its name for messages; standard input is spooled first."""
    import shutil
    import tempfile

    from producer.inputs.reader import open_input

    if path != "-":
        with open_input(path) as file:
            yield file, path
        return
    if sys.stdin.isatty():
        notice("reading prompts from the terminal, one a line; Ctrl-D ends them")
    with tempfile.TemporaryFile() as spool:
        shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.seek(0)
        yield spool, "standard input"


def do_submit(path: str, options: Mapping[str, Any]) -> tuple[Settings, Database, SubmittedJob]:
    """Checks and stores a submission; announces nothing yet."""
    from models.store.webhooks import expect
    from nightherd.settings import load_settings
    from producer.fleet.open_database import open_database
    from producer.inputs.reader import Reader
    from producer.jobs.create import JobOptions, submit
    from producer.jobs.options import prepare, user
    from producer.webhooks.urls import check_urls

    settings = load_settings()
    urls = {"on_complete": options["on_complete"], "on_failure": options["on_failure"]}
    check_urls(settings, **urls)
    _refuse_past_deadline(options["deadline"])
    prepared = prepare(options)
    with _opened(path) as (file, name):
        reader = Reader(file, name, prepared.reading)
        database = open_database(settings)
        with _progress() as progress:
            job = submit(
                database,
                settings,
                reader,
                JobOptions(
                    checkpoint_key=prepared.checkpoint_key,
                    params=prepared.params,
                    seed=options["seed"],
                    name=options["name"],
                    template=prepared.template,
                    priority=options["priority"],
                    not_before=options["not_before"],
                    deadline=options["deadline"],
                    submitted_by=user(),
                ),
                source=name,
                progress=progress,
                before_commit=lambda connection, job_id: expect(connection, job_id=job_id, **urls),
            )
    _say_what_was_assumed(job, prepared.params, reader, options)
    return settings, database, job


def _say_what_was_assumed(
    job: SubmittedJob, params: Mapping[str, Any], reader: Reader, options: Mapping[str, Any]
) -> None:
    if "max_tokens" not in params and "max_length" not in params:
        notice("--max-tokens was not given: at most 256 tokens a sample")
    if options["seed"] is None:
        notice(f"seed {job.seed} (--seed repeats this job)")
    if reader.models:
        named = ", ".join(sorted(reader.models)[:3])
        notice(f"the rows name models ({named}); the job's checkpoint counts, not they")
    if reader.unseen:
        notice(f"--keep: no row has {', '.join(sorted(reader.unseen))}", always=True)


def _refuse_past_deadline(deadline: datetime | None) -> None:
    from nightherd.errors import UsageError

    if deadline is not None and deadline <= datetime.now(UTC):
        raise UsageError(f"--deadline {deadline:%Y-%m-%d %H:%M} UTC has passed already")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None] | None]:
    """A count on standard error for inputs that take a while; nothing without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    import time

    last = time.monotonic()
    shown = False

    def report(phase: str, count: int, total: int | None) -> None:
        nonlocal last, shown
        now = time.monotonic()
        if now - last < 0.5:
            return
        last, shown = now, True
        of = f" of {total:,}" if total is not None else ""
        click.echo(f"\r{phase} {count:,}{of} rows", err=True, nl=False)

    try:
        yield report
    finally:
        if shown:
            click.echo(err=True)
