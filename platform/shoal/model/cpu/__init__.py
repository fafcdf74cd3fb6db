"""The model's loops compiled for the CPU with numba, and what calls them with tensors."""
