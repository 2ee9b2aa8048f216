"""A firing's states: claimed by a beat, live with its job, ended; and the history's limits.

::

    (time) ──► claimed ──► submitted ──► succeeded | failed
       │          │                          │
       │          └──► failed                └──► claimed again, by a backfill
       └──► skipped ──────────────────────────────►

Rows are locked in the order schedule, firings by id, jobs by id, chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    bindparam,
    delete,
    exists,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from models.base import db_now, one_of
from models.job import ENDED_JOB_STATES, OPEN_JOB_STATES, Chunk, Job
from models.schedule import Firing, Schedule
from models.store import jobs
from models.webhook import Webhook

FiringRow = Row[*tuple[Any, ...]]
"""A row of `firings`, its columns by name."""

_OPEN = ("claimed", "submitted")


def _insert(connection: Connection, values: dict[str, Any]) -> int | None:
    """Adds a firing; None if its scheduled time has one already."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return connection.execute(
        dialect.insert(Firing).values(**values).on_conflict_do_nothing().returning(Firing.id)
    ).scalar_one_or_none()


def skip(
    connection: Connection,
    schedule_id: int,
    scheduled_for: datetime,
    reason: str,
    *,
    since: datetime | None = None,
) -> int | None:
    """Records that a time, or all from `since` to it, did not fire; None if it is recorded."""
    return _insert(
        connection,
        {
            "schedule_id": schedule_id,
            "scheduled_for_utc": scheduled_for,
            "since_utc": since,
            "state": "skipped",
            "reason": reason,
            "finished_at": db_now(),
        },
    )


def claim(
    connection: Connection,
    schedule_id: int,
    scheduled_for: datetime,
    holder: str,
    *,
    kind: str = "due",
    lease_seconds: float,
) -> int | None:
    """Takes a scheduled time without a firing; None if it has one that is not this holder's."""
    made = _insert(
        connection,
        {
            "schedule_id": schedule_id,
            "scheduled_for_utc": scheduled_for,
            "kind": kind,
            "state": "claimed",
            "attempts": 1,
            "claimed_by": holder,
            "lease_until": db_now(lease_seconds),
        },
    )
    if made is not None:
        return made
    # Committed before, maybe, and only the answer was lost.
    return connection.execute(
        select(Firing.id).where(
            Firing.schedule_id == schedule_id,
            Firing.scheduled_for_utc == scheduled_for,
            one_of(Firing.state, "claimed"),
            Firing.claimed_by == holder,
        )
    ).scalar_one_or_none()


def claim_again(
    connection: Connection, firing_id: int, holder: str, *, lease_seconds: float
) -> bool:
    """Takes a firing that was skipped or has failed, for a backfill."""
    hit = connection.execute(
        update(Firing)
        .where(
            Firing.id == firing_id,
            Firing.state.in_(("skipped", "failed"))
            | ((Firing.state == "claimed") & (Firing.claimed_by == holder)),
        )
        .values(
            state="claimed",
            kind="backfill",
            reason=None,
            since_utc=None,
            output=None,
            attempts=1,
            claimed_by=holder,
            lease_until=db_now(lease_seconds),
            finished_at=None,
        )
    )
    return hit.rowcount == 1


def held_by(connection: Connection, holder: str) -> int | None:
    """A firing that this holder has claimed (the answer to its claim was lost)."""
    return connection.execute(
        select(Firing.id)
        .where(one_of(Firing.state, "claimed"), Firing.claimed_by == holder)
        .order_by(Firing.id)
        .limit(1)
    ).scalar_one_or_none()


def _lapsed() -> list[ColumnElement[bool]]:
    return [one_of(Firing.state, "claimed"), Firing.lease_until < db_now()]


def is_any_lapsed(connection: Connection) -> bool:
    return connection.execute(select(Firing.id).where(*_lapsed()).limit(1)).first() is not None


def take_over(
    connection: Connection, holder: str, *, lease_seconds: float, max_attempts: int
) -> FiringRow | None:
    """Takes the oldest claim whose holder let it lapse; None if there is none.

    One that `max_attempts` holders have let lapse is `failed` in the row that is returned.
    """
    found = connection.execute(
        select(Firing.id, Firing.attempts)
        .where(*_lapsed())
        .order_by(Firing.id)
        .limit(1)
        .with_for_update(key_share=True, skip_locked=True)
    ).one_or_none()
    if found is None:
        return None
    values: dict[str, Any]
    if found.attempts >= max_attempts:
        reason = (
            f"a beat died, or lost the database, {found.attempts} times while it made the job; "
            "see the beats' logs"
        )
        values = {**_ended("failed", reason)}
    else:
        values = {
            "claimed_by": holder,
            "attempts": Firing.attempts + 1,
            "lease_until": db_now(lease_seconds),
        }
    connection.execute(
        update(Firing).where(Firing.id == found.id, Firing.state == "claimed").values(**values)
    )
    return get(connection, found.id)


def _ended(state: str, reason: str | None) -> dict[str, Any]:
    return {
        "state": state,
        "reason": reason,
        "claimed_by": None,
        "lease_until": None,
        "finished_at": db_now(),
    }


# Built once: where ten thousand are due, building statements is most of the work.
_GET = (
    select(
        Firing,
        Schedule.name,
        Schedule.cron,
        Schedule.timezone,
        Schedule.input,
        Schedule.options,
        Schedule.concurrency,
    )
    .join(Schedule, Schedule.id == Firing.schedule_id)
    .where(Firing.id == bindparam("firing"))
)


def get(connection: Connection, firing_id: int) -> FiringRow | None:
    """A firing with what its schedule says of it."""
    return connection.execute(_GET, {"firing": firing_id}).one_or_none()


def renew(connection: Connection, firing_id: int, holder: str, *, lease_seconds: float) -> bool:
    """Prolongs a holder's lease; False if the firing is not its any more."""
    hit = connection.execute(
        update(Firing)
        .where(
            Firing.id == firing_id, Firing.state.in_(_OPEN), Firing.claimed_by == holder
        )
        .values(lease_until=db_now(lease_seconds))
    )  # fmt: skip
    return hit.rowcount == 1


def newest_job(firing_id: Any = Firing.id) -> Select[Any]:
    """The job of a firing; a backfill gives it another one."""
    return (
        select(Job.id)
        .where(Job.firing_id == firing_id, Job.state != "storing")
        .order_by(Job.created_at.desc(), Job.id.desc())
        .limit(1)
    )


_IN_THE_WAY = (
    select(Firing.id, Firing.scheduled_for_utc, Job.id.label("job"))
    .outerjoin(Job, Job.id == newest_job().correlate(Firing).scalar_subquery())
    .where(
        Firing.schedule_id == bindparam("schedule"),
        one_of(Firing.state, *_OPEN),
        Firing.kind != "backfill",
        (Firing.state == "claimed") | Job.state.in_(OPEN_JOB_STATES),
    )
    .order_by(Firing.scheduled_for_utc)
    .limit(1)
)


def open_firing(connection: Connection, schedule_id: int) -> FiringRow | None:
    """A schedule's oldest firing whose `job` has not ended or is being made; no backfills.

    One whose job has ended, and whose end is still to be written down, is not in the way.
    """
    return connection.execute(_IN_THE_WAY, {"schedule": schedule_id}).one_or_none()


def submit(
    connection: Connection,
    firing_id: int,
    holder: str,
    job_id: str,
    *,
    output: str | None,
    replace: bool,
) -> bool:
    """The firing's part of the transaction that makes its job live.

    False if the claim is not the holder's any more: the job must not become live then. `replace`:
    what earlier firings of the schedule have in hand is cancelled.
    """
    if replace:
        _lock_firings(connection, firing_id)
    hit = connection.execute(
        update(Firing)
        .where(Firing.id == firing_id, Firing.state == "claimed", Firing.claimed_by == holder)
        .values(state="submitted", output=output, claimed_by=None, lease_until=None)
    )
    if hit.rowcount != 1:
        return False
    if replace:
        _replace_earlier(connection, firing_id, job_id)
    return True


def _earlier_open(firing_id: int) -> Select[Any]:
    this = select(Firing.schedule_id, Firing.scheduled_for_utc).where(Firing.id == firing_id)
    mine = this.subquery()
    return (
        select(Firing.id, newest_job().correlate(Firing).scalar_subquery().label("job"))
        .where(
            Firing.schedule_id == select(mine.c.schedule_id).scalar_subquery(),
            one_of(Firing.state, *_OPEN),
            Firing.kind != "backfill",
            Firing.scheduled_for_utc < select(mine.c.scheduled_for_utc).scalar_subquery(),
        )
        .order_by(Firing.id)
    )


def _lock_firings(connection: Connection, firing_id: int) -> None:
    ids = [row.id for row in connection.execute(_earlier_open(firing_id))]
    connection.execute(
        select(Firing.id)
        .where(Firing.id.in_([*ids, firing_id]))
        .order_by(Firing.id)
        .with_for_update(key_share=True)
    ).all()


def _replace_earlier(connection: Connection, firing_id: int, job_id: str) -> None:
    earlier = connection.execute(_earlier_open(firing_id)).all()
    states = jobs.lock_jobs(connection, [job_id, *(row.job for row in earlier if row.job)])
    for row in earlier:
        state = states.get(row.job) if row.job else None
        if state in ENDED_JOB_STATES:
            continue  # it made it: its end is still to be written down
        if state in OPEN_JOB_STATES:
            jobs.cancel(connection, row.job)
        connection.execute(
            update(Firing)
            .where(Firing.id == row.id, Firing.state.in_(_OPEN))
            .values(**_ended("failed", f"replaced by firing {firing_id} (--concurrency replace)"))
        )


def fail_claimed(connection: Connection, firing_id: int, holder: str, reason: str) -> bool:
    """Ends a firing of which no job came; False if the claim is not the holder's any more."""
    hit = connection.execute(
        update(Firing)
        .where(Firing.id == firing_id, Firing.state == "claimed", Firing.claimed_by == holder)
        .values(**_ended("failed", reason))
    )
    return hit.rowcount == 1


def ended(connection: Connection, *, limit: int) -> Sequence[FiringRow]:
    """Live firings whose job has ended (or is gone), that nobody writes the output of.

    With `job`, `job_state`, and its sums `done` and `failed`.
    """
    newest = newest_job().correlate(Firing).scalar_subquery()

    def total(column: Any) -> Any:
        return (
            select(func.coalesce(func.sum(column), 0))
            .where(Chunk.job_id == Job.id)
            .correlate(Job)
            .scalar_subquery()
        )

    return connection.execute(
        select(
            Firing.id,
            Firing.schedule_id,
            Firing.scheduled_for_utc,
            Firing.output,
            Schedule.name,
            Schedule.options,
            Schedule.keep_succeeded,
            Schedule.keep_failed,
            Job.id.label("job"),
            Job.state.label("job_state"),
            total(Chunk.done).label("done"),
            total(Chunk.failed).label("failed"),
        )
        .join(Schedule, Schedule.id == Firing.schedule_id)
        .outerjoin(Job, Job.id == newest)
        .where(
            # The very words of the index, and its order.
            one_of(Firing.state, *_OPEN),
            Firing.state == "submitted",
            or_(Firing.lease_until.is_(None), Firing.lease_until < db_now()),
            or_(Job.id.is_(None), Job.state.in_(ENDED_JOB_STATES)),
        )
        .order_by(Firing.schedule_id)
        .limit(limit)
    ).all()


def claim_end(connection: Connection, firing_id: int, holder: str, *, lease_seconds: float) -> bool:
    """The right to write the output of a live firing whose job has ended; one holder has it."""
    hit = connection.execute(
        update(Firing)
        .where(
            Firing.id == firing_id,
            Firing.state == "submitted",
            or_(
                Firing.lease_until.is_(None),
                Firing.lease_until < db_now(),
                Firing.claimed_by == holder,
            ),
        )
        .values(claimed_by=holder, lease_until=db_now(lease_seconds))
    )
    return hit.rowcount == 1


def end(
    connection: Connection, firing_id: int, state: str, reason: str | None, *, holder: str | None
) -> bool:
    """Writes down how a live firing ended; `holder` is who wrote its output, if it has one."""
    mine = Firing.claimed_by.is_(None) if holder is None else Firing.claimed_by == holder
    hit = connection.execute(
        update(Firing)
        .where(Firing.id == firing_id, Firing.state == "submitted", mine)
        .values(**_ended(state, reason))
    )
    return hit.rowcount == 1


def prune(
    connection: Connection, schedule_id: int, state: str, keep: int, *, limit: int = 100
) -> int:
    """Removes up to `limit` firings in `state` beyond the newest `keep`, with their jobs.

    The jobs become invisible at once; housekeeping deletes their rows in pages. What still runs
    (a retry), is still held by a worker, or has still to be told to somebody, stays for now.
    """
    beyond = (
        select(Firing.id)
        .where(Firing.schedule_id == schedule_id, Firing.state == state)
        .order_by(Firing.scheduled_for_utc.desc(), Firing.id.desc())
        .offset(keep)
        .limit(limit)
    )
    ids = sorted(connection.execute(beyond).scalars())
    removed = 0
    for firing_id in ids:
        removed += _remove(connection, firing_id)
    return removed


def _remove(connection: Connection, firing_id: int) -> int:
    found = connection.execute(
        select(Firing.id)
        .where(Firing.id == firing_id, ~Firing.state.in_(_OPEN))
        .with_for_update(skip_locked=True)
    ).one_or_none()
    own = list(connection.execute(select(Job.id).where(Job.firing_id == firing_id)).scalars())
    if found is None or _is_busy(connection, firing_id, own):
        return 0
    if own:
        connection.execute(
            update(Job)
            .where(Job.id.in_(own), Job.state.in_(ENDED_JOB_STATES))
            .values(
                state="storing",
                firing_id=None,
                finished_at=func.coalesce(Job.finished_at, db_now()),
            )
        )
    return connection.execute(delete(Firing).where(Firing.id == firing_id)).rowcount


def _is_busy(connection: Connection, firing_id: int, own: Sequence[str]) -> bool:
    states = jobs.lock_jobs(connection, own) if own else {}
    if any(state in OPEN_JOB_STATES for state in states.values()):
        return True
    running = exists().where(Chunk.job_id.in_(own), one_of(Chunk.state, "running"))
    untold = exists().where(
        or_(Webhook.firing_id == firing_id, Webhook.job_id.in_(own)),
        one_of(Webhook.state, "waiting", "due"),
    )
    return bool(connection.execute(select(or_(running, untold))).scalar_one())
