"""The worker: one process with one loaded checkpoint that turns wake-ups into saved results."""
