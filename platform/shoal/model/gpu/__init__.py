"""Triton kernels of decoding for CUDA devices, optional (the extra ``gpu``): `launch` is what the rest calls."""
