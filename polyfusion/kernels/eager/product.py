"""Matrix products on a CPU by oneDNN where that is faster than PyTorch's ``@``.

In float32 ``@`` calls MKL, which reaches half of oneDNN's speed on AMD processors, and on Intel's
more than oneDNN's, mostly where operands are transposed. Everything else is left to PyTorch: other
dtypes and devices, small products, and what is compiled or transformed.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

_LARGE = 1 << 21
"""Multiply-adds from which on the time saved exceeds the cost of a call from Python."""


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """a (M, K) times b (K, N), plus bias (N,), in any strides; noise (M, n) behind it."""
    onednn = _onednn(a)
    multiply = _linear if onednn else F.linear
    if noise is None:
        return multiply(a, b.mT, bias)
    result = a.new_empty(a.shape[0], b.shape[1] + noise.shape[1])
    fused, behind = result.split([b.shape[1], noise.shape[1]], 1)
    behind.copy_(noise)
    if onednn:
        fused.copy_(multiply(a, b.mT, bias))
    elif bias is None:
        torch.mm(a, b, out=fused)
    else:
        torch.addmm(bias, a, b, out=fused)
    return result


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """[x weight + bias, noise] for x (..., K), weight (K, N), bias (N,), noise (..., n).

    Differentiable to any order.
    """
    large = x.numel() * weight.shape[1] >= _LARGE and x.device.type == "cpu"
    special = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if special or not large or (noise is None and not _onednn(x)):
        y = x @ weight if bias is None else F.linear(x, weight.mT, bias)
        return y if noise is None else torch.cat([y, noise], -1)
    differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
    multiply = _Product.apply if differentiated else matmul
    rows = x.reshape(-1, x.shape[-1])
    behind = None if noise is None else noise.reshape(-1, noise.shape[-1])
    columns_first = rows.stride(0) == 1 < rows.stride(1)
    # oneDNN wants rows of the first: where both would be copied for that, copy the smaller.
    if bias is None and noise is None and columns_first and weight.shape[1] < rows.shape[0]:
        made = multiply(weight.mT, rows.mT, None, None).mT
    else:
        made = multiply(rows, weight, bias, behind)
    return made.unflatten(0, x.shape[:-1]) if x.ndim != 2 else made


def _onednn(x: Tensor) -> bool:
    usable = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    return usable and _available() and not _mkl_is_faster() and bool(torch.backends.mkldnn.enabled)


@functools.cache
def _available() -> bool:
    """Whether PyTorch was built with oneDNN."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()


@functools.cache
def _mkl_is_faster() -> bool:
    """Whether PyTorch's own products are MKL's, on an Intel processor."""
    cpu = Path("/proc/cpuinfo")
    intel = cpu.is_file() and "GenuineIntel" in cpu.read_text()
    return intel and torch.backends.mkl.is_available()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # it is read as if it were
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """Bilinear: its gradients are products again."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None, noise: Tensor | None) -> Tensor:
        return matmul(a, b, bias, noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, _bias, noise = inputs
        ctx.behind = 0 if noise is None else noise.shape[1]
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,), (a, b) = grads, ctx.saved_tensors
        need_a, need_b, need_bias, need_noise = ctx.needs_input_grad
        grad, noise_grad = grad.split([b.shape[1], ctx.behind], 1)
        grad = grad.contiguous()  # rows of even length: two products read it
        return (
            product(grad, b.mT) if need_a else None,
            product(a.mT, grad) if need_b else None,
            grad.sum(0) if need_bias else None,
            noise_grad if need_noise else None,
        )

    @staticmethod
    def jvp(ctx: Any, da: Any, db: Any, dbias: Any, dnoise: Any) -> Any:
        a, b = ctx.saved_tensors
        terms = [None if da is None else da @ b, None if db is None else a @ db, dbias]
        present = [x for x in terms if x is not None] or [a.new_zeros(b.shape[1])]
        tangent = sum(present[1:], present[0]).expand(a.shape[0], b.shape[1])
        if dnoise is None:
            dnoise = a.new_zeros(a.shape[0], ctx.behind)
        return torch.cat([tangent, dnoise], 1) if ctx.behind else tangent
