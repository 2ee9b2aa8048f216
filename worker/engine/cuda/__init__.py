"""A step on a CUDA device: Triton kernels, CUDA graphs."""
