"""Triton kernels, the CUDA (and ROCm) implementations of the operators of :mod:`fusedkd.backends.schema`."""
