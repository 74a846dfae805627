"""Normalisation of u + s in PyTorch operators: plain, and careful about memory.

:func:`norm_forward` and :func:`norm_backward` allocate one tensor of u's size each. On a CPU that
is where the time goes: touching fresh memory costs ten times as much as a pass of arithmetic over
memory in use.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyfusion.kernels.layout import Norm, lie_as, per_clip, sum_dtype

CHANNELS = (0, 2, 3)  # what a sum per channel runs over


def norm_plain(call: Norm) -> Tensor:
    """The result in operators that autograd differentiates, to any order."""
    u, s, weight, bias, mean, var, batch, eps, slope = call
    if s is not None:
        u = (per_clip(u, s.shape[0]) + s.unsqueeze(1)).flatten(0, 1)
    if u.numel() == 0:
        return u * weight.sum().to(u.dtype) + bias.sum().to(u.dtype)
    if batch:
        mean = var = None
    weight, bias, mean, var = _accumulated(u, weight, bias, mean, var)
    return _activate(F.batch_norm(u, mean, var, weight, bias, mean is None, 0.0, eps), slope)


def norm_forward(call: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and biased variance it was normalised with."""
    y, mean, var = _normalise(call)
    return lie_as(_activate(y, call.slope), call.u), mean, var


def norm_statistics(u: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and M2 per channel of u + s."""
    one = u.new_ones(u.shape[1], dtype=sum_dtype(u))
    call = Norm(u, s, one, torch.zeros_like(one), None, None, True, 0.0, 0.0)
    _, mean, var = _normalise(call)
    return mean, var * (u.numel() // max(1, u.shape[1]))


def norm_backward(grad: Tensor, call: Norm) -> list[Tensor | None]:
    """du, ds, dweight, dbias of a batch: one new tensor of u's size.

    With g = grad through the activation, x = u + s and k = Σ g (x - mean) / (σ² n):
    du = weight / σ · (g - Σ g / n - (x - mean) k).
    """
    u, s, weight, bias, mean, var, _batch, eps, slope = call
    assert mean is not None
    assert var is not None
    clips, kind = 1 if s is None else s.shape[0], sum_dtype(u)
    du, _, _ = _normalise(call._replace(u=u.to(kind), weight=weight.to(kind), bias=bias.to(kind)))
    if slope == 0:
        torch.ops.aten.threshold_backward.grad_input(grad.to(kind), du, 0, grad_input=du)
    else:
        torch.ops.aten.leaky_relu_backward.grad_input(
            grad.to(kind), du, slope, False, grad_input=du
        )
    invstd = (var + eps).rsqrt()
    total, dot = du.sum(CHANNELS), _dot(du, u, s, mean)
    scale = weight.to(kind) * invstd
    k = scale * invstd.square() * dot / call.per_channel
    du.mul_(_maps(scale)).addcmul_(u, _maps(-k)).add_(
        _maps(k * mean - scale * total / call.per_channel)
    )
    ds = None
    if s is not None:
        per_clip(du, clips).addcmul_(s.unsqueeze(1), _maps(-k))
        ds = lie_as(per_clip(du, clips).sum(1).to(s.dtype), s)
    return [lie_as(du.to(u.dtype), u), ds, (dot * invstd).to(weight.dtype), total.to(bias.dtype)]


def _normalise(call: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """u + s normalised, without the activation, and its statistics: one new tensor of u's size."""
    u, s, weight, bias, mean, var, _batch, eps, _slope = call
    if not u.is_contiguous(memory_format=torch.channels_last):
        u = u.contiguous()  # native_batch_norm.out is wrong for other strides
    result = torch.empty_like(u)
    x = u
    if s is not None:
        x = result
        torch.add(per_clip(u, s.shape[0]), s.unsqueeze(1), out=per_clip(x, s.shape[0]))
    batch_mean, invstd = (u.new_zeros(u.shape[1], dtype=sum_dtype(u)) for _ in range(2))
    if u.numel() == 0:
        return result, batch_mean, invstd
    weight, bias, mean, var = _accumulated(u, weight, bias, mean, var)
    torch.ops.aten.native_batch_norm.out(
        x,
        weight,
        bias,
        mean,
        var,
        mean is None,
        0.0,
        eps,
        out=result,
        save_mean=batch_mean,
        save_invstd=invstd,
    )
    batch_var = (invstd.pow(-2) - eps).clamp_(min=0)
    if eps == 0:  # PyTorch's 1/σ of a constant channel is 0 then
        batch_var.masked_fill_(invstd == 0, 0)
    return result, batch_mean, batch_var


def _activate(x: Tensor, slope: float) -> Tensor:
    """A (leaky) ReLU in place."""
    return x.relu_() if slope == 0 else F.leaky_relu_(x, slope)


def _dot(g: Tensor, u: Tensor, s: Tensor | None, mean: Tensor) -> Tensor:
    """Σ g (u + s - mean) per channel, a few frames at a time, in memory that stays in the cache."""
    total = torch.zeros_like(mean)
    frames = 0 if s is None or s.shape[0] == 0 else u.shape[0] // s.shape[0]
    step = max(1, 2**18 // max(1, u[:1].numel()))
    for clip in range(1 if s is None else s.shape[0]):
        first, last = clip * frames, (clip + 1) * frames if s is not None else u.shape[0]
        for at in range(first, last, step):
            here = slice(at, min(at + step, last))
            shift = _maps(mean) if s is None else _maps(mean) - s[clip]
            total += (u[here] - shift).mul_(g[here]).sum(CHANNELS)
    return total


def _accumulated(u: Tensor, *per_channel: Any) -> list[Any]:
    """In the dtype of sums: PyTorch's normalisation takes no other, unless it is u's.

    And dense: beside channels-last maps it reads every vector as if its values were neighbours.
    """
    return [None if x is None else x.to(sum_dtype(u)).contiguous() for x in per_channel]


def _maps(per_channel: Tensor) -> Tensor:
    return per_channel.view(-1, 1, 1)
