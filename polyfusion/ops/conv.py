"""Convolutions computed otherwise than by the library: operators closed under differentiation.

The three maps (x, w) → conv, (y, w) → conv_transpose and (x, y) → weight_grad are bilinear, and
each one's gradients are the other two: gradients of every order are right.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_autograd

from polyfusion.dispatch import KernelsUnavailable, backend, transformed
from polyfusion.kernels.layout import conv_size, empty_channels_last, sum_dtype
from polyfusion.ops.norm import check_clips
from polyfusion.ops.recompute import recompute_activation
from polyfusion.ops.register import define
from polyfusion.ops.views import autocast, check_dtype, check_layout, describe

BACKENDS = {"taps": "eager", "own": "triton"}
"""The methods with operators of their own, and which backend has them."""
METHODS = ("library", *BACKENDS)


def conv_method(pixels: int, weight: Tensor, method: str | None, kernels: str) -> str:
    """How a convolution over maps of so many pixels is computed: the one place that decides.

    ``"library"``: what PyTorch calls. ``"taps"``: one matrix product per tap, 2.5 to 4 times the
    speed of oneDNN's convolution for 1024 channels on 4×3 maps on a CPU. ``"own"``: the implicit
    GEMM in Triton, whose epilogue leaves the statistics of the normalisation that follows; only on
    request, until it is measured to be faster somewhere. ``kernels`` is a resolved choice.
    """
    if method is None:
        small = pixels <= 16 and weight.shape[0] * weight.shape[1] >= 256 * 256
        taps = small and weight.device.type == "cpu" and not transformed()
        return "taps" if taps else "library"
    if method not in METHODS:
        raise ValueError(f"conv={method!r}: expected None or one of {METHODS}")
    if method == "own" and kernels != "triton":
        raise KernelsUnavailable(
            f"conv='own' with kernels={kernels!r}: the own convolution is in Triton; "
            "use kernels='triton'"
        )
    return method


def check_conv(name: str, x: Tensor, weight_name: str, weight: Tensor, axis: int) -> None:
    """Raise ``ValueError`` unless ``x`` is a map whose channels are the weight's axis ``axis``."""
    if not isinstance(x, Tensor) or x.ndim != 4:
        raise ValueError(f"{name}: expected a tensor (N, C, H, W), got {describe(x)}")
    check_dtype(name, x)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{weight_name}: expected a tensor of 4 axes, got {describe(weight)}")
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"{weight_name} has shape {tuple(weight.shape)}, expected 4 axes, the last two alike"
        )
    for label, value, sizes in ((name, x, x.shape[1:]), (weight_name, weight, weight.shape)):
        if 0 in sizes:
            raise ValueError(
                f"{label} has shape {tuple(value.shape)}, expected channels, height and width of "
                "at least 1"
            )
    if x.shape[1] != weight.shape[axis]:
        raise ValueError(
            f"{name} has {x.shape[1]} channels, expected {weight.shape[axis]} as axis {axis} of "
            f"its weight {tuple(weight.shape)}"
        )
    same = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    if not same or x.device != weight.device:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, expected {weight.dtype} on {weight.device} as its "
            "weight; cast one or use torch.autocast"
        )
    check_layout(weight_name, weight)


def check_step(name: str, value: Any, least: int) -> None:
    """Raise ``ValueError`` unless a stride or padding is an integer of at least ``least``."""
    if not isinstance(value, (int, torch.SymInt)) or not least <= value < 2**31:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}, below 2**31")


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int, up: bool, method: str) -> Tensor:
    """``conv2d``, or ``conv_transpose2d`` if ``up``; does not keep an activation for itself."""
    with recompute_activation(x):
        if method == "library":
            library = F.conv_transpose2d if up else F.conv2d
            return library(x, weight, stride=stride, padding=padding)
        x, weight = autocast(x, weight)
        return (_conv_transpose if up else _conv)(x, weight, stride, padding, method)


def convolve_statistics(
    x: Tensor, weight: Tensor, s: Tensor | None, stride: int, padding: int, up: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """u by the own convolution, and mean and biased variance of u + s from its epilogue."""
    x, weight, s = autocast(x, weight, s)
    if s is not None:
        check_clips("skip", s, x.shape[0])
        s = s.detach()
    with recompute_activation(x):
        return _conv_statistics(x, weight, s, stride, padding, up)


def _run(name: str) -> Any:
    """What computes an operator: the function of that name in the backend of its method."""

    def run(*arguments: Any) -> Tensor:
        *values, method = arguments
        return getattr(backend(BACKENDS[method], "conv"), name)(*values)

    return run


def _run_statistics(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backend(BACKENDS["own"], "conv").conv_statistics(*arguments)


def _fake_conv(x: Tensor, weight: Tensor, stride: int, padding: int, *_rest: Any) -> Tensor:
    size = conv_size(x.shape[2:], weight.shape[-1], stride, padding)
    return empty_channels_last(x, x.shape[0], weight.shape[0], *size)


def _fake_transpose(x: Tensor, weight: Tensor, stride: int, padding: int, *_rest: Any) -> Tensor:
    size = conv_size(x.shape[2:], weight.shape[-1], stride, padding, up=True)
    return empty_channels_last(x, x.shape[0], weight.shape[1], *size)


def _fake_weight_grad(x: Tensor, grad: Tensor, kernel: int, *_rest: Any) -> Tensor:
    return empty_channels_last(x, grad.shape[1], x.shape[1], kernel, kernel)


def _fake_statistics(
    x: Tensor, weight: Tensor, s: Tensor | None, stride: int, padding: int, up: bool
) -> tuple[Tensor, Tensor, Tensor]:
    u = (_fake_transpose if up else _fake_conv)(x, weight, stride, padding)
    mean, var = (u.new_empty(u.shape[1], dtype=sum_dtype(x)) for _ in range(2))
    return u, mean, var


_RULES = "int stride, int padding, str method) -> Tensor"
_conv = define("conv", f"(Tensor x, Tensor weight, {_RULES}", _run("conv"), _fake_conv)
_conv_transpose = define(
    "conv_transpose", f"(Tensor x, Tensor weight, {_RULES}", _run("conv_transpose"), _fake_transpose
)
_weight_grad = define(
    "conv_weight_grad",
    f"(Tensor x, Tensor grad, int kernel, {_RULES}",
    _run("weight_grad"),
    _fake_weight_grad,
)
_conv_statistics = define(
    "conv_statistics",
    "(Tensor x, Tensor weight, Tensor? s, int stride, int padding, bool up) "
    "-> (Tensor, Tensor, Tensor)",
    _run_statistics,
    _fake_statistics,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, second, *ctx.constants = inputs
    ctx.save_for_backward(x, second)


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _s, stride, padding, ctx.up = inputs
    ctx.constants = [stride, padding, "own"]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight)


def _conv_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, *_ = ctx.needs_input_grad
    dx = _conv_transpose(grad, weight, *ctx.constants) if need_x else None
    dw = _weight_grad(x, grad, weight.shape[-1], *ctx.constants) if need_weight else None
    return dx, dw, None, None, None


def _transpose_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, *_ = ctx.needs_input_grad
    dx = _conv(grad, weight, *ctx.constants) if need_x else None
    dw = _weight_grad(grad, x, weight.shape[-1], *ctx.constants) if need_weight else None
    return dx, dw, None, None, None


def _weight_grad_gradients(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
    x, grad = ctx.saved_tensors
    need_x, need_grad, *_ = ctx.needs_input_grad
    _kernel, *constants = ctx.constants
    dx = _conv_transpose(grad, weight, *constants) if need_x else None
    dgrad = _conv(x, weight, *constants) if need_grad else None
    return dx, dgrad, None, None, None, None


def _statistics_gradients(ctx: Any, grad: Tensor, *_unused: Any) -> tuple[Any, ...]:
    dx, dw, *_ = (_transpose_gradients if ctx.up else _conv_gradients)(ctx, grad)
    return dx, dw, None, None, None, None


register_autograd("polyfusion::conv", _conv_gradients, setup_context=_save)
register_autograd("polyfusion::conv_transpose", _transpose_gradients, setup_context=_save)
register_autograd("polyfusion::conv_weight_grad", _weight_grad_gradients, setup_context=_save)
register_autograd(
    "polyfusion::conv_statistics", _statistics_gradients, setup_context=_save_statistics
)
