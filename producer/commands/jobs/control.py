"""`nightherd cancel`, `pause`, `resume`, `retry` and `set`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

import click

from nightherd.errors import BrokerError, UsageError
from producer.commands.common import OrNone, TimeOrDelay, load, notice, read, resolve, write


def publish_wakeups(settings: Any, database: Any, checkpoint_key: str) -> None:
    """Publishes wake-ups; a broker that is down is said, and is no error: the tick tries again."""
    from nightherd.broker import broker_url
    from producer.fleet.dispatch import Dispatcher

    try:
        Dispatcher(database, settings, broker_url(settings)).top_up(checkpoint_key)
    except BrokerError as error:
        if settings.broker_url is not None:
            notice(f"stored, but not announced yet: {error}; workers' ticks will", always=True)


def _apply(jobs: tuple[str, ...], work: Callable[[Any, str], Any]) -> list[tuple[str, Any]]:
    _, database = load()
    ids = [resolve(database, job) for job in jobs]
    return [(job_id, write(database, partial(_job_first, work, job_id))) for job_id in ids]


def _job_first(work: Callable[[Any, str], Any], job_id: str, connection: Any) -> Any:
    """`work` with its arguments the other way round, for `partial`."""
    return work(connection, job_id)


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
def cancel(jobs: tuple[str, ...]) -> None:
    """End JOBs early. What has finished stays; what runs is aborted within two seconds.

    \b
    Example:
      nightherd cancel 1qm3
    """
    from models.store import jobs as store

    for job_id, changed in _apply(jobs, store.cancel):
        notice(f"{job_id} " + ("is cancelled" if changed else "was cancelled already"))


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
def pause(jobs: tuple[str, ...]) -> None:
    """Stop working on JOBs for now. Workers hand their chunks back within two seconds.

    \b
    Example:
      nightherd pause 1qm3
    """
    from models.store import jobs as store

    for job_id, changed in _apply(jobs, store.pause):
        notice(f"{job_id} " + ("is paused" if changed else "was paused already"))


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
def resume(jobs: tuple[str, ...]) -> None:
    """Go on with paused JOBs.

    \b
    Example:
      nightherd resume 1qm3
    """
    from models.store import jobs as store
    from producer.jobs.status import job_view

    settings, database = load()
    for job in jobs:
        job_id = resolve(database, job)
        changed = write(database, partial(_job_first, store.resume, job_id))
        notice(f"{job_id} " + ("goes on" if changed else "was not paused"))
        publish_wakeups(
            settings, database, read(database, partial(_job_first, job_view, job_id)).checkpoint
        )


@click.command()
@click.argument("job")
@click.option("--only", "code", metavar="CODE", help="Only rows that failed with this code.")
def retry(job: str, code: str | None) -> None:
    """Run JOB's failed rows again. The old error stays until the new result is there.

    Prints how many samples will run again.

    \b
    Example:
      nightherd retry 1qm3 --only engine_error
    """
    from models.store import jobs as store
    from producer.jobs.create import chunk_size
    from producer.jobs.status import job_view

    settings, database = load()
    job_id = resolve(database, job)
    view = read(database, lambda c: job_view(c, job_id))
    size = settings.chunk_size or chunk_size(max(1, view.failed))
    count = write(database, lambda c: store.retry(c, job_id, only_code=code, chunk_size=size))
    click.echo(count)
    if count:
        publish_wakeups(settings, database, view.checkpoint)
    else:
        notice("nothing has failed" + (f" with code {code}" if code else ""))


@click.command("set")
@click.argument("job")
@click.option("--priority", type=click.IntRange(-1000, 1000), help="Higher runs first.")
@click.option(
    "--deadline",
    type=OrNone(TimeOrDelay()),
    help="End the job then (2026-12-24T18:00, or a delay as 8h), done or not; none: never.",
)
@click.option("--not-before", type=OrNone(TimeOrDelay()), help="Start no earlier; none: at once.")
def set_(
    job: str,
    priority: int | None,
    deadline: datetime | str | None,
    not_before: datetime | str | None,
) -> None:
    """Change JOB's priority, deadline or not-before time; it counts from the next claim on.

    \b
    Example:
      nightherd set 1qm3 --priority 10 --deadline 8h
      nightherd set 1qm3 --deadline none
    """
    from models.store import jobs as store
    from producer.jobs.status import job_view

    given = {"priority": priority, "deadline": deadline, "not_before": not_before}
    values = {
        name: (None if value == "" else value) for name, value in given.items() if value is not None
    }
    if not values:
        raise UsageError("nothing to set; give --priority, --deadline or --not-before")
    settings, database = load()
    job_id = resolve(database, job)
    write(database, lambda c: store.change(c, job_id, values))
    view = read(database, lambda c: job_view(c, job_id))
    publish_wakeups(settings, database, view.checkpoint)
    notice(f"{job_id} is changed")
