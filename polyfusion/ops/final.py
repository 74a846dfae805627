"""The generator's last layer: a transposed convolution to an image, and tanh."""

from typing import Any

from torch import Tensor

from polyfusion.dispatch import backend, resolve
from polyfusion.kernels.layout import conv_size, empty_channels_last
from polyfusion.ops.conv import check_conv, convolve
from polyfusion.ops.recompute import recompute_activation
from polyfusion.ops.register import register
from polyfusion.ops.views import autocast

MOST_OUT = 64
"""Output channels of the fused last layer: a tile holds its 16 · out taps."""


def final_block(x: Tensor, weight: Tensor, *, kernels: str = "auto") -> Tensor:
    """tanh of a 4×4 stride-2 transposed convolution.

    Args:
        x: (N, C, H, W).
        weight: (C, out, 4, 4) as in ``ConvTranspose2d``.
        kernels: "auto", "eager", "triton" or "cuda".

    Returns:
        (N, out, 2H, 2W) in (-1, 1), channels-last in memory. Differentiable to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
        KernelsUnavailable: the kernels asked for cannot run here.
    """
    check_conv("x", x, "weight", weight, 0)
    if weight.shape[2:] != (4, 4):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (C, out, 4, 4)")
    out = weight.shape[1]
    many = f"the last layer's kernels have at most {MOST_OUT} channels, not {out}"
    chosen = resolve(kernels, [x], unsupported=many if out > MOST_OUT else None)
    if chosen == "eager":
        return _eager(x, weight)
    x, weight = autocast(x, weight)
    with recompute_activation(x):
        return final_op(x, weight, chosen)


def _eager(x: Tensor, weight: Tensor) -> Tensor:
    return convolve(x, weight, stride=2, padding=1, up=True, method="library").tanh()


def _fake(x: Tensor, weight: Tensor, _kernels: str) -> Tensor:
    size = conv_size(x.shape[2:], kernel=4, stride=2, padding=1, up=True)
    return empty_channels_last(x, x.shape[0], weight.shape[1], *size)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, *rest: Any) -> list[Tensor]:
    _needs, kernels = rest
    return backend(kernels, "final").final_backward(grad, x, weight, y)


final_op = register(
    "final_block",
    "Tensor x, Tensor weight",
    forward=lambda x, weight, kernels: backend(kernels, "final").final_forward(x, weight),
    fake=_fake,
    backward=_backward,
    eager=lambda x, weight, y: _eager(x, weight),
    saved="Tensor y",
    keep=lambda ctx, constants, y: [y],
    fake_backward=lambda x, weight: [
        empty_channels_last(x, *x.shape),
        weight.new_empty(weight.shape),
    ],
)
