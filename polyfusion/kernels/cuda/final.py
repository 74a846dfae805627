"""The generator's last layer by the CUDA extension: ``csrc/final.cu``."""

from torch import Tensor

from polyfusion.extension import operators
from polyfusion.kernels.layout import channels_last, tf32


def final_forward(x: Tensor, weight: Tensor) -> Tensor:
    """tanh of the transposed convolution of x (N, C, H, W) by weight (C, out, 4, 4)."""
    return operators(x).final_forward(channels_last(x), weight, tf32(convolution=True))


def final_backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor) -> list[Tensor]:
    """Gradients of x and weight; x's in channels-last memory. Sums run in a fixed order."""
    grad, x, y = channels_last(grad), channels_last(x), channels_last(y)
    return list(operators(x).final_backward(grad, x, weight, y, tf32(convolution=True)))
