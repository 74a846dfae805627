"""Batch normalisation of u + s and a (leaky) ReLU, with s constant over a clip's frames.

Shapes: u (B·T, C, H, W); s (B, C, H, W) or None; n = B·T·H·W values per channel.

The fused kernels keep neither u + s nor the result for the backward, and the convolution that takes
the result need not keep it either (:mod:`polyfusion.ops.recompute`): of each layer only u is. The
forward allocates its result and the backward du, nothing else of that size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyfusion.dispatch import DTYPES, backend, resolve
from polyfusion.kernels.eager.norm import norm
from polyfusion.kernels.layout import Norm, sum_dtype
from polyfusion.ops.register import register
from polyfusion.ops.views import (
    check_alike,
    check_dtype,
    check_layout,
    check_number,
    check_shape,
    describe,
    shape_of,
)


def norm_activation(
    u: Tensor,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    slope: float = 0.0,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise u + s per channel, scale and shift it, and apply a (leaky) ReLU.

    Args:
        u: (B·T, C, H, W) in any memory format; the result has the same.
        s: (B, C, H, W) of u's dtype, constant over each clip's T frames, or None.
        weight: (C,), in a precision of its own; so is ``bias``.
        bias: (C,).
        mean: (C,) constants to normalise with, both or none. None: the statistics of the batch.
        var: (C,).
        eps: added to the variance.
        slope: the negative slope, 0 for ReLU.
        kernels: "auto", "eager", "triton" or "cuda".

    Returns:
        The result in u's dtype, and the mean and the biased variance of u + s it used. Gradients
        flow through the batch's statistics into the result, not out of the last two. Differentiable
        to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
        KernelsUnavailable: the kernels asked for cannot run here.
    """
    check_norm(u, s)
    check_statistics("u", u, u.numel() // max(1, u.shape[1]), mean, var)
    check_channels(u, u.shape[1], mean, var, weight=weight, bias=bias)
    check_number("eps", eps, 0)
    check_number("slope", slope)
    chosen = resolve(kernels, [u])
    call = Norm(u, s, weight, bias, mean, var, mean is None, eps, slope)
    if chosen == "eager":
        return norm(call)
    y, batch_mean, batch_var = norm_op(*call, chosen)
    return (y, batch_mean, batch_var) if mean is None or var is None else (y, mean, var)


def norm_statistics(
    u: Tensor, s: Tensor | None = None, *, kernels: str = "auto"
) -> tuple[int, Tensor, Tensor]:
    """Count, mean (C,) and M2 (C,) of u + s, M2 the sum of squared distances from the mean.

    :func:`merge_statistics` joins those of several processes. They carry no gradient. Arguments and
    errors are those of :func:`norm_activation`.
    """
    check_norm(u, s)
    chosen = resolve(kernels, [u])
    with torch.no_grad():
        mean, square = backend(chosen, "norm").norm_statistics(u, s)
    return u.shape[0] * u.shape[2:].numel(), mean, square


def merge_statistics(count: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 of everything, from those of P parts: (P,), (P, C) and (P, C).

    Chan's formula: no difference of large sums, so nothing is lost at a large mean. Raises
    ``ValueError`` naming the argument whose shape, dtype or device does not fit.
    """
    for name, value in (("count", count), ("mean", mean), ("square", square)):
        axes = 1 if name == "count" else 2
        if not isinstance(value, Tensor) or value.ndim != axes or len(value) != len(count):
            letters = "(P,)" if axes == 1 else "(P, C)"
            raise ValueError(f"{name}: expected a tensor {letters}, got {describe(value)}")
        check_layout(name, value)
    check_shape("square", square, "(P, C) as mean", shape_of(mean))
    check_alike(mean=mean, square=square)
    if count.dtype not in (torch.int32, torch.int64, *DTYPES) or count.device != mean.device:
        raise ValueError(
            f"count is {count.dtype} on {count.device}, expected integers on {mean.device} as mean"
        )
    share = (count.double() / count.sum().clamp_min(1)).to(mean.dtype).unsqueeze(1)
    merged = (mean * share).sum(0)
    apart = (mean - merged).square() * count.to(mean.dtype).unsqueeze(1)
    return count.sum(), merged, (square + apart).sum(0)


def check_norm(u: Tensor, s: Tensor | None) -> None:
    """Raise ``ValueError`` naming the argument that does not fit u."""
    if not isinstance(u, Tensor) or u.ndim != 4:
        raise ValueError(f"u: expected a tensor (B·T, C, H, W), got {describe(u)}")
    check_dtype("u", u)
    if s is not None:
        if not isinstance(s, Tensor):
            raise ValueError(f"s: expected a tensor (B, C, H, W) or None, got {describe(s)}")
        if s.ndim != 4 or s.shape[1:] != u.shape[1:]:
            raise ValueError(f"s has shape {shape_of(s)}, expected (B, *{shape_of(u)[1:]}) as u")
        check_dtype("s", s)
        check_clips("s", s, u.shape[0])
        if s.dtype != u.dtype or s.device != u.device:
            raise ValueError(f"s is {s.dtype} on {s.device}, expected {u.dtype} on {u.device} as u")


def check_channels(
    x: Tensor, channels: int, mean: Tensor | None, var: Tensor | None, **values: Tensor
) -> None:
    """Raise ``ValueError`` unless the values are one per channel, on the device of x.

    So are ``mean`` and ``var``, unless they are None.
    """
    if mean is not None and var is not None:
        values |= {"mean": mean, "var": var}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor ({channels},), got {describe(value)}")
        if shape_of(value) != (channels,):
            raise ValueError(
                f"{name} has shape {shape_of(value)}, expected ({channels},), one per channel"
            )
        check_dtype(name, value)
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, expected {x.device}")


def check_statistics(
    name: str, x: Tensor, count: int, mean: Tensor | None, var: Tensor | None
) -> None:
    """Raise ``ValueError`` for one of mean and var, or neither and one value per channel."""
    if (mean is None) != (var is None):
        raise ValueError("mean and var: expected both or neither, got one of them")
    if mean is None and count == 1:
        raise ValueError(
            f"{name} has shape {shape_of(x)}: one value per channel has no variance; "
            "expected more frames, or mean and var"
        )


def check_clips(name: str, clip: Tensor, frames: int) -> None:
    """Raise ``ValueError`` unless the clips divide the frames."""
    clips = clip.shape[0]
    if (clips == 0 and frames > 0) or (clips > 0 and frames % clips):
        raise ValueError(f"{name} has {clips} clips, expected a divisor of the {frames} frames")


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Result, mean and variance; the last two are empty if they were given."""
    *values, kernels = arguments
    call = Norm(*values)
    y, mean, var = backend(kernels, "norm").norm_forward(call)
    if call.mean is not None:  # an operator's result is never one of its arguments
        mean, var = (call.u.new_empty(0, dtype=sum_dtype(call.u)) for _ in range(2))
    return y, mean, var


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *values, _kernels = arguments
    call = Norm(*values)
    size = call.u.shape[1] if call.mean is None else 0
    mean, var = (call.u.new_empty(size, dtype=sum_dtype(call.u)) for _ in range(2))
    return torch.empty_like(call.u), mean, var


def _backward(grad: Tensor, *arguments: Any) -> list[Tensor | None]:
    *values, _needs, kernels = arguments
    return backend(kernels, "norm").norm_backward(grad, Norm(*values))


def _fake_backward(*operands: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else torch.empty_like(x) for x in operands]


def _keep(ctx: Any, constants: Sequence[Any], result: tuple[Tensor, ...]) -> Sequence[Any]:
    """Save the statistics that were used, given or not."""
    mean, _var, *rest = constants
    y, batch_mean, batch_var = result
    ctx.activation_version = y._version  # of the result as it is handed out
    ctx.mark_non_differentiable(batch_mean, batch_var)
    return (batch_mean, batch_var, *rest) if mean is None else constants


norm_op = register(
    "norm_activation",
    "Tensor u, Tensor? s, Tensor weight, Tensor bias",
    "Tensor? mean, Tensor? var, bool batch, float eps, float slope",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    eager=lambda *values: norm(Norm(*values))[0],
    returns="(Tensor, Tensor, Tensor)",
    saved="Tensor mean, Tensor var, bool batch, float eps, float slope",
    keep=_keep,
    fake_backward=_fake_backward,
)
"""The arguments of a :class:`polyfusion.kernels.layout.Norm`, and ``kernels``."""
