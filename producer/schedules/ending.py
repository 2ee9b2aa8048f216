"""The end of firings whose jobs have ended: the output file, the state, the history's limits."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from models.database import Database
from models.store import firings
from models.store.firings import FiringRow
from nightherd.errors import DatabaseError, NightherdError, UsageError
from producer.prompts.template import one_line
from producer.results.export import ExportOptions, iterate_results
from producer.results.file import open_output, write_rows
from producer.schedules.cron import show_utc
from producer.schedules.firing import queue_failure_webhook
from producer.schedules.hold import Hold, Holder, LeaseLostError

log = logging.getLogger("nightherd.schedules")

_AT_ONCE = 100
_MAX_REASON = 1_000


@dataclass(frozen=True, slots=True)
class Ended:
    firing_id: int
    state: str
    reason: str | None


def end_all(database: Database, holder: Holder) -> list[Ended]:
    """Ends all firings whose jobs have ended; raises `DatabaseError`."""
    done: list[Ended] = []
    while True:
        rows = database.retrying(lambda c: firings.ended(c, limit=_AT_ONCE), reading=True)
        new = [ended for row in rows if (ended := _end_firing(database, holder, row)) is not None]
        done += new
        schedules = {row.schedule_id: row for row in rows}
        for row in schedules.values():
            _prune_history(database, row)
        # Where none could be ended, other processes are ending them.
        if len(rows) < _AT_ONCE or not new:
            return done


def _end_firing(database: Database, holder: Holder, row: FiringRow) -> Ended | None:
    state, reason = outcome_of(row)
    if row.output is None or row.job_state != "completed":
        return _record_end(database, row, state, reason, None)
    mine = database.retrying(
        lambda connection: firings.claim_end(
            connection, row.id, holder.id, lease_seconds=holder.lease_seconds
        )
    )
    if not mine:
        return None
    broken = False
    try:
        with holder.hold(row.id) as hold:
            _write_output(database, row, hold)
    except LeaseLostError:
        return None
    except DatabaseError:
        raise
    except (NightherdError, OSError) as error:
        broken = True
        state, reason = "failed", one_line(_with_remedy(row, str(error)), _MAX_REASON)
    except Exception as error:
        broken = True
        log.exception("the output of firing %s of %s", row.id, row.name)
        state, reason = "failed", one_line(_with_remedy(row, repr(error)), _MAX_REASON)
    return _record_end(database, row, state, reason, holder.id, tell=broken)


def outcome_of(row: FiringRow) -> tuple[str, str | None]:
    """A firing's end by its job's; `row` is of `firings.ended`."""
    samples = row.done + row.failed
    if row.job is None:
        return "failed", "its job is gone"
    if row.job_state != "completed":
        why = "was cancelled" if row.job_state == "cancelled" else "has expired (--deadline)"
        return "failed", f"job {row.job} {why}; nightherd results {row.job} has what had finished"
    if not row.failed:
        return "succeeded", None
    how = f"(nightherd errors {row.job})"
    if not row.done:
        return "failed", f"all {samples:,} samples failed {how}"
    return "succeeded", f"{row.failed:,} of {samples:,} samples failed {how}"


def _with_remedy(row: FiringRow, error: str) -> str:
    return (
        f"{error.rstrip('.')}; the results are kept in the database: "
        f"nightherd results {row.job} -o FILE writes them"
    )


def _write_output(database: Database, row: FiringRow, hold: Hold) -> None:
    """The whole file, as `nightherd results` writes it, or nothing under its name."""
    keep = bool(row.options["keep"])
    results = iterate_results(database, row.job, ExportOptions(with_metadata=keep))
    _make_folder(row.output)
    with open_output(row.output) as file:
        write_rows(_with_heartbeats(results, hold), file)
        hold.heartbeat()


def _make_folder(path: str) -> None:
    """Folders that a placeholder named may not be there yet."""
    try:
        os.makedirs(Path(path).parent, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _with_heartbeats(rows: Iterable[Any], hold: Hold) -> Iterator[Any]:
    for number, row in enumerate(rows):
        if number % 1_000 == 0:
            hold.heartbeat()
        yield row


def _record_end(
    database: Database,
    row: FiringRow,
    state: str,
    reason: str | None,
    holder_id: str | None,
    *,
    tell: bool = False,
) -> Ended | None:
    def write(connection: Connection) -> bool:
        if not firings.end(connection, row.id, state, reason, holder=holder_id):
            return False
        if tell:
            queue_failure_webhook(connection, row, "firing.failed", reason or "")
        return True

    if not database.retrying(write):
        return None
    time_shown = show_utc(row.scheduled_for_utc)
    log.info("%s of %s %s%s", row.name, time_shown, state, f": {reason}" if reason else "")
    return Ended(row.id, state, reason)


def _prune_history(database: Database, row: FiringRow) -> None:
    for state, keep in (("succeeded", row.keep_succeeded), ("failed", row.keep_failed)):
        if keep is not None:
            _prune(database, row.schedule_id, state, keep)
    _prune(database, row.schedule_id, "skipped", KEEP_SKIPPED)


def _prune(database: Database, schedule_id: int, state: str, keep: int) -> None:
    while database.retrying(lambda connection: firings.prune(connection, schedule_id, state, keep)):
        pass


KEEP_SKIPPED = 1_000
"""Rows of skipped scheduled times that a schedule keeps."""
