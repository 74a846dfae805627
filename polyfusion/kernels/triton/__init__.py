"""Triton kernels and their launchers. Import nothing from here before ``import polyfusion``."""
