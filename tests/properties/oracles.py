"""What the equations say, densely and in float64, and how far rounding errors may grow.

Those of the fused forms are in :mod:`polyfusion.ops.reference`. An oracle returns the results of
its operator as a tuple, with ``None`` for what is not defined.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from polyfusion.ops import reference
from tests.properties.arguments import per_channel


def largest(x: Tensor) -> float:
    """The largest absolute value, 0 if there is none."""
    return x.abs().max().item() if x.numel() else 0.0


def _cat_noise(fused: Tensor, noise: Tensor | None) -> tuple[Tensor]:
    return (fused if noise is None else torch.cat([fused, noise], -1),)


def cmf_first_order(views, first, out, bias, noise):
    terms = zip(reference.repeat_frames(views), first, strict=True)
    return _cat_noise(bias + sum(z @ weight for z, weight in terms) @ out.mT, noise)


def partial_tucker(views, core, factors, noise):
    identity = torch.eye(core.shape[0], dtype=core.dtype)
    return (reference.tucker_fusion_reference(views, core, factors, identity, noise),)


def tensor_train(views, cores, noise):
    return (reference.dense_fusion_reference(views, reference.tensor_train_tensor(cores), noise),)


def concat(views, noise):
    return _cat_noise(torch.cat(reference.repeat_frames(views), -1), noise)


def _repeat(s: Tensor, frames: int) -> Tensor:
    return s.repeat_interleave(frames // max(1, len(s)), 0)


def _sum(u: Tensor, s: Tensor | None) -> Tensor:
    return u if s is None else u + _repeat(s, len(u))


def statistics(u, s):
    x = _sum(u, s)
    count = per_channel(x)
    mean = x.sum((0, 2, 3)) / max(1, count)
    return count, mean, (x - mean.view(-1, 1, 1)).square().sum((0, 2, 3))


def norm(u, s, weight, bias, mean, var, eps, slope):
    x = _sum(u, s)
    y = reference.norm_activation_reference(x, None, weight, bias, mean, var, eps, slope)
    if mean is None:
        count, mean, square = statistics(x.detach(), None)
        return y, *((mean, square / count) if count else (None, None))
    return y, mean, var


def merge(count, mean, square):
    total, weights = count.sum(), count[:, None].double()
    middle = (weights * mean).sum(0) / max(1, total)
    return total, middle, (square + weights * (mean - middle) ** 2).sum(0)


def _skip_conv_sum(x, skip, weight_x, weight_skip):
    """Convolution of [x, skip], with the skip repeated."""
    weight = torch.cat([weight_x, weight_skip], 1)
    return F.conv2d(torch.cat([x, _repeat(skip, len(x))], 1), weight, padding=1)


def _block(u, norm_weight, norm_bias, mean, var, eps, slope=0.0):
    return norm(u, None, norm_weight, norm_bias, mean, var, eps, slope)


def skip_conv(x, skip, weight_x, weight_skip, **rest):
    return _block(_skip_conv_sum(x, skip, weight_x, weight_skip), **rest)


def up_conv(x, weight, stride, padding, **rest):
    return _block(F.conv_transpose2d(x, weight, stride=stride, padding=padding), **rest)


def final(x, weight):
    return (F.conv_transpose2d(x, weight, stride=2, padding=1).tanh(),)


def _norm_condition(u: Tensor, size: float, mean, var, eps) -> float:
    """(1 + |u|) / σ: what the rounding of u becomes in the quotient; ``size`` bounds |u|."""
    if mean is None and u.numel():
        var = u.var((0, 2, 3), correction=0)
    least = var.min().item() if var is not None and var.numel() else 1.0
    return (1 + size + (0.0 if mean is None else largest(mean))) / math.sqrt(least + eps)


def norm_condition(u, s, mean, var, eps, **_):
    size = largest(u) + (0.0 if s is None else largest(s))
    return _norm_condition(_sum(u, s), size, mean, var, eps)


def statistics_condition(u, s):
    return (1 + largest(u) + (0 if s is None else largest(s))) ** 2


def skip_conv_condition(mean, var, eps, norm_weight, norm_bias, **given):
    size = largest(_skip_conv_sum(**{name: x.abs() for name, x in given.items()}))
    return _norm_condition(_skip_conv_sum(**given), size, mean, var, eps)


def up_conv_condition(x, weight, stride, padding, mean, var, eps, **_):
    def convolve(*given):
        return F.conv_transpose2d(*given, stride=stride, padding=padding)

    size = largest(convolve(x.abs(), weight.abs()))
    return _norm_condition(convolve(x, weight), size, mean, var, eps)


def final_condition(x, weight):
    return 1 + largest(F.conv_transpose2d(x.abs(), weight.abs(), stride=2, padding=1))


def merge_condition(count, mean, square):
    return 1 + largest(mean) ** 2
