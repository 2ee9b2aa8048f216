"""The command line, but for what needs torch or a worker."""
