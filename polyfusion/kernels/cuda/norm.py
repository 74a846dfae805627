"""Normalisation of u + s and a leaky ReLU by the CUDA extension: ``csrc/norm.cu``."""

from typing import Any

import torch
from torch import Tensor

from polyfusion.kernels.cuda import operators


def statistics(u: Tensor, s: Tensor | None, divisor: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and M2 / divisor per channel of u + s, in two launches."""
    if u.numel() == 0:
        return u.new_zeros(u.shape[1]).float(), u.new_zeros(u.shape[1]).float()
    count = u.numel() // u.shape[1]
    mean, var = operators(u).norm_statistics(*_one_format(u, s))
    return mean, var if count == divisor else var * (count / divisor)


def apply(
    u: Tensor,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    slope: float,
) -> Tensor:
    """The activation of the normalised u + s, in one launch."""
    if u.numel() == 0:
        return torch.empty_like(u)
    x, s = _one_format(u, s)
    channels = [v.float().contiguous() for v in (mean, var, weight, bias)]
    return _like(operators(u).norm_apply(x, s, *channels, eps, slope), u)


def backward(
    grad: Tensor,
    u: Tensor,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    batch: bool,
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """du, ds, dweight, dbias in three launches; ``batch``: mean and var are those of u + s."""
    if u.numel() == 0:
        ds = None if s is None else torch.zeros_like(s)
        return torch.empty_like(u), ds, torch.zeros_like(weight), torch.zeros_like(bias)
    x, skip, grad = _one_format(u, s, grad)
    channels = [v.float().contiguous() for v in (mean, var, weight, bias)]
    sums = operators(u).norm_sums(grad, x, skip, *channels, eps, slope)
    count = u.numel() // u.shape[1]
    du, ds = operators(u).norm_backward(
        grad, x, skip, *channels, sums if batch else None, count, eps, slope
    )
    return _like(du, u), None if s is None else _like(ds, s), sums[1], sums[0]


def _one_format(first: Tensor, *others: Tensor | None) -> list[Any]:
    """The maps in NCHW or channels_last, whichever the first has already."""
    last = not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    maps = (first, *others)
    return [None if x is None else x.contiguous(memory_format=memory_format) for x in maps]


def _like(result: Tensor, given: Tensor) -> Tensor:
    """The result with the strides that ``torch.empty_like(given)`` has."""
    wanted = torch.empty_like(given, device="meta").stride()
    return result if result.stride() == wanted else torch.empty_like(given).copy_(result)
