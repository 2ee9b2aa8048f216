"""`nightherd workers`."""

from __future__ import annotations

import click

from producer.commands.common import duration, json_option, load, notice, print_json, read, table


@click.command()
@click.option("--all", "include_ended", is_flag=True, help="Also those that ended recently.")
@json_option
def workers(include_ended: bool, as_json: bool) -> None:
    """List live workers: what they serve, on which device, how fast.

    A worker whose lease has lapsed is `lapsed` until housekeeping declares it dead.

    \b
    Example:
      nightherd workers
      nightherd workers --json | jq '.[].tokens_per_second'
    """
    from producer.jobs.status import worker_views

    _, database = load()
    views = read(database, lambda c: worker_views(c, include_ended=include_ended))
    if as_json:
        print_json([view.as_json() for view in views])
        return
    if not views:
        notice("no live workers; start one: nightherd worker --checkpoint demo")
        return
    rows = [
        (
            view.id,
            view.state + (f" ({view.phase})" if view.phase else ""),
            ", ".join(view.serves),
            view.device,
            f"{view.host}:{view.pid}",
            f"{view.chunks}/{view.slots}",
            view.tokens_per_second,
            duration(view.lease_seconds_left),
        )
        for view in views
    ]
    header = ("WORKER", "STATE", "SERVES", "DEVICE", "PROCESS", "CHUNKS", "TOKENS/S", "LEASE")
    click.echo(table(rows, header))
