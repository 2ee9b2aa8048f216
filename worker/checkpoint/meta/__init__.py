"""Meta's original format of LLaMA, and its conversion."""
