"""`nightherd doctor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from producer.commands.common import json_option, print_json

if TYPE_CHECKING:
    from nightherd.settings import Settings
    from producer.doctor.finding import Finding, Probe
    from worker.torch_checks import TorchProbe

CHECKS = (
    *("settings", "database", "broker", "workers", "disk", "memory", "compiler"),
    *("versions", "device", "checkpoint"),
)
ON_REQUEST = ("worker-here",)
"""Health checks that run only where `--only` names them."""

_LOCAL_WORKER_CHECKS = ("versions", "device", "checkpoint")
"""Their problems are notes where another worker serves the checkpoint."""


class CheckNames(click.ParamType[tuple[str, ...]]):
    """Names of checks, separated by commas."""

    name = "checks"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "CHECK,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        for name in names:
            if name not in (*CHECKS, *ON_REQUEST):
                known = ", ".join((*CHECKS, *ON_REQUEST))
                self.fail(f"no check {name!r}; there are {known}")
        return names


@click.command()
@click.option(
    "--checkpoint",
    default="demo",
    show_default=True,
    metavar="PATH|NAME",
    help="The checkpoint that a job would ask for.",
)
@click.option("--only", type=CheckNames(), default=CHECKS, help="Only these checks.")
@json_option
def doctor(checkpoint: str, only: tuple[str, ...], as_json: bool) -> None:
    """Check whether a job could run, and say what to do where not.

    Settings and where they come from, versions, database, broker, workers and their leases, disk,
    memory, compiler, device, and the checkpoint: found here, or served by a live worker. A note is
    worth knowing; a PROBLEM keeps jobs from running. Exits 0 if there is none, else 1.

    --only makes health checks of it: `database,broker` for a beat, and for a worker `worker-here`:
    a ready worker of this host or container holds its lease.

    \b
    Example:
      nightherd doctor
      nightherd doctor --checkpoint meta-llama/Llama-3.1-8B-Instruct
      nightherd doctor --json | jq '.findings[] | select(.level == "problem")'
      nightherd doctor --only worker-here
    """
    found = []
    for finding in examine(checkpoint, only):
        found.append(finding)
        if not as_json:
            click.echo(as_text(finding))
    problems = sum(finding.level == "problem" for finding in found)
    if as_json:
        findings = [finding.as_json() for finding in found]
        print_json({"ok": not problems, "checkpoint": checkpoint, "findings": findings})
    elif only == CHECKS:
        click.echo()
        click.echo(verdict(checkpoint, found, problems))
    raise SystemExit(1 if problems else 0)


def as_text(finding: Finding) -> str:
    level = "PROBLEM" if finding.level == "problem" else finding.level
    text = f"{finding.check:<11} {level:<7}  {finding.what}"
    return text if finding.remedy is None else f"{text}\n{'':<21}remedy: {finding.remedy}"


def verdict(checkpoint: str, found: list[Finding], problems: int) -> str:
    if problems:
        count = "1 problem" if problems == 1 else f"{problems} problems"
        return f"no job for {checkpoint} could run: {count}"
    if _serving(found):
        return f"a job for {checkpoint} could run"
    return (
        f"a job for {checkpoint} could run here: "
        f"nightherd run, or nightherd worker --checkpoint {checkpoint}"
    )


def _serving(found: list[Finding]) -> bool:
    return any(finding.facts.get("serving") for finding in found)


def examine(checkpoint: str, only: tuple[str, ...]) -> Iterator[Finding]:
    """Runs the checks beside each other, and yields their findings in order, as they come."""
    from nightherd.catalogue import checkpoint_key
    from nightherd.errors import CheckpointError
    from nightherd.settings import default_home
    from producer.doctor.finding import Finding, failed
    from producer.doctor.services import read_settings
    from worker.torch_checks import TorchProbe

    settings, findings = read_settings()
    if settings is None or "settings" in only:
        yield from findings
    bad_name: list[Finding] = []
    try:
        key = checkpoint_key(checkpoint)
    except CheckpointError as error:
        key = checkpoint
        bad_name = [failed("checkpoint", error, "give the path or name of one")]
    home = default_home() if settings is None else settings.home
    torch_probe = TorchProbe(key, home) if {"device", "checkpoint"} & {*only} else None
    try:
        probes = _start(settings, key, only)
        served = False
        database_down = False
        for name in only:
            if name == "workers" and database_down:
                found = [Finding("workers", "note", "not known: the database cannot be asked")]
            elif name in probes:
                found = probes[name].findings()
            elif name == "device" and torch_probe is not None:
                found = _device(torch_probe)
            elif name == "checkpoint" and torch_probe is not None:
                found = bad_name or _checkpoint(key, torch_probe)
            else:
                continue
            if name == "database":
                database_down = any(finding.level == "problem" for finding in found)
            served = served or any(finding.facts.get("serving") for finding in found)
            yield from (_as_note(finding) if served else finding for finding in found)
    finally:
        if torch_probe is not None:
            torch_probe.close()


def _start(settings: Settings | None, key: str, only: tuple[str, ...]) -> dict[str, Probe]:
    # What a check needs is imported before its time runs.
    import redis  # noqa: F401

    import producer.jobs.status  # noqa: F401
    from producer.doctor import machine, services
    from producer.doctor.finding import Check, Probe
    from worker.torch_checks import check_compiler

    checks: dict[str, Check] = {
        "memory": machine.check_memory,
        "compiler": partial(check_compiler, settings),
        "versions": machine.check_versions,
    }
    if settings is not None:
        checks |= {
            "database": partial(services.check_database, settings),
            "broker": partial(services.check_broker, settings),
            "workers": partial(services.check_workers, settings, key),
            "worker-here": partial(services.check_worker_here, settings),
            "disk": partial(machine.check_disk, settings),
        }
    return {name: Probe(name, checks[name]) for name in only if name in checks}


def _device(torch_probe: TorchProbe) -> list[Finding]:
    from worker.torch_checks import check_device

    return check_device(torch_probe.facts())


def _checkpoint(key: str, torch_probe: TorchProbe) -> list[Finding]:
    from worker.torch_checks import check_checkpoint

    return check_checkpoint(key, torch_probe.facts())


def _as_note(finding: Finding) -> Finding:
    """A problem of a worker here is a note where another worker serves the checkpoint."""
    if finding.level == "problem" and finding.check in _LOCAL_WORKER_CHECKS:
        return dataclasses.replace(finding, level="note")
    return finding
