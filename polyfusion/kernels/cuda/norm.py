"""Normalisation of u + s and a leaky ReLU by the CUDA extension: ``csrc/norm.cu``."""

from typing import Any

import torch
from torch import Tensor

from polyfusion.extension import operators
from polyfusion.kernels.layout import Norm, lie_as


def norm_forward(call: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """The result in three launches, and the mean and biased variance it was normalised with.

    With given statistics it is one launch.
    """
    u, mean, var = call.u, call.mean, call.var
    if mean is None or var is None:
        mean, var = _statistics(u, call.s)
    if u.numel() == 0:
        return torch.empty_like(u), mean, var
    x, s = _one_format(u, call.s)
    channels = _channels(call.weight, call.bias, mean, var)
    return lie_as(operators(u).norm_apply(x, s, *channels, call.eps, call.slope), u), mean, var


def norm_statistics(u: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and M2 per channel of u + s, in two launches."""
    mean, var = _statistics(u, s)
    return mean, var * (u.numel() // max(1, u.shape[1]))


def norm_backward(grad: Tensor, call: Norm) -> list[Tensor | None]:
    """du, ds, dweight, dbias in three launches."""
    u, s, weight, bias, *statistics = call[:6]
    if u.numel() == 0:
        ds = None if s is None else torch.zeros_like(s)
        return [torch.empty_like(u), ds, torch.zeros_like(weight), torch.zeros_like(bias)]
    x, skip, grad = _one_format(u, s, grad)
    channels = _channels(weight, bias, *statistics)
    sums = operators(u).norm_sums(grad, x, skip, *channels, call.eps, call.slope)
    du, ds = operators(u).norm_backward(
        grad,
        x,
        skip,
        *channels,
        sums if call.batch else None,
        call.per_channel,
        call.eps,
        call.slope,
    )
    dweight, dbias = sums[1].to(weight.dtype, copy=True), sums[0].to(bias.dtype, copy=True)
    return [lie_as(du, u), None if s is None else lie_as(ds, s), dweight, dbias]


def _statistics(u: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of u + s."""
    if u.numel() == 0:
        return u.new_zeros(u.shape[1]).float(), u.new_zeros(u.shape[1]).float()
    return operators(u).norm_statistics(*_one_format(u, s))


def _channels(*values: Any) -> list[Tensor]:
    """What there is per channel, as the kernels take it."""
    return [x.float().contiguous() for x in values]


def _one_format(first: Tensor, *others: Tensor | None) -> list[Any]:
    """The maps in NCHW or channels-last, whichever the first has already."""
    last = not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    maps = (first, *others)
    return [None if x is None else x.contiguous(memory_format=memory_format) for x in maps]
