"""Matrix products on a CPU by oneDNN where that is faster than PyTorch's ``@``.

In float32 ``@`` calls MKL, which reaches half of oneDNN's speed on AMD processors. Everything else
is left to PyTorch: other dtypes and devices, small products, and what is compiled or transformed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

_LARGE = 1 << 21
"""Multiply-adds from which on the time saved exceeds the cost of a call from Python."""


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M, K) times b (K, N), plus bias (N,), in any strides; without a gradient."""
    if not _onednn(a):
        return F.linear(a, b.mT, bias)
    return _linear(a, b.mT, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (K, N), plus bias (N,). Differentiable to any order."""
    large = x.numel() * weight.shape[1] >= _LARGE
    special = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if special or not large or not _onednn(x):
        return x @ weight if bias is None else F.linear(x, weight.mT, bias)
    differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
    multiply = _Product.apply if differentiated else matmul
    rows = x.reshape(-1, x.shape[-1])
    columns_first = rows.stride(0) == 1 < rows.stride(1)
    # oneDNN wants rows of the first: where both would be copied for that, copy the smaller.
    if bias is None and columns_first and weight.shape[1] < rows.shape[0]:
        made = multiply(weight.mT, rows.mT, None).mT
    else:
        made = multiply(rows, weight, bias)
    return made.unflatten(0, x.shape[:-1]) if x.ndim != 2 else made


def _onednn(x: Tensor) -> bool:
    usable = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    mkldnn = torch.backends.mkldnn
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return usable and known and mkldnn.is_available() and bool(mkldnn.enabled)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # it is read as if it were
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """Bilinear: its gradients are products again."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        return matmul(a, b, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, _bias = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,), (a, b) = grads, ctx.saved_tensors
        need_a, need_b, need_bias = ctx.needs_input_grad
        return (
            product(grad, b.mT) if need_a else None,
            product(a.mT, grad) if need_b else None,
            grad.sum(0) if need_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, dbias: Tensor | None) -> Any:
        a, b = ctx.saved_tensors
        terms = [None if da is None else da @ b, None if db is None else a @ db, dbias]
        present = [x for x in terms if x is not None]
        return sum(present[1:], present[0]).expand(a.shape[0], b.shape[1])
