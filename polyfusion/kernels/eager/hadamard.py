"""CP and both forms of CMF: project every view, combine entrywise, project."""

from collections.abc import Sequence
from operator import mul

import torch
from torch import Tensor

from polyfusion.kernels.eager.product import product
from polyfusion.kernels.eager.views import align, frames_as_rows, join, project


@frames_as_rows
def cp_forward(
    views: Sequence[Tensor], factors: Sequence[Tensor], out: Tensor, noise: Tensor | None
) -> Tensor:
    """[A₁ ∏_v (A_vᵀ φ(z_v)), noise], eq. (7)."""
    views, framed = align(views)
    projected = [project(z, a) for z, a in zip(views, factors, strict=True)]
    return product(join(projected, framed, mul), out.mT, noise=noise)


@frames_as_rows
def cmf_forward(
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    out: Tensor,
    bias: Tensor,
    noise: Tensor | None,
) -> Tensor:
    """Eq. (5) with noise behind it; eq. (6b), the shared row space, if ``second`` is empty."""
    views, framed = align(views)
    linear = [product(z, weight) for z, weight in zip(views, first, strict=True)]
    if not second:
        return product(join(linear, framed, _merge_shared), out.mT, bias, noise)
    gates = [product(z, weight) for z, weight in zip(views, second, strict=True)]
    order_one = join(linear, framed, torch.add)
    _, high = join([(gate, None) for gate in gates], framed, _merge)
    return product(order_one + high, out.mT, bias, noise)


@frames_as_rows
def cmf_first_order_forward(
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    out: Tensor,
    bias: Tensor,
    noise: Tensor | None,
) -> Tensor:
    """[b + U Σ_v V_vᵀ z_v, noise]."""
    views, framed = align(views)
    linear = [product(z, weight) for z, weight in zip(views, first, strict=True)]
    return product(join(linear, framed, torch.add), out.mT, bias, noise)


def _merge_shared(left: Tensor, right: Tensor) -> Tensor:
    """(1 + left) ∘ (1 + right) - 1, without the cancellation."""
    return torch.addcmul(right, left, 1 + right)


def _merge(
    left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Merge (terms of order one, terms of higher order or none) of two groups of views."""
    (low, high), (other_low, other_high) = left, right
    every = low if high is None else low + high
    other = other_low if other_high is None else other_low + other_high
    merged = every * other
    for terms in (high, other_high):
        if terms is not None:
            merged = merged + terms
    return low + other_low, merged
