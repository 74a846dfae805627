"""The generator's blocks: convolution, normalisation and activation.

conv([x, skip], W) = conv(x, W_x) + conv(skip, W_skip), and the skip is constant over a clip: its
term is computed once per clip and never repeated or stored as a sum (1.52 times fewer
multiplications in the published generator, exactly the same result).

Shapes: x (B·T, C, H, W), skip (B, C_s, H, W). Channels-last memory is the fast one throughout.
"""

from typing import Any

import torch
from torch import Tensor

from polyfusion.dispatch import resolve
from polyfusion.kernels.layout import conv_size
from polyfusion.ops.conv import check_conv, check_step, conv_method, convolve, convolve_statistics
from polyfusion.ops.norm import (
    check_channels,
    check_clips,
    check_statistics,
    norm_activation,
    norm_op,
)
from polyfusion.ops.views import check_number


def skip_conv_block(
    x: Tensor,
    skip: Tensor,
    weight_x: Tensor,
    weight_skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    conv: str | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """3×3 convolution of [x, skip], batch normalisation, ReLU.

    Args:
        x: (B·T, C, H, W), or frames of a single clip if B = 1.
        skip: (B, C_s, H, W), constant over each clip's T frames.
        weight_x: (C_out, C, 3, 3) in convolution layout, as is ``weight_skip``.
        weight_skip: (C_out, C_s, 3, 3).
        norm_weight, norm_bias: (C_out,).
        mean, var: (C_out,) constants to normalise with. None: the statistics of the batch.
        eps: added to the variance.
        conv: how to convolve, see :func:`polyfusion.ops.conv.conv_method`.
        kernels: "auto", "eager", "triton" or "cuda".

    Returns:
        (B·T, C_out, H, W), and the mean and biased variance it was normalised with.
        Differentiable to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
        KernelsUnavailable: the kernels asked for cannot run here.
    """
    check_conv("x", x, "weight_x", weight_x, 1)
    check_conv("skip", skip, "weight_skip", weight_skip, 1)
    for name, weight in (("weight_x", weight_x), ("weight_skip", weight_skip)):
        if weight.shape[2:] != (3, 3):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected (C_out, C, 3, 3)")
    check_clips("skip", skip, x.shape[0])
    alike = skip.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    if not alike or skip.device != x.device:
        raise ValueError(
            f"skip is {skip.dtype} on {skip.device}, expected {x.dtype} on {x.device} as x"
        )
    if skip.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"skip has shape {tuple(skip.shape)}, expected the height and width of "
            f"x {tuple(x.shape)}"
        )
    if weight_skip.shape[0] != weight_x.shape[0]:
        raise ValueError(
            f"weight_skip has shape {tuple(weight_skip.shape)}, expected the "
            f"{weight_x.shape[0]} output channels of weight_x"
        )
    channels, count = weight_x.shape[0], x.numel() // max(1, x.shape[1])
    check_statistics("x", x, count, mean, var)
    check_channels(x, channels, mean, var, norm_weight=norm_weight, norm_bias=norm_bias)
    check_number("eps", eps, 0)
    chosen = resolve(kernels, [x])
    method = conv_method(x.shape[-2:].numel(), weight_x, conv, chosen)
    s = convolve(skip, weight_skip, 1, 1, False, method)
    norm = (norm_weight, norm_bias, mean, var, eps)
    return _normalised(x, weight_x, s, 1, 1, False, method, norm, chosen)


def up_conv_block(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    stride: int = 2,
    padding: int = 1,
    eps: float = 1e-5,
    conv: str | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Transposed convolution of x (N, C, H, W), batch normalisation, ReLU.

    ``weight`` is (C, C_out, k, k) as in ``ConvTranspose2d``; the other arguments, the results and
    the errors are those of :func:`skip_conv_block`.
    """
    check_conv("x", x, "weight", weight, 0)
    check_channels(x, weight.shape[1], mean, var, norm_weight=norm_weight, norm_bias=norm_bias)
    check_step("stride", stride, 1)
    check_step("padding", padding, 0)
    check_number("eps", eps, 0)
    kernel = weight.shape[-1]
    sides = conv_size(x.shape[2:], kernel, stride, padding, up=True)
    if min(sides) < 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected a map whose convolution by {kernel}×{kernel} "
            f"with stride {stride} and padding {padding} is not empty"
        )
    check_statistics("x", x, x.shape[0] * sides[0] * sides[1], mean, var)
    chosen = resolve(kernels, [x])
    method = conv_method(x.shape[-2:].numel(), weight, conv, chosen)
    norm = (norm_weight, norm_bias, mean, var, eps)
    return _normalised(x, weight, None, stride, padding, True, method, norm, chosen)


def _normalised(
    x: Tensor,
    weight: Tensor,
    s: Tensor | None,
    stride: int,
    padding: int,
    up: bool,
    method: str,
    norm: tuple[Any, ...],
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalisation and ReLU of the convolution plus s."""
    norm_weight, norm_bias, mean, var, eps = norm
    if method == "own" and mean is None and var is None:
        u, mean, var = convolve_statistics(x, weight, s, stride, padding, up)
        y, *_ = norm_op(u, s, norm_weight, norm_bias, mean, var, True, eps, 0.0, kernels)
        return y, mean, var
    u = convolve(x, weight, stride, padding, up, method)
    return norm_activation(u, s, norm_weight, norm_bias, mean, var, eps=eps, kernels=kernels)
