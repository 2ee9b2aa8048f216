"""Checkpoints on this machine: find, check, download, load, convert.

`device`, `report`, `load`, `identity` and `meta.convert` need torch; the other modules do not.
"""
