"""The block kernels' launches at sizes people use, to be compiled without a GPU."""

from functools import partial

import torch
from torch import Tensor

from polyfusion.kernels import norm
from polyfusion.kernels.compile import shipped


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


for _dtype in (torch.bfloat16, torch.float32):
    _suffix = str(_dtype).removeprefix("torch.")
    shipped(f"norm_{_suffix}")(partial(_norm, _dtype, 64, 64, 48, 0))
    shipped(f"norm_skip_{_suffix}")(partial(_norm, _dtype, 1024, 4, 3, 4))
