"""A step on a CPU, in C."""
