"""One firing, from its claim to its live job: the input is read anew and stored as by `submit`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from models.database import Database, is_transient
from models.store import firings, webhooks
from models.store.firings import FiringRow
from models.store.schedules import ScheduleRow
from nightherd.errors import DatabaseError, InputError, NightherdError
from nightherd.settings import Settings
from producer.inputs.moment import Moment, fill
from producer.inputs.source import open_source
from producer.jobs.create import JobOptions, Limits, SubmittedJob, submit
from producer.jobs.options import prepare
from producer.prompts.template import one_line
from producer.schedules.cron import parse_rule, show_utc
from producer.schedules.hold import Holder, LeaseLostError

log = logging.getLogger("nightherd.schedules")

_SHOWN_ROWS = 3
_MAX_REASON = 1_000


@dataclass(frozen=True, slots=True)
class FiringClaim:
    """A firing that is to be made, with what its schedule says of it."""

    id: int
    kind: str
    scheduled_for_utc: datetime
    name: str
    cron: str
    timezone: str
    input: dict[str, Any]
    options: dict[str, Any]
    concurrency: str

    @classmethod
    def of(cls, row: FiringRow) -> FiringClaim:
        """From a row of `firings.get`."""
        return cls(**{field.name: getattr(row, field.name) for field in fields(cls)})

    @classmethod
    def first(cls, firing_id: int, schedule: ScheduleRow, scheduled_for: datetime) -> FiringClaim:
        """The first claim of a scheduled time that was due."""
        return cls(
            firing_id,
            "due",
            scheduled_for,
            schedule.name,
            schedule.cron,
            schedule.timezone,
            schedule.input,
            schedule.options,
            schedule.concurrency,
        )


@dataclass(frozen=True, slots=True)
class Fired:
    """What became of a firing that was claimed."""

    firing_id: int
    job: SubmittedJob | None = None
    checkpoint_key: str | None = None
    error: NightherdError | None = None
    """Why there is no job: the firing is `failed`."""
    lost: bool = False
    """Another holder has it: this one's job was discarded."""


def moment_of(row: FiringClaim) -> Moment:
    """What `{{ scheduled_for }}`, `{{ firing }}` and `:previous` are."""
    rule = parse_rule(row.cron, row.timezone)
    previous = rule.previous(row.scheduled_for_utc) if "sql" in row.input else None
    return Moment(
        scheduled_for=row.scheduled_for_utc.astimezone(rule.zone),
        previous=None if previous is None else previous.astimezone(rule.zone),
        firing=row.id,
    )


def fire(
    database: Database,
    settings: Settings,
    holder: Holder,
    row: FiringClaim,
    known_limits: Limits | None = None,
) -> Fired:
    """Makes the job of a firing that `holder` has claimed.

    A bad input ends the firing as `failed`, with the reason. Raises `DatabaseError` where the
    database refuses: then the claim lapses, and any beat takes it over.
    """
    try:
        with holder.hold(row.id) as hold:
            return _store(database, settings, holder, row, hold.heartbeat, known_limits)
    except LeaseLostError:
        log.warning("firing %s of %s was taken over by another beat", row.id, row.name)
        return Fired(row.id, lost=True)
    except DatabaseError:
        raise
    except NightherdError as error:
        return _failed(database, holder, row, error)
    except Exception as error:
        if isinstance(error, DBAPIError) and is_transient(error):
            raise
        log.exception("firing %s of %s failed", row.id, row.name)
        unexpected = f"an unexpected {type(error).__name__}: {error}"
        return _failed(database, holder, row, NightherdError(one_line(unexpected)))


def _store(
    database: Database,
    settings: Settings,
    holder: Holder,
    row: FiringClaim,
    progress: Any,
    known_limits: Limits | None,
) -> Fired:
    options = row.options
    moment = moment_of(row)
    variables = {"scheduled_for": moment.scheduled_for, "firing": moment.firing}
    prepared = prepare(options, variables)
    output = options["output"] and fill(options["output"], moment, "--output")

    def before_commit(connection: Connection, job_id: str) -> None:
        mine = firings.submit(
            connection,
            row.id,
            holder.id,
            job_id,
            output=output,
            replace=row.concurrency == "replace" and row.kind != "backfill",
        )
        if not mine:
            raise LeaseLostError
        webhooks.expect(
            connection,
            job_id=job_id,
            firing_id=row.id,
            on_complete=options["on_complete"],
            on_failure=options["on_failure"],
        )

    with open_source(row.input, moment, prepared.reading) as (rows, source):
        job = submit(
            database,
            settings,
            rows,
            JobOptions(
                checkpoint_key=prepared.checkpoint_key,
                params=prepared.params,
                seed=options["seed"],
                name=row.name,
                template=prepared.template,
                priority=options["priority"],
                not_before=_after(database, options["not_before_seconds"]),
                deadline=_after(database, options["deadline_seconds"]),
                submitted_by=options["submitted_by"],
                firing_id=row.id,
            ),
            source=source,
            progress=progress,
            before_commit=before_commit,
            known_limits=known_limits,
        )
    log.info("%s fired for %s: job %s", row.name, show_utc(row.scheduled_for_utc), job.id)
    return Fired(row.id, job, prepared.checkpoint_key)


def _after(database: Database, seconds: float | None) -> datetime | None:
    return None if seconds is None else database.now() + timedelta(seconds=seconds)


def reason_of(error: NightherdError) -> str:
    """An error as the reason of a firing: one line, with the first bad rows."""
    text = str(error)
    problems = error.problems if isinstance(error, InputError) else ()
    if problems:
        more = "; …" if len(problems) > _SHOWN_ROWS else ""
        text = f"{text.rstrip()} {'; '.join(problems[:_SHOWN_ROWS])}{more}"
    return one_line(text, _MAX_REASON)


def _failed(database: Database, holder: Holder, row: FiringClaim, error: NightherdError) -> Fired:
    reason = reason_of(error)

    def write(connection: Connection) -> bool:
        if not firings.fail_claimed(connection, row.id, holder.id, reason):
            return False
        queue_failure_webhook(connection, row, "firing.failed", reason)
        return True

    database.retrying(write)
    log.warning("%s did not fire for %s: %s", row.name, show_utc(row.scheduled_for_utc), reason)
    return Fired(row.id, error=error)


def queue_failure_webhook(connection: Connection, row: Any, event: str, reason: str) -> None:
    """Queues a webhook for a firing that failed; `row` has the schedule's name and options."""
    webhooks.firing_failed(
        connection,
        row.id,
        event,
        row.options["on_failure"],
        {
            "schedule": row.name,
            "firing": row.id,
            "scheduled_for": row.scheduled_for_utc.isoformat(),
            "reason": reason,
        },
    )
