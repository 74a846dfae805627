"""Calls of the CUDA extension's operators, whose kernels are in ``csrc``."""
