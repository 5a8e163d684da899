"""Triton kernels, one file per family: the CUDA (and ROCm) implementations of the operators of :mod:`fusedkd.ops`."""
