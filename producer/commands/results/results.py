"""`nightherd results`, `show` and `errors`."""

from __future__ import annotations

import json
from typing import Any

import click

from producer.commands.common import json_option, load, notice, print_json, resolve, table
from producer.results.file import open_output, write_rows


@click.command()
@click.argument("job")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Write to FILE, which appears when it is whole; default: standard output.",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first so many rows.")
@click.option("--failed", is_flag=True, help="Only failed rows.")
@click.option("--text", "text_only", is_flag=True, help="Print the texts alone.")
@click.option("--with-input", is_flag=True, help="Add each row's prompt or messages.")
@click.option("--with-metadata", is_flag=True, help="Add the columns kept by submit --keep.")
@click.option("--with-provenance", is_flag=True, help="Add what produced each row.")
@click.option("--with-logprobs", is_flag=True, help="Add logprobs and stop_reason.")
def results(
    job: str,
    output: str | None,
    limit: int | None,
    failed: bool,
    text_only: bool,
    with_input: bool,
    with_metadata: bool,
    with_provenance: bool,
    with_logprobs: bool,
) -> None:
    """Print JOB's results as JSONL, in input order; also while it runs.

    \b
    Example:
      nightherd results 1qm3 -o results.jsonl
      nightherd results 1qm3 --limit 5 --text
    """
    from producer.results.export import ExportOptions, iterate_results

    _, database = load()
    job_id = resolve(database, job)
    options = ExportOptions(
        limit=limit,
        failed=failed,
        with_input=with_input,
        with_metadata=with_metadata,
        with_provenance=with_provenance,
        with_logprobs=with_logprobs,
    )
    with open_output(output) as file:
        count = write_rows(iterate_results(database, job_id, options), file, text_only=text_only)
    if output not in (None, "-"):
        notice(f"{count:,} rows in {output}")
    elif not count:
        notice("no results yet" if not failed else "no failed rows")


@click.command()
@click.argument("job")
@click.argument("index", type=click.IntRange(0))
@json_option
def show(job: str, index: int, as_json: bool) -> None:
    """Show row INDEX of JOB: request, effective parameters, results, provenance.

    \b
    Example:
      nightherd show 1qm3 0
    """
    from producer.results.export import show_request

    _, database = load()
    detail = show_request(database, resolve(database, job), index)
    if as_json:
        print_json(detail)
        return
    click.echo(_describe(detail))


def _describe(detail: dict[str, Any]) -> str:
    lines = [f"row {detail['index']} of job {detail['job']}"]
    if detail["custom_id"] is not None:
        lines.append(f"custom_id: {detail['custom_id']}")
    request = detail["request"]
    for message in request.get("messages", ()):
        lines.append(f"{message['role']}: {message['content']}")
    if "prompt" in request:
        lines.append(f"prompt: {request['prompt']}")
    if not detail["samples"]:
        lines.append("no result yet")
    for sample in detail["samples"]:
        lines.append("")
        lines.append(
            f"sample {sample['sample']}: {sample['finish_reason']}, {sample['prompt_tokens']} + "
            f"{sample['completion_tokens']} tokens, seed {sample['seed']}, pass {sample['pass']}, "
            f"worker {sample['worker']}"
        )
        if sample["error"]:
            lines.append(f"error {sample['error']['code']}: {sample['error']['message']}")
        else:
            lines.append(sample["text"])
    if detail["samples"]:
        last = detail["samples"][-1]
        given = {
            name: value
            for name, value in (last["effective_params"] or {}).items()
            if value not in (None, [], {})
        }
        lines.append("")
        lines.append("effective parameters: " + json.dumps(given, ensure_ascii=False))
        lines.append("provenance: " + json.dumps(last["provenance"], ensure_ascii=False))
    return "\n".join(lines)


@click.command()
@click.argument("job")
@click.option("--code", help="Only failures of this code.")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many."
)
@json_option
def errors(job: str, code: str | None, limit: int, as_json: bool) -> None:
    """List JOB's failed rows with their codes and messages.

    \b
    Example:
      nightherd errors 1qm3 --code context_length_exceeded
    """
    from producer.results.export import ExportOptions, iterate_results

    _, database = load()
    job_id = resolve(database, job)
    options = ExportOptions(limit=limit, failed=True, code=code)
    rows = list(iterate_results(database, job_id, options))
    if as_json:
        print_json(rows)
        return
    if not rows:
        notice("no failed rows")
        return
    lines = [
        (
            str(row["index"]),
            str(row["sample"]),
            row["custom_id"],
            row["error"]["code"],
            row["error"]["message"],
        )
        for row in rows
    ]
    click.echo(table(lines, ("INDEX", "SAMPLE", "CUSTOM_ID", "CODE", "MESSAGE")))
    if len(rows) == limit:
        notice(f"the first {limit} only; --limit shows more")
    notice(f"run them again: nightherd retry {job_id}")
