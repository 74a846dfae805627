"""The backends: ``eager`` (plain PyTorch), ``triton`` and ``cuda`` (calls of the CUDA extension).

Each is a package with modules of the same names: ``hadamard`` (CP and both forms of CMF),
``tucker``, ``norm``, ``conv`` and ``final``. A function ``x_forward`` takes the arguments of the
public operator ``x`` in their order; ``x_backward`` takes the gradient before them and, for the
fusions, behind them which gradients are needed. A backend need not have everything: eager's last
layer is PyTorch's convolution, and CUDA has no convolution of its own.
:func:`polyfusion.dispatch.backend` imports the module that serves a call.
"""
