"""How the plain PyTorch forms combine views, some with frames and some constant over a clip."""

import functools
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from polyfusion.kernels.eager.product import product


def append_one(view: Tensor) -> Tensor:
    """φ(z) = [z, 1], eq. (6)."""
    return torch.cat([view, view.new_ones((*view.shape[:-1], 1))], dim=-1)


_FEW = 4096
"""Values up to which appending the 1 costs less than splitting the factor, and its gradient."""


def project(view: Tensor, factor: Tensor) -> Tensor:
    """φ(z) A for a factor (d+1, k) whose last row meets the appended 1: the row is a bias."""
    if not torch.compiler.is_compiling() and view.numel() <= _FEW:
        return append_one(view) @ factor
    weight, bias = factor.split([factor.shape[0] - 1, 1])
    return product(view, weight, bias[0])


def frames_as_rows(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let clips of one frame each, as a stream's, be rows without frames: operators are plainer.

    ``forward(views, ..., noise)`` has the noise, or None, as its last argument.
    """

    @functools.wraps(forward)
    def run(views: Sequence[Tensor], *operands: Any) -> Tensor:
        frames = [view.shape[1] for view in views if view.ndim == 3]
        if not frames or any(count != 1 for count in frames):
            return forward(views, *operands)
        *rest, noise = operands
        rows = [view.squeeze(1) if view.ndim == 3 else view for view in views]
        return forward(rows, *rest, None if noise is None else noise.squeeze(1)).unsqueeze(1)

    return run


def align(views: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
    """Give views constant over a clip T = 1 if others have frames; and say which have frames."""
    framed = [view.ndim == 3 for view in views]
    if any(framed):
        views = [view if view.ndim == 3 else view.unsqueeze(1) for view in views]
    return list(views), framed


def join(values: Sequence[Any], framed: Sequence[bool], combine: Callable[[Any, Any], Any]) -> Any:
    """Combine one value per view, among those constant over a clip first: once for all T frames.

    ``combine`` is associative and commutative, and broadcasts a clip's value over the frames of its
    left argument.
    """
    groups = (
        [x for x, f in zip(values, framed, strict=True) if f == kind] for kind in (True, False)
    )
    return reduce(combine, [reduce(combine, group) for group in groups if group])


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Product of every combination of columns, the last factor's varying fastest."""
    return reduce(lambda x, y: (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2), factors)


def with_noise(fused: Tensor, noise: Tensor | None) -> Tensor:
    """[z̃, noise], eq. (2)."""
    return fused if noise is None else torch.cat([fused, noise], dim=-1)
