"""Puts work in and takes results out; never imports torch or transformers."""
