"""`submit`, `jobs`, `status`, `cancel`, `pause`, `resume`, `retry`, `set`."""
