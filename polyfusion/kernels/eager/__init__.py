"""Plain PyTorch, on any device and without Triton. It is what the other backends are held against.

Autograd differentiates most of it, so only the normalisation has a backward of its own.
"""
