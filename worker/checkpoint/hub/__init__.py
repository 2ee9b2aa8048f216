"""Checkpoints on the Hub: what a repository holds, the download, the shared cache. No torch."""
