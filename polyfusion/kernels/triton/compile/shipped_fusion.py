"""The fusion kernels' calls to compile ahead: the paper's sizes, 16 clips of 75 frames."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from polyfusion.kernels.compile import shipped, with_tf32
from polyfusion.kernels.hadamard import hadamard_backward, hadamard_forward
from polyfusion.kernels.tucker import tucker_backward, tucker_forward

B, T, A, D, M, N, K = 16, 75, 256, 128, 384, 10, 128


def _hadamard(form: str, make: Callable[..., Tensor]) -> None:
    one = 1 if form == "cp" else 0
    views = [make(B, T, A), make(B, D)]
    rows = [make(A + one, K), make(D + one, K)]
    linear = [make(A, K), make(D, K)] if form == "cmf" else []
    bias = [] if form == "cp" else [make(M)]
    out, noise = make(M, K), make(B, T, N)
    hadamard_forward(form, views, linear, rows, out, bias[0] if bias else None, noise)
    needs = [True] * len([*views, *linear, *rows, out, *bias])
    hadamard_backward(form, make(B, T, M + N), views, linear, rows, out, needs)


def _tucker(make: Callable[..., Tensor]) -> None:
    views, core, out = [make(B, T, A), make(B, D)], make(M // 2, A // 2, D // 2), make(M, M // 2)
    factors = [make(A + 1, A // 2), make(D + 1, D // 2)]
    tucker_forward(views, core, factors, out, make(B, T, N))
    tucker_backward(make(B, T, M + N), views, core, factors, out, [True] * 6)


for _dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
    _make = partial(torch.empty, dtype=_dtype)
    _calls = {
        "cp": partial(_hadamard, "cp", _make),
        "cmf": partial(_hadamard, "cmf", _make),
        "cmf_sr": partial(_hadamard, "shared", _make),
        "tucker": partial(_tucker, _make),
    }
    if _dtype in (torch.float16, torch.float64):  # cp and cmf_sr are parts of cmf
        del _calls["cp"], _calls["cmf_sr"]
    for _name, _call in _calls.items():
        _dtype_name = str(_dtype).removeprefix("torch.")
        shipped(f"{_name}_{_dtype_name}", _call, every=_dtype != torch.float16)
        if _dtype == torch.float32 and _name in ("cmf", "tucker"):
            shipped(f"{_name}_tf32", partial(with_tf32, _call))
