"""What all processes do for each other: wake-ups, housekeeping, the database made ready."""
