"""One worker process: start, consume wake-ups, keep the lease, drain, stop."""
