"""Chunks in this worker: claimed, prepared, in flight, saved."""
