"""Tolerances and fusion problems that several tests share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polyfusion import ops
from polyfusion.nn.fusion import FUSED as FORMS  # noqa: F401  (every fused form by its name)
from polyfusion.ops import reference

# The tolerances of a single operator, of the normalisation and of a whole block: each the relative
# error of a whole tensor, against float64 on the same rounded inputs. The interpreter truncates to
# bfloat16 instead of rounding, and Tucker's gradients round five times in a row.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 3e-3,
    torch.bfloat16: 3e-2,
}
NORM_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
BLOCK_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value - expected‖ / ‖expected‖ in float64; NaN counts as infinite."""
    assert value.shape == expected.shape, f"{tuple(value.shape)} != {tuple(expected.shape)}"
    value, expected = value.double(), expected.double()
    if not value.numel():
        return 0.0
    error = (value - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.double).tiny)
    return error.nan_to_num(nan=torch.inf).item()


@dataclass
class Problem:
    """A fusion operator with its arguments."""

    form: str
    arguments: list[Any]
    noise: Tensor | None
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        flat = [x for item in self.arguments for x in (item if isinstance(item, list) else [item])]
        self.leaves = [x for x in [*flat, self.noise] if x is not None]

    def fuse(self, kernels: str = "auto") -> Tensor:
        operator = getattr(ops, f"{self.form.split('-')[0]}_fusion")
        return operator(*self.arguments, noise=self.noise, kernels=kernels)

    def with_leaves(self, leaves: Sequence[Tensor]) -> "Problem":
        """The same problem on other tensors, in the order of ``leaves``."""
        rest = iter(leaves)
        arguments = [
            [next(rest) for _ in item]
            if isinstance(item, list)
            else (None if item is None else next(rest))
            for item in self.arguments
        ]
        return Problem(self.form, arguments, None if self.noise is None else next(rest))

    def gradients(self, kernels: str, cotangent: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(self.fuse(kernels), self.leaves, cotangent))

    def expect(self, cotangent: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Value and gradients of the oracle, in float64."""
        double = self.with_leaves([x.detach().double().requires_grad_() for x in self.leaves])
        oracle = getattr(reference, f"{self.form.split('-')[0]}_fusion_reference")
        value = oracle(*double.arguments, double.noise)
        cotangent = torch.zeros_like(value) if cotangent is None else cotangent.double()
        return value.detach(), list(torch.autograd.grad(value, double.leaves, cotangent))


def make_problem(
    form: str,
    framed: Sequence[bool] = (True, False),
    *,
    batch: int = 2,
    frames: int = 3,
    sizes: Sequence[int] = (5, 17, 3),
    outputs: int = 19,
    rank: int = 6,
    noise: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """A small problem with one view for each entry of ``framed``: with frames, or per clip."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=rng, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    sizes = sizes[: len(framed)]
    leading = (batch, frames) if any(framed) else (batch,)
    views = [
        draw(batch, frames, d) if has_frames else draw(batch, d)
        for d, has_frames in zip(sizes, framed, strict=True)
    ]
    drawn = draw(*leading, noise) if noise else None
    if form == "cp":
        factors = [draw(d + 1, rank) for d in sizes]
        return Problem(form, [views, factors, draw(outputs, rank)], drawn)
    if form == "tucker":
        ranks = [rank + 1 - v for v in range(len(sizes))]
        factors = [draw(d + 1, k) for d, k in zip(sizes, ranks, strict=True)]
        arguments = [views, draw(rank, *ranks), factors, draw(outputs, rank)]
        return Problem(form, arguments, drawn)
    first = [draw(d, rank) for d in sizes]
    second = [draw(d, rank) for d in sizes] if form == "cmf" else None
    return Problem(form, [views, first, second, draw(outputs, rank), draw(outputs)], drawn)
