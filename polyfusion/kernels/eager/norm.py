"""Normalisation of u + s in PyTorch's own operators, which autograd differentiates to any order.

On a CPU nothing is faster than PyTorch's batch normalisation with what it keeps for its backward,
but for the statistics of large maps that are not channels-last: those it adds up value by value.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyfusion.dispatch import transformed
from polyfusion.kernels.layout import Norm, lie_as, per_clip, sum_dtype

LARGE = 2**17  # values from which on :class:`_PlaneNorm` is faster
LARGE_PLANE = 24  # pixels of a map, the same


def norm(call: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and biased variance it was normalised with."""
    u, s, weight, bias, mean, var, batch, eps, slope = call
    x = _shifted(u, s)
    if batch:
        mean = var = None
    if x.numel() == 0:
        y = x * weight.sum().to(x.dtype) + bias.sum().to(x.dtype)
        if mean is None or var is None:
            mean, var = (u.new_zeros(u.shape[1], dtype=sum_dtype(u)) for _ in range(2))
        return y, mean, var
    weight, bias, given_mean, given_var = (_wide(value, u) for value in (weight, bias, mean, var))
    if mean is None and _by_planes(x, eps):
        y, batch_mean, batch_var = _PlaneNorm.apply(x, weight, bias, eps)
        return _activate(y, slope), batch_mean, batch_var
    y, batch_mean, invstd = torch.native_batch_norm(
        x, weight, bias, given_mean, given_var, mean is None, 0.0, eps
    )
    y = lie_as(_activate(y, slope), u)
    if mean is not None and var is not None:
        return y, mean, var
    batch_mean, invstd = batch_mean.detach(), invstd.detach()
    batch_var = (invstd.pow(-2) - eps).clamp(min=0)
    if eps == 0:  # PyTorch's 1/σ of a constant channel is 0 then
        batch_var = batch_var.masked_fill(invstd == 0, 0)
    return y, batch_mean, batch_var


def norm_statistics(u: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and M2 per channel of u + s."""
    if u.numel() == 0:
        none = u.new_zeros(u.shape[1], dtype=sum_dtype(u))
        return none, none.clone()
    x = _shifted(u, s).to(sum_dtype(u))
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, var * (u.numel() // u.shape[1])


def _activate(y: Tensor, slope: float) -> Tensor:
    return y.relu_() if slope == 0 else F.leaky_relu_(y, slope)


def _by_planes(x: Tensor, eps: float) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)  # one that has values
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() >= LARGE
        and x.shape[2:].numel() >= LARGE_PLANE
        and x.is_contiguous()
        and eps > 0
        and not torch.compiler.is_compiling()  # which writes loops of its own
        and not transformed()
    )


def _plane_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of contiguous maps, of whose planes each is added up at once.

    By the sum of squares where it loses two bits at most, else by squared distances, which are
    written and read again.
    """
    count, planes = x.numel() // x.shape[1], x.flatten(2)
    mean = planes.sum(2).sum(0) / count
    square = mean * mean
    var = torch.linalg.vector_norm(planes, dim=2).square_().sum(0) / count - square
    if not bool((square <= 3 * var).all()):
        centred = planes - mean.unsqueeze(1)
        var = torch.linalg.vector_norm(centred, dim=2).square_().sum(0) / count
    return mean, var


class _PlaneNorm(torch.autograd.Function):
    """Batch normalisation with :func:`_plane_statistics`; the backward is PyTorch's own.

    ``(x, weight, bias, eps) -> (y, mean, variance)``; the last two have no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        mean, var = _plane_statistics(x)
        y, _, _ = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt_())
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        backward = torch.ops.aten.native_batch_norm_backward
        found = backward(grads[0], x, weight, None, None, mean, inverse, True, ctx.eps, needs)
        return (*found, None)


def _shifted(u: Tensor, s: Tensor | None) -> Tensor:
    """u + s in the order of memory: else the sum over frames in its backward is 5 times as slow."""
    if s is None:
        return u
    last = u.movedim(1, 3).is_contiguous()
    if last:
        u, s = u.movedim(1, 3), s.movedim(1, 3)
    x = (per_clip(u, s.shape[0]) + s.unsqueeze(1)).flatten(0, 1)
    return x.movedim(3, 1) if last else x


def _wide(value: Tensor | None, u: Tensor) -> Any:
    """In the dtype of sums: PyTorch's normalisation takes no other, unless it is u's.

    And dense: beside channels-last maps it reads every vector as if its values were neighbours.
    """
    return None if value is None else value.to(sum_dtype(u)).contiguous()
