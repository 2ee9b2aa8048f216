"""Webhooks: expected, due with their body fixed, claimed, answered.

::

    waiting ──► due ──► delivered      (a 2xx was recorded)
       │        │ └──► failed          (attempts exhausted, or the receiver is gone)
       ▼        └─ again after a pause, each attempt a claim that lapses
    dropped  (the job ended otherwise than the webhook is for)

At least once: if the process that claimed a delivery dies, it is claimed again. Not again after a
recorded 2xx: every statement here has `due` in its WHERE.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, exists, func, insert, select, update

from models.base import db_now, one_of
from models.job import ENDED_JOB_STATES, Chunk, Job
from models.schedule import Firing, Schedule
from models.webhook import Webhook

_PAGE = 100
_FAILED: dict[str, Any] = {"state": "failed", "finished_at": db_now(), "next_attempt_at": None}
LOST = "the process that made the last attempt ended before it noted the answer"


def expect(
    connection: Connection,
    *,
    job_id: str | None = None,
    firing_id: int | None = None,
    on_complete: str | None,
    on_failure: str | None,
) -> None:
    """Inserts the webhooks of a job or a firing, `waiting` for its end.

    To be called in the transaction that makes the job live; repeated, it changes nothing. With
    `job_id`, `firing_id` is not stored: the job has its own, and a webhook that is still to be
    delivered must not be deleted with a firing that is beyond the history's limits.
    """
    wanted = {"complete": on_complete, "failure": on_failure}
    if on_complete is None and on_failure is None:
        return
    if job_id is not None:
        firing_id = None
    own = Webhook.job_id == job_id if job_id is not None else Webhook.firing_id == firing_id
    inserted = set(connection.execute(select(Webhook.occasion).where(own)).scalars())
    for occasion, url in wanted.items():
        if url is not None and occasion not in inserted:
            connection.execute(
                insert(Webhook).values(
                    id=secrets.token_hex(16),
                    job_id=job_id,
                    firing_id=firing_id,
                    occasion=occasion,
                    url=url,
                    state="waiting",
                )
            )


def firing_failed(
    connection: Connection, firing_id: int, event: str, url: str | None, data: dict[str, Any]
) -> None:
    """Inserts the webhook of a firing that failed without a job, due at once; none without `url`.

    To be called in the transaction whose guarded update ended the firing: so it happens once.
    `event` is the body's type, as `firing.failed`; `data` is JSON.
    """
    if url is None:
        return
    now = connection.execute(select(db_now())).scalar_one()
    connection.execute(
        insert(Webhook).values(
            id=secrets.token_hex(16),
            firing_id=firing_id,
            occasion="failure",
            url=url,
            state="due",
            payload={"type": event, "timestamp": _iso(now), "data": data},
            next_attempt_at=db_now(),
        )
    )


def _open_in(state: str) -> Any:
    # SQLite uses a partial index only where the WHERE repeats its condition word by word.
    return one_of(Webhook.state, "waiting", "due") & one_of(Webhook.state, state)


def _job_is_final() -> Any:
    """Its job has ended, and no worker still saves what had finished: the counts are final."""
    running = exists().where(Chunk.job_id == Job.id, one_of(Chunk.state, "running"))
    return (Webhook.job_id == Job.id) & Job.state.in_(ENDED_JOB_STATES) & ~running


def poll(connection: Connection, *, limit: int) -> tuple[bool, int]:
    """Whether there is work for `make_due`, and how many (up to `limit`) are due now.

    One statement, over the index of open webhooks alone.
    """
    ended = exists().where(_open_in("waiting"), _job_is_final())
    due = select(Webhook.id).where(_due_now()).limit(limit).subquery()
    count = select(func.count()).select_from(due).scalar_subquery()
    row = connection.execute(select(ended.label("ended"), count.label("due"))).one()
    return bool(row.ended), int(row.due)


def make_due(connection: Connection) -> int:
    """Makes webhooks of ended jobs `due`, their bodies fixed, or `dropped`; returns how many.

    It takes a page of them: call it again, in a new transaction, until it returns 0.
    """
    waiting = connection.execute(
        select(Webhook.id, Webhook.occasion, Webhook.job_id)
        .join(Job, _job_is_final())
        .where(_open_in("waiting"))
        .order_by(Webhook.id)
        .limit(_PAGE)
        .with_for_update(of=Webhook, skip_locked=True)
    ).all()
    ended = _ended_jobs(connection, sorted({row.job_id for row in waiting}))
    for row in waiting:
        values: dict[str, Any] = {"state": "dropped", "finished_at": db_now()}
        end = ended[row.job_id]
        kind = _event(row.occasion, end)
        if kind is not None:
            body = {"type": kind, "timestamp": end["finished_at"], "data": end}
            values = {"state": "due", "payload": body, "next_attempt_at": db_now()}
        connection.execute(
            update(Webhook)
            .where(Webhook.id == row.id, one_of(Webhook.state, "waiting"))
            .values(**values)
        )
    return len(waiting)


def _event(occasion: str, end: dict[str, Any]) -> str | None:
    """The type of the body for a job that ended so; None if this is not what was waited for."""
    if occasion == "complete":
        return "job.completed" if end["state"] == "completed" else None
    if end["state"] == "completed":
        return "job.failed" if end["failed"] else None
    return f"job.{end['state']}"


def _ended_jobs(connection: Connection, job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How these jobs ended, by id, each as the `data` of a body."""

    def total(name: str) -> Any:
        column = getattr(Chunk, name)
        return (
            select(func.coalesce(func.sum(column), 0))
            .where(Chunk.job_id == Job.id)
            .scalar_subquery()
            .label(name)
        )

    counters = ("done", "failed", "prompt_tokens", "completion_tokens")
    rows = connection.execute(
        select(
            Job,
            *(total(name) for name in counters),
            Schedule.name.label("schedule"),
            Firing.scheduled_for_utc,
        )
        .outerjoin(Firing, Firing.id == Job.firing_id)
        .outerjoin(Schedule, Schedule.id == Firing.schedule_id)
        .where(Job.id.in_(job_ids))
    )
    return {
        row.id: _body_data(row, {name: int(getattr(row, name)) for name in counters})
        for row in rows
    }


def _body_data(job: Row[Any], sums: dict[str, int]) -> dict[str, Any]:
    return {
        "job": job.id,
        "name": job.name,
        "state": job.state,
        "checkpoint": job.checkpoint_key,
        "requests": job.total_requests,
        "samples": job.total_samples,
        **sums,
        "created_at": _iso(job.created_at),
        "started_at": _iso(job.started_at),
        "finished_at": _iso(job.finished_at),
        "schedule": job.schedule,
        "firing": job.firing_id,
        "scheduled_for": _iso(job.scheduled_for_utc),
    }


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _due_now() -> Any:
    return _open_in("due") & (Webhook.next_attempt_at <= db_now())


@dataclass(frozen=True, slots=True)
class Delivery:
    """An attempt that the caller has claimed; `attempt` counts from 1."""

    id: str
    url: str
    payload: dict[str, Any]
    attempt: int


def claim(
    connection: Connection,
    *,
    lease_seconds: float,
    attempts: int,
    job_id: str | None = None,
) -> Delivery | None:
    """Claims the delivery that has been due for longest, or (`job_id`) one of this job's.

    None if none is due. No other process can claim it before `lease_seconds` are over. A delivery
    that is due and has used up its attempts becomes `failed`: the process that claimed it last has
    died. Repeated after a commit whose answer was lost, it claims another one; the first lapses.
    """
    due = _due_now() if job_id is None else _due_now() & (Webhook.job_id == job_id)
    while True:
        row = connection.execute(
            select(Webhook.id, Webhook.url, Webhook.payload, Webhook.attempts)
            .where(due)
            .order_by(Webhook.next_attempt_at, Webhook.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        ).one_or_none()
        if row is None:
            return None
        if row.attempts < attempts:
            connection.execute(
                update(Webhook)
                .where(Webhook.id == row.id, one_of(Webhook.state, "due"))
                .values(attempts=row.attempts + 1, next_attempt_at=db_now(lease_seconds))
            )
            return Delivery(row.id, row.url, row.payload, row.attempts + 1)
        connection.execute(
            update(Webhook)
            .where(Webhook.id == row.id, one_of(Webhook.state, "due"))
            .values(**_FAILED, last_error=LOST)
        )


def delivered(connection: Connection, webhook_id: str, status: int) -> None:
    """The receiver answered 2xx: delivered, whichever process may have claimed it meanwhile."""
    connection.execute(
        update(Webhook)
        .where(Webhook.id == webhook_id, one_of(Webhook.state, "due"))
        .values(
            state="delivered",
            last_status=status,
            last_error=None,
            next_attempt_at=None,
            finished_at=db_now(),
        )
    )


def not_delivered(
    connection: Connection,
    delivery: Delivery,
    *,
    status: int | None,
    error: str,
    retry_seconds: float | None,
) -> None:
    """An attempt failed: the next one is due after `retry_seconds`; None: there is none.

    Changes nothing where the claim has lapsed and another process has begun an attempt.
    """
    own_claim = (Webhook.id == delivery.id) & (Webhook.attempts == delivery.attempt)
    still_due = one_of(Webhook.state, "due")
    values: dict[str, Any] = {"last_status": status, "last_error": error}
    if retry_seconds is not None:
        values["next_attempt_at"] = db_now(retry_seconds)
    else:
        values |= _FAILED
    connection.execute(update(Webhook).where(own_claim, still_due).values(**values))


def of_job(connection: Connection, job_id: str) -> Sequence[Row[*tuple[Any, ...]]]:
    """A job's webhooks, for its status."""
    return connection.execute(
        select(
            Webhook.id,
            Webhook.occasion,
            Webhook.url,
            Webhook.state,
            Webhook.attempts,
            Webhook.next_attempt_at,
            Webhook.last_status,
            Webhook.last_error,
            Webhook.finished_at,
        )
        .where(Webhook.job_id == job_id)
        .order_by(Webhook.occasion, Webhook.id)
    ).all()
