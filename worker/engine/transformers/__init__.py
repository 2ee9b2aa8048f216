"""transformers' own `generate` as an engine: the reference, and for models beyond LLaMA's kin."""
