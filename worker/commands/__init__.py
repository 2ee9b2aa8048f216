"""The commands that need torch or a worker."""
