"""The block kernels' launches at sizes people use, to be compiled without a GPU."""

from functools import partial

import torch
from torch import Tensor

from polyfusion.kernels import conv, final, norm
from polyfusion.kernels.compile import shipped, with_tf32


def _norm(dtype: torch.dtype, channels: int, height: int, width: int, clips: int) -> None:
    """Statistics, apply and backward of 4 clips of 5 frames; without s if ``clips`` is 0."""

    def draw(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    u = draw(20, channels, height, width)
    s = draw(clips, channels, height, width) if clips else None
    values = torch.ones(4, channels, dtype=torch.promote_types(dtype, torch.float32))
    mean, var = norm.statistics(u, s)
    norm.apply(u, s, values[0], values[1], mean, var, 1e-5, 0.2)
    norm.backward(u, u, s, *values, True, 1e-5, 0.2)


def _final(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(75, 64, 64, 48, dtype=dtype), torch.zeros(64, 3, 4, 4, dtype=dtype)
    y = final.final_forward(x, weight)
    final.final_backward(y, y, x, weight)


def _conv(dtype: torch.dtype, channels: int, height: int, width: int) -> None:
    """The skip convolution and the up-convolution, with their statistics and gradients."""

    def draw(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    x, s = draw(150, channels, height, width), draw(2, channels, height, width)
    weight, up = draw(channels, channels, 3, 3), draw(channels, channels // 2, 4, 4)
    conv.conv_statistics(x, weight, s, 1, 1, False)
    conv.conv_transpose(x, weight, 1, 1)
    conv.weight_grad(x, x, 3, 1, 1)
    y, _mean, _var = conv.conv_statistics(x, up, None, 2, 1, True)
    conv.conv(y, up, 2, 1)
    conv.weight_grad(y, x, 4, 2, 1)


for _dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
    _calls = {
        "norm": partial(_norm, _dtype, 64, 64, 48, 0),
        "norm_skip": partial(_norm, _dtype, 1024, 4, 3, 4),
        "final": partial(_final, _dtype),
        "conv_1024": partial(_conv, _dtype, 1024, 4, 3),
        "conv_128": partial(_conv, _dtype, 128, 8, 6),
    }
    if _dtype != torch.bfloat16:  # one size is enough
        del _calls["conv_1024"]
    if _dtype in (torch.float16, torch.float64):
        del _calls["norm"]
    for _name, _call in _calls.items():
        _dtype_name = str(_dtype).removeprefix("torch.")
        shipped(f"{_name}_{_dtype_name}", _call, every=_dtype != torch.float16)
        if _dtype == torch.float32 and _name in ("final", "conv_128"):
            shipped(f"{_name}_tf32", partial(with_tf32, _call))
