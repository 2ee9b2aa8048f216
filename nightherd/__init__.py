"""nightherd: bulk text generation with LLaMA models on one's own GPUs.

This package is the ground floor: what the producer, the worker and the SQL models must agree on.
"""

__version__ = "0.1.0"
