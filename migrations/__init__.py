"""The schema's history (Alembic) and the few functions that run it."""
