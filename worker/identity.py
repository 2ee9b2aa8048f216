"""Who this worker is."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.base import new_id


@dataclass(slots=True)
class WorkerIdentity:
    """Who this worker is in SQL; `id` changes when it was declared dead and registers anew."""

    checkpoint_key: str
    serves: tuple[str, ...]
    device: str
    slots: int
    only_job: str | None
    id: str = field(default_factory=new_id)
    state: str = "starting"
    phase: str | None = "load"
