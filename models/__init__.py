"""The SQL models (not language models: see `nightherd.catalogue` for checkpoints).

`models.store` holds every statement that changes state, named and explained.
"""

from models.base import Base
from models.job import Chunk, Job, ParameterSet, Provenance, Request, Result
from models.schedule import Firing, Schedule
from models.webhook import Webhook
from models.worker import ServedCheckpoint, Sweep, Worker

SCHEMA_REVISION = "0002"
"""The Alembic revision that this program reads and writes."""

__all__ = [
    "SCHEMA_REVISION",
    "Base",
    "Chunk",
    "Firing",
    "Job",
    "ParameterSet",
    "Provenance",
    "Request",
    "Result",
    "Schedule",
    "ServedCheckpoint",
    "Sweep",
    "Webhook",
    "Worker",
]
