"""The fusion kernels' calls to compile ahead: the paper's sizes, 16 clips of 75 frames."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from polyfusion.kernels.triton.compile.shipped import ship
from polyfusion.kernels.triton.hadamard import cmf_backward, cmf_forward, cp_backward, cp_forward
from polyfusion.kernels.triton.tucker import tucker_backward, tucker_forward

B, T, A, D, M, N, K = 16, 75, 256, 128, 384, 10, 128


def _cp(make: Callable[..., Tensor]) -> None:
    views, out = [make(B, T, A), make(B, D)], make(M, K)
    factors = [make(A + 1, K), make(D + 1, K)]
    cp_forward(views, factors, out, make(B, T, N))
    cp_backward(make(B, T, M + N), views, factors, out, [True] * 5)


def _cmf(make: Callable[..., Tensor], shared: bool) -> None:
    views, out, bias = [make(B, T, A), make(B, D)], make(M, K), make(M)
    first = [make(A, K), make(D, K)]
    second = [] if shared else [make(A, K), make(D, K)]
    cmf_forward(views, first, second, out, bias, make(B, T, N))
    needs = [True] * (6 + len(second))
    cmf_backward(make(B, T, M + N), views, first, second, out, bias, needs)


def _tucker(make: Callable[..., Tensor]) -> None:
    views, core, out = [make(B, T, A), make(B, D)], make(M // 2, A // 2, D // 2), make(M, M // 2)
    factors = [make(A + 1, A // 2), make(D + 1, D // 2)]
    tucker_forward(views, core, factors, out, make(B, T, N))
    tucker_backward(make(B, T, M + N), views, core, factors, out, [True] * 6)


for _dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
    _make = partial(torch.empty, dtype=_dtype)
    if _dtype in (torch.bfloat16, torch.float32):  # they are parts of cmf
        ship("cp", _dtype, partial(_cp, _make), operators=("cp_fusion",))
        ship("cmf-sr", _dtype, partial(_cmf, _make, True))
    ship("cmf", _dtype, partial(_cmf, _make, False), tf32=True, operators=("cmf_fusion",))
    ship("tucker", _dtype, partial(_tucker, _make), tf32=True, operators=("tucker_fusion",))
