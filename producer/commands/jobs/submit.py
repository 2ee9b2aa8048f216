"""`nightherd submit`."""

from __future__ import annotations

from typing import Any

import click

from producer.commands.common import notice, read
from producer.commands.jobs.control import publish_wakeups
from producer.commands.jobs.submit_options import do_submit, submit_options


@click.command()
@click.argument("file")
@submit_options
@click.option(
    "--wait", is_flag=True, help="Wait; exit 5 if rows failed, 6 if cancelled or expired."
)
def submit(file: str, wait: bool, **options: Any) -> None:
    """Enqueue FILE (or `-`) as a job and print its id.

    FILE is JSONL or plain text, one prompt a line. A JSONL row is {"prompt": …}, {"messages": […]},
    a bare string, or a line of the OpenAI Batch API; it may have a custom_id and parameters of its
    own. With --template, --system or --task a row's keys are columns. Every row is checked
    before anything is stored.

    \b
    Example:
      nightherd submit prompts.jsonl --checkpoint demo --max-tokens 100
      nightherd submit questions.jsonl --template '{{ question }}' --temperature 0
      nightherd submit articles.jsonl --task summarize --keep url --name nightly
      zcat rows.gz | nightherd submit - --task translate --task-arg target_language=German
    """
    settings, database, job = do_submit(file, options)
    click.echo(job.id)
    from producer.jobs.status import job_view

    view = read(database, lambda connection: job_view(connection, job.id))
    publish_wakeups(settings, database, view.checkpoint)
    if not view.workers_serving:
        notice(
            f"no live worker serves {view.checkpoint}; the job waits for one: "
            f"nightherd worker --checkpoint {view.checkpoint}",
            always=True,
        )
    if wait:
        from producer.jobs.follow import exit_code, follow

        raise SystemExit(exit_code(follow(database, job.id)))
