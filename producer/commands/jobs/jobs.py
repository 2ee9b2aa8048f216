"""`nightherd jobs` and `nightherd status`."""

from __future__ import annotations

from typing import Any

import click

from producer.commands.common import (
    duration,
    json_option,
    load,
    notice,
    print_json,
    read,
    resolve,
    table,
)


@click.command()
@click.option("--open", "open_only", is_flag=True, help="Only jobs that have not ended.")
@click.option(
    "--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many."
)
@json_option
def jobs(open_only: bool, limit: int, as_json: bool) -> None:
    """List jobs, the newest first.

    \b
    Example:
      nightherd jobs --open
      nightherd jobs --json | jq -r '.[] | select(.failed > 0) | .id'
    """
    from producer.jobs.status import job_views

    _, database = load()
    views = read(database, lambda c: job_views(c, open_only=open_only, limit=limit))
    if as_json:
        print_json([view.as_json() for view in views])
        return
    if not views:
        notice("no jobs yet; `nightherd submit FILE --checkpoint demo` makes one")
        return
    rows = [
        (
            view.id,
            view.state,
            view.name,
            view.checkpoint,
            view.priority,
            view.done,
            view.failed,
            view.samples,
            duration((view.database_now - view.created_at).total_seconds()),
        )
        for view in views
    ]
    header = ("JOB", "STATE", "NAME", "CHECKPOINT", "PRIO", "DONE", "FAILED", "OF", "AGE")
    click.echo(table(rows, header))


@click.command()
@click.argument("job", required=False)
@click.option("--watch", is_flag=True, help="Show a live bar until the job ends or Ctrl-C.")
@click.option(
    "--wait", is_flag=True, help="Wait; exit 5 if rows failed, 6 if cancelled or expired."
)
@json_option
def status(job: str | None, watch: bool, wait: bool, as_json: bool) -> None:
    """Show how far JOB is; without JOB, all open jobs or, if none is open, the latest.

    JOB is any unique beginning of a job's id.

    \b
    Example:
      nightherd status
      nightherd status 1qm3 --watch
      nightherd status 1qm3 --wait --json | jq .failed
    """
    from producer.jobs.follow import exit_code, follow
    from producer.jobs.status import failures_by_code, job_view, job_views, latest_job
    from producer.webhooks.urls import job_webhooks

    settings, database = load()
    if job is None and not (watch or wait):
        views = read(database, lambda c: job_views(c, open_only=True))
        if not views:
            latest = read(database, latest_job)
            views = [read(database, lambda c: job_view(c, latest))] if latest else []
        if as_json:
            print_json([view.as_json() for view in views])
        elif not views:
            notice("no jobs yet; `nightherd submit FILE --checkpoint demo` makes one")
        for view in views if not as_json else []:
            click.echo(_describe(view, {}))
        return
    if job is None:
        job_id = read(database, latest_job)
        if job_id is None:
            raise click.UsageError("there is no job to wait for")
    else:
        job_id = resolve(database, job)
    if watch or wait:
        view = follow(database, job_id, poll_seconds=min(1.0, settings.watch_seconds))
    else:
        view = read(database, lambda c: job_view(c, job_id))
    codes = read(database, lambda c: failures_by_code(c, job_id)) if view.failed else {}
    webhooks = read(database, lambda c: job_webhooks(c, job_id))
    if as_json:
        print_json({**view.as_json(), "failures": codes, "webhooks": webhooks})
    else:
        click.echo("\n".join([_describe(view, codes), *map(_describe_webhook, webhooks)]))
    if wait:
        raise SystemExit(exit_code(view))


def _describe(view: Any, codes: dict[str, int]) -> str:
    """A job in a few lines: bar, counts, speed, time left, workers, failures by code."""
    ended = view.done + view.failed
    share = ended / view.samples if view.samples else 1.0
    width = 30
    bar = "█" * int(share * width) + "░" * (width - int(share * width))
    name = f" {view.name}" if view.name else ""
    lines = [
        f"{view.id}{name}: {view.state}, checkpoint {view.checkpoint}, priority {view.priority}",
        f"  {bar} {share:6.1%}  {view.done:,} done, {view.failed:,} failed, {view.pending:,} to go",
    ]
    if view.open:
        speed = f"{view.tokens_per_second:,.0f} tokens/s" if view.workers else "not being worked on"
        lines.append(
            f"  {speed}, time left {duration(view.seconds_left)}, "
            f"{view.workers} of {view.workers_serving} workers on it"
        )
        if not view.workers_serving:
            lines.append(
                "  no live worker serves this checkpoint; start one: "
                f"nightherd worker --checkpoint {view.checkpoint}"
            )
    elif view.started_at and view.finished_at:
        seconds = (view.finished_at - view.started_at).total_seconds()
        rate = view.completion_tokens / seconds if seconds > 0 else 0
        lines.append(
            f"  {view.prompt_tokens:,} prompt and {view.completion_tokens:,} generated tokens in "
            f"{duration(seconds)} ({rate:,.0f} tokens/s)"
        )
    for label, time in (("not before", view.not_before), ("deadline", view.deadline)):
        if time is not None and view.open:
            lines.append(f"  {label} {time:%Y-%m-%d %H:%M:%S} UTC")
    if codes:
        listed = ", ".join(f"{count:,} {code}" for code, count in codes.items())
        lines.append(f"  failures: {listed} (nightherd errors {view.id})")
    return "\n".join(lines)


def _describe_webhook(webhook: dict[str, Any]) -> str:
    attempts = f", {webhook['attempts']} attempts" if webhook["attempts"] > 1 else ""
    error = f" ({webhook['last_error']})" if webhook["last_error"] else ""
    return f"  webhook on {webhook['on']} to {webhook['to']}: {webhook['state']}{attempts}{error}"
