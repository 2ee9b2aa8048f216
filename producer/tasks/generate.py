"""`--task generate`: the prompt as it is."""

from __future__ import annotations

from producer.tasks.base import Task

GENERATE = Task(
    name="generate",
    help="Continue the prompt, or answer the chat, as it is (the default).",
    inputs=("prompt", "text"),
)
