"""A step in plain torch, on any device."""
