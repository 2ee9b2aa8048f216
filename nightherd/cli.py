"""The root of the command line: `nightherd COMMAND`. Commands are imported when they run.

Each stands in `COMMANDS` as 'module:attribute' with its one line of help, so that
`nightherd --help` imports nothing but click.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NamedTuple

import click

from nightherd import __version__
from nightherd.errors import InputError, NightherdError


class CommandEntry(NamedTuple):
    """A command by name: where it lives, and its line in `--help`."""

    target: str
    help: str


COMMANDS: dict[str, dict[str, CommandEntry]] = {
    "Jobs": {
        "submit": CommandEntry(
            "producer.commands.jobs.submit:submit", "Enqueue a file of prompts as a job."
        ),
        "run": CommandEntry(
            "worker.commands.run:run", "Submit a file, work on it here, print results."
        ),
        "jobs": CommandEntry("producer.commands.jobs.jobs:jobs", "List jobs."),
        "status": CommandEntry("producer.commands.jobs.jobs:status", "Show how far a job is."),
        "results": CommandEntry(
            "producer.commands.results.results:results", "Print a job's results as JSONL."
        ),
        "show": CommandEntry(
            "producer.commands.results.results:show", "Show everything about one row."
        ),
        "errors": CommandEntry(
            "producer.commands.results.results:errors", "List a job's failed rows."
        ),
        "cancel": CommandEntry(
            "producer.commands.jobs.control:cancel", "End jobs early; results stay."
        ),
        "pause": CommandEntry(
            "producer.commands.jobs.control:pause", "Stop working on jobs for now."
        ),
        "resume": CommandEntry("producer.commands.jobs.control:resume", "Go on with paused jobs."),
        "retry": CommandEntry(
            "producer.commands.jobs.control:retry", "Run a job's failed rows again."
        ),
        "set": CommandEntry(
            "producer.commands.jobs.control:set_", "Change priority, deadline, not-before."
        ),
    },
    "Schedules": {
        "schedule": CommandEntry(
            "producer.commands.schedules.schedule:schedule",
            "Submit jobs by the clock, each scheduled time once.",
        ),
    },
    "Processes": {
        "worker": CommandEntry(
            "worker.commands.worker:worker", "Serve a checkpoint: claim and generate."
        ),
        "workers": CommandEntry("producer.commands.fleet.workers:workers", "List live workers."),
        "beat": CommandEntry(
            "producer.commands.fleet.beat:beat", "Fire schedules and run the housekeeping tick."
        ),
        "doctor": CommandEntry("worker.commands.doctor:doctor", "Check whether a job could run."),
        "bench": CommandEntry("worker.commands.bench:bench", "Measure a checkpoint's speed here."),
    },
    "Set-up": {
        "checkpoint": CommandEntry(
            "worker.commands.checkpoint:checkpoint", "Check, download, convert checkpoints."
        ),
        "db": CommandEntry(
            "producer.commands.setup.db:db", "Upgrade and check the database's schema."
        ),
    },
}

_HELP = """Bulk text generation with LLaMA models on your own GPUs.

\b
Example:
  nightherd run examples/prompts.jsonl --checkpoint demo -o results.jsonl

Exit codes: 0 done, 2 bad input, 3 not found, 4 a service cannot be reached, 1 anything else;
run and status --wait: 5 some rows failed, 6 cancelled or expired.
"""


class LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for section in COMMANDS.values():
            if cmd_name in section:
                return load_command(section[cmd_name])
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if close:
                raise click.UsageError(
                    f"{error.message} Did you mean {close[0]!r}?", ctx=ctx
                ) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.help) for name, entry in section.items()])


def load_command(entry: CommandEntry) -> click.Command:
    """Imports a command; a missing extra is said with the command that installs it."""
    module, _, attribute = entry.target.partition(":")
    try:
        command: Any = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        root = (error.name or "").split(".")[0]
        if root in ("torch", "transformers", "safetensors", "huggingface_hub", "numpy"):
            raise click.ClickException(
                f"this command needs {root}; install it: pip install 'nightherd[worker]'"
            ) from None
        raise
    assert isinstance(command, click.Command)  # noqa: S101 - a wrong table is our own mistake
    return command


@click.group(
    cls=LazyGroup,
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="nightherd")
def cli() -> None:
    pass


def main() -> None:
    """The console script: errors in one line on standard error, with their exit codes."""
    try:
        code = cli.main(prog_name="nightherd", standalone_mode=False)
    except InputError as error:
        _fail(error)
        for problem in error.problems:
            click.echo(f"  {problem}", err=True)
        code = error.exit_code
    except NightherdError as error:
        _fail(error)
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        code = 2
    except click.ClickException as error:
        # One line, with the command whose --help explains it.
        message = " ".join(error.format_message().split())
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        click.echo(f"nightherd: {message}{hint}", err=True)
        code = error.exit_code
    except click.exceptions.Exit as error:
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python must not try to flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: NightherdError) -> None:
    message = " ".join(str(error).split())
    click.echo(f"nightherd: {message}", err=True)
