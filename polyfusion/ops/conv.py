"""Convolutions the library does poorly: registered operators closed under differentiation.

The three maps (x, w) → conv, (y, w) → conv_transpose and (x, y) → weight_grad are bilinear, and
each one's gradients are the other two: gradients of every order are right.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from polyfusion.ops import _taps
from polyfusion.ops.norm import recompute_activation

METHODS = ("library", "taps")


def conv_method(pixels: int, weight: Tensor) -> str:
    """How a convolution over maps of so many pixels is computed: the one place that decides.

    ``"taps"``: one matrix product per tap, 2.5 to 4 times the speed of oneDNN's convolution for
    1024 channels on 4×3 maps on a CPU. ``"library"``: what PyTorch calls.
    """
    small = pixels <= 16 and weight.shape[0] * weight.shape[1] >= 256 * 256
    return "taps" if small and weight.device.type == "cpu" else "library"


def conv2d(x: Tensor, weight: Tensor, *, padding: int = 1, method: str | None = None) -> Tensor:
    """``F.conv2d(x, weight, padding=padding)`` by ``method``, or the one that suits."""
    with recompute_activation(x):
        if (method or conv_method(x.shape[-2:].numel(), weight)) == "library":
            return F.conv2d(x, weight, padding=padding)
        return _conv(x, weight, 1, padding)


def conv_transpose2d(
    x: Tensor, weight: Tensor, *, stride: int = 2, padding: int = 1, method: str | None = None
) -> Tensor:
    """``F.conv_transpose2d(x, weight, stride=stride, padding=padding)``, likewise."""
    with recompute_activation(x):
        if (method or conv_method(x.shape[-2:].numel(), weight)) == "library":
            return F.conv_transpose2d(x, weight, stride=stride, padding=padding)
        return _conv_transpose(x, weight, stride, padding)


@custom_op("polyfusion::conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return _taps.conv(x, weight, stride, padding)


@custom_op("polyfusion::conv_transpose", mutates_args=())
def _conv_transpose(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return _taps.conv_transpose(x, weight, stride, padding)


@custom_op("polyfusion::conv_weight_grad", mutates_args=())
def _weight_grad(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    return _taps.weight_grad(x, grad, kernel, stride, padding)


@_conv.register_fake
def _(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    kernel = weight.shape[-1]
    h, w = ((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:])
    return _channels_last(x, x.shape[0], h, w, weight.shape[0])


@_conv_transpose.register_fake
def _(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    kernel = weight.shape[-1]
    h, w = ((size - 1) * stride - 2 * padding + kernel for size in x.shape[2:])
    return _channels_last(x, x.shape[0], h, w, weight.shape[1])


@_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    return _channels_last(x, grad.shape[1], kernel, kernel, x.shape[1])


def _channels_last(x: Tensor, n: Any, h: Any, w: Any, c: Any) -> Tensor:
    return x.new_empty(n, h, w, c).permute(0, 3, 1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *ctx.geometry = inputs
    ctx.save_for_backward(first, second)


def _conv_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, *_ = ctx.needs_input_grad
    stride, padding = ctx.geometry
    return (
        _conv_transpose(grad, weight, stride, padding) if need_x else None,
        _weight_grad(x, grad, weight.shape[-1], stride, padding) if need_weight else None,
        None,
        None,
    )


def _conv_transpose_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, *_ = ctx.needs_input_grad
    stride, padding = ctx.geometry
    return (
        _conv(grad, weight, stride, padding) if need_x else None,
        _weight_grad(grad, x, weight.shape[-1], stride, padding) if need_weight else None,
        None,
        None,
    )


def _weight_grad_gradients(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
    x, grad = ctx.saved_tensors
    need_x, need_grad, *_ = ctx.needs_input_grad
    _kernel, stride, padding = ctx.geometry
    return (
        _conv_transpose(grad, weight, stride, padding) if need_x else None,
        _conv(x, weight, stride, padding) if need_grad else None,
        None,
        None,
        None,
    )


_conv.register_autograd(_conv_gradients, setup_context=_save)
_conv_transpose.register_autograd(_conv_transpose_gradients, setup_context=_save)
_weight_grad.register_autograd(_weight_grad_gradients, setup_context=_save)
