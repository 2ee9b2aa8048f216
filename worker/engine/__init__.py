"""Turns token ids into token ids. No Celery, no SQL, no strings."""
