"""`nightherd run`: submit a file, work on it here if nobody else does, print its results."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from nightherd.errors import NightherdError
from producer.commands.common import notice, read
from producer.commands.jobs.control import publish_wakeups
from producer.commands.jobs.submit_options import do_submit, submit_options
from producer.results.file import open_output, refuse_unwritable, write_rows

if TYPE_CHECKING:
    from models.database import Database
    from nightherd.settings import Settings
    from producer.jobs.status import JobView

_STOP_SECONDS = 60.0
_LOG_LINES = 5
_KERNELS = re.compile(r" nightherd\.kernels: ((?:compiling|waiting).*)")
"""A line of the log, while the C kernels are compiled."""
_ENGINE = re.compile(r" WARNING nightherd\.engine: (.*)")


@click.command()
@click.argument("file")
@submit_options
@click.option(
    "-o", "--output", metavar="FILE", help="Write the results to FILE and print the job's id."
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda:N", help="Where to run."
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    help="Weights' type.",
)
def run(file: str, output: str | None, device: str, dtype: str, **options: Any) -> None:
    """Submit FILE, work on it here, and print the results as JSONL in input order.

    A live worker of the same checkpoint is used if there is one; else one is started for this job
    alone. Ctrl-C keeps the job and prints the command that goes on with it. Exits 5 if rows
    failed, 6 if the job was cancelled or expired.

    \b
    Example:
      nightherd run prompts.jsonl --checkpoint demo --max-tokens 64 -o results.jsonl
      nightherd run prompts.txt --temperature 0 | jq -r .text
    """
    from producer.jobs.follow import exit_code
    from producer.jobs.status import job_view, serving_workers
    from producer.results.export import iterate_results

    refuse_unwritable(output)
    settings, database, job = do_submit(file, options)
    view = read(database, lambda connection: job_view(connection, job.id))
    others = read(database, lambda connection: serving_workers(connection, view.checkpoint))
    if others:
        notice(f"job {job.id}: worker {others[0]} of {view.checkpoint} takes it", always=True)
        if (device, dtype) != ("auto", "auto"):
            notice("--device and --dtype are that worker's, not those given here", always=True)
        publish_wakeups(settings, database, view.checkpoint)
        view = _follow(database, settings, view, None)
    else:
        with _own_worker(settings, view, device, dtype) as process:
            view = _follow(database, settings, view, process)
            for warning in process.warnings():
                notice(f"the worker: {warning}", always=True)
    with open_output(output) as target:
        count = write_rows(iterate_results(database, job.id), target)
    if output not in (None, "-"):
        click.echo(job.id)
        notice(f"{count:,} rows in {output}")
    if view.failed:
        notice(f"{view.failed:,} samples failed: nightherd errors {job.id}", always=True)
    raise SystemExit(exit_code(view))


class _Interrupted(Exception):
    """Ctrl-C or SIGTERM while the job runs."""


def _follow(
    database: Database, settings: Settings, view: JobView, own: _OwnWorker | None
) -> JobView:
    """Waits for the end; a worker of our own that dies is started again a few times."""
    from producer.jobs.follow import follow

    def on_poll(now: JobView) -> None:
        if own is not None and now.open:
            own.keep_alive()

    def interrupt(_number: int, _frame: object) -> None:
        raise _Interrupted

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        starting = own.starting if own is not None else str
        return follow(database, view.id, poll_seconds=0.2, on_poll=on_poll, starting=starting)
    except (KeyboardInterrupt, _Interrupted):
        if own is not None:
            notice("stopping; what has finished is being saved", always=True)
            own.stop()
        click.echo(
            f"job {view.id} is kept; go on with: "
            f"nightherd worker --checkpoint {view.checkpoint} --only-job {view.id}",
            err=True,
        )
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _OwnWorker:
    """A worker process for one job, its log in the data folder."""

    _ATTEMPTS = 3

    def __init__(self, settings: Settings, view: JobView, device: str, dtype: str) -> None:
        self._command = [
            sys.executable,
            # -P: the current folder may hold weights in a folder called `models`.
            "-P",
            "-c",
            "from nightherd.cli import main; main()",
            *("worker", "--checkpoint", view.checkpoint, "--only-job", view.id),
            *("--device", device, "--dtype", dtype),
        ]
        self._log_path = settings.home / "logs" / f"run-{view.id}.log"
        self._starts = 0
        self._ended = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._log_path.open("ab") as log:
            # In a session of its own: Ctrl-C reaches this process alone, which tells the worker.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._starts += 1

    def keep_alive(self) -> None:
        """Starts it again if a signal killed it or its engine hung; raises if it gave up."""
        if self._process is None or self._process.poll() is None:
            return
        from worker.process.app import EXIT_HUNG

        code = self._process.returncode
        if code == 0 and not self._ended:
            # Its job may have ended after the last poll: the next one will show it.
            self._ended = True
            return
        if (code >= 0 and code != EXIT_HUNG) or self._starts >= self._ATTEMPTS:
            raise NightherdError(f"the worker ended (exit code {code}): {self._last_error()}")
        reason = "its engine hung" if code == EXIT_HUNG else f"it was killed by signal {-code}"
        notice(f"the worker is gone, {reason}; starting another", always=True)
        self.start()

    def starting(self) -> str:
        """What it does before it has loaded, as its log says: compiling kernels, or nothing."""
        with contextlib.suppress(OSError, IndexError):
            last = self._log_path.read_text(errors="replace").splitlines()[-1]
            found = _KERNELS.search(last)
            return found[1] if found else ""
        return ""

    def warnings(self) -> list[str]:
        """The warnings of its engine, from its log."""
        lines = self._log_path.read_text(errors="replace").splitlines()
        return list(dict.fromkeys(found[1] for line in lines if (found := _ENGINE.search(line))))

    def _last_error(self) -> str:
        lines = self._log_path.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
        said = [line for line in lines if line.startswith("nightherd: ")] or lines[-1:]
        return f"{' '.join(said).removeprefix('nightherd: ')} (log: {self._log_path})"

    def stop(self) -> None:
        """Tells it to stop and waits for it."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_for_end(self) -> None:
        """Waits for it to end by itself, now that its job has ended; stops it if it does not."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.stop()


@contextlib.contextmanager
def _own_worker(settings: Settings, view: JobView, device: str, dtype: str) -> Iterator[_OwnWorker]:
    own = _OwnWorker(settings, view, device, dtype)
    own.start()
    try:
        yield own
    except NightherdError as error:
        own.stop()
        raise NightherdError(
            f"{error}; job {view.id} is kept, go on with: "
            f"nightherd worker --checkpoint {view.checkpoint} --only-job {view.id}"
        ) from None
    except BaseException:
        own.stop()
        raise
    else:
        own.wait_for_end()
