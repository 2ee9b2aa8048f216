"""What all runners take from a transformers model: shapes, weights, matrices."""
