"""The block kernels' launches at sizes people use, to be compiled without a GPU."""

from functools import partial

import torch
from torch import Tensor

from polyfusion.kernels.layout import Norm
from polyfusion.kernels.triton import conv, final, norm
from polyfusion.kernels.triton.compile.shipped import ship


def _norm(dtype: torch.dtype, channels: int, height: int, width: int, clips: int) -> None:
    """Statistics, apply and backward of 4 clips of 5 frames; without s if ``clips`` is 0."""

    def draw(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    u = draw(20, channels, height, width)
    s = draw(clips, channels, height, width) if clips else None
    values = torch.ones(4, channels, dtype=torch.promote_types(dtype, torch.float32))
    norm.norm_forward(Norm(u, s, values[0], values[1], None, None, True, 1e-5, 0.2))
    norm.norm_backward(u, Norm(u, s, *values, True, 1e-5, 0.2))


def _final(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(75, 64, 64, 48, dtype=dtype), torch.zeros(64, 3, 4, 4, dtype=dtype)
    y = final.final_forward(x, weight)
    final.final_backward(y, x, weight, y)


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
    if _dtype in (torch.bfloat16, torch.float32):
        ship("norm", _dtype, partial(_norm, _dtype, 64, 64, 48, 0))
    if _dtype == torch.bfloat16:  # of the others one size is enough
        ship("conv_1024", _dtype, partial(_conv, _dtype, 1024, 4, 3))
    _norm_skip, _last = partial(_norm, _dtype, 1024, 4, 3, 4), partial(_final, _dtype)
    _blocks = ("skip_conv_block", "up_conv_block")
    ship("norm_skip", _dtype, _norm_skip, operators=("norm_activation",))
    ship("conv_128", _dtype, partial(_conv, _dtype, 128, 8, 6), tf32=True, operators=_blocks)
    ship("final", _dtype, _last, tf32=True, operators=("final_block",))
