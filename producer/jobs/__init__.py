"""A job from its options and rows to its end: create, look at, follow."""
