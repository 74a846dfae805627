"""Normalisation of u + s in PyTorch's own operators, which autograd differentiates to any order.

On a CPU nothing is faster than PyTorch's batch normalisation with what it keeps for its backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyfusion.kernels.layout import Norm, lie_as, per_clip, sum_dtype


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
    y, batch_mean, invstd = torch.native_batch_norm(
        x, weight, bias, given_mean, given_var, mean is None, 0.0, eps
    )
    y = lie_as(y.relu_() if slope == 0 else F.leaky_relu_(y, slope), u)
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
