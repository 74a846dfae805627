"""PF-CMF and PF-CMF-SR: z̃ = b + U (Σ_v V_vᵀ z_v + all products of two or more B_vᵀ z_v)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyfusion.ops import _common as common
from polyfusion.ops._dispatch import fused_kernels, resolve
from polyfusion.ops._product import product
from polyfusion.ops._register import register_fusion


def cmf_fusion(
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor] | None,
    out: Tensor,
    bias: Tensor,
    *,
    noise: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Fuse views with coupled matrix-tensor factorisation, eq. (5); shared row space, eq. (6b).

    With p_v = V_vᵀ z_v and r_v = B_vᵀ z_v: z̃ = b + U (Σ_v p_v + Σ_{|S| >= 2} ∏_{v in S} r_v). For
    two views that is p_1 + p_2 + r_1 ∘ r_2; with B_v = V_v it is ∏_v (1 + p_v) - 1.

    Args:
        views: V >= 2 tensors, (B, T, d_v), or (B, d_v) if constant over the clip (never repeated).
        first: V_v (d_v, k) for each view.
        second: B_v (d_v, k) for each view, or ``None`` for the shared row space B_v = V_v.
        out: U (m, k).
        bias: b (m,).
        noise: (B, T, n), or (B, n) if no view has frames; written behind the result, eq. (2).
        kernels: "auto", "eager", "triton" or "cuda".

    Returns:
        (B, T, m + n) in the dtype of the inputs (the autocast dtype under autocast), or (B, m + n)
        if no view has frames. Differentiable to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
        KernelsUnavailable: the kernels asked for cannot run here.
    """
    views, first, second, out, bias, noise = common.autocast(views, first, second, out, bias, noise)
    leading = common.check_views(views)
    common.check_matrix("out", out, "(m, k)")
    _check_weights("first", first, views, out.shape[1])
    if second is not None:
        _check_weights("second", second, views, out.shape[1])
    common.check_shape("bias", bias, "(m,)", (out.shape[0],))
    common.check_noise(noise, leading)
    common.check_alike(views=views, first=first, second=second, out=out, bias=bias, noise=noise)
    chosen = resolve(kernels, views)
    if chosen != "eager":
        return _fused(views, first, second or [], out, bias, noise, chosen)
    return common.with_noise(cmf_eager(views, first, second, out, bias), noise)


def cmf_first_order_fusion(
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    out: Tensor,
    bias: Tensor,
    *,
    noise: Tensor | None = None,
) -> Tensor:
    """z̃ = b + U Σ_v V_vᵀ z_v: eq. (5) without interactions between the views. Eager only.

    The arguments, the result and the errors are those of :func:`cmf_fusion`.
    """
    views, first, out, bias, noise = common.autocast(views, first, out, bias, noise)
    leading = common.check_views(views)
    common.check_matrix("out", out, "(m, k)")
    _check_weights("first", first, views, out.shape[1])
    common.check_shape("bias", bias, "(m,)", (out.shape[0],))
    common.check_noise(noise, leading)
    common.check_alike(views=views, first=first, out=out, bias=bias, noise=noise)
    views, framed = common.align(views)
    linear = [product(z, weight) for z, weight in zip(views, first, strict=True)]
    fused = product(common.join(linear, framed, torch.add), out.mT, bias)
    return common.with_noise(fused, noise)


def cmf_eager(
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor] | None,
    out: Tensor,
    bias: Tensor,
) -> Tensor:
    """:func:`cmf_fusion` in plain PyTorch, without checks."""
    views, framed = common.align(views)
    linear = [product(z, weight) for z, weight in zip(views, first, strict=True)]
    if not second:
        return product(common.join(linear, framed, _merge_shared), out.mT, bias)
    rows = [product(z, weight) for z, weight in zip(views, second, strict=True)]
    order_one = common.join(linear, framed, torch.add)
    _, higher = common.join([(row, None) for row in rows], framed, _merge)
    return product(order_one + higher, out.mT, bias)


def _merge_shared(left: Tensor, right: Tensor) -> Tensor:
    """(1 + left) ∘ (1 + right) - 1, without the cancellation."""
    return torch.addcmul(right, left, 1 + right)


def _merge(
    left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Merge (terms of order one, terms of higher order or none) of two groups of views."""
    (first, higher), (other_first, other_higher) = left, right
    every = first if higher is None else first + higher
    other = other_first if other_higher is None else other_first + other_higher
    merged = every * other
    for terms in (higher, other_higher):
        if terms is not None:
            merged = merged + terms
    return first + other_first, merged


def _check_weights(
    name: str, weights: Sequence[Tensor], views: Sequence[Tensor], rank: int
) -> None:
    common.check_list(name, weights, len(views))
    for v, (view, weight) in enumerate(zip(views, weights, strict=True)):
        common.check_shape(f"{name}[{v}]", weight, f"(d_{v + 1}, k)", (view.shape[-1], rank))


def _forward(kernels: str, operands: Sequence, noise: Tensor | None) -> Tensor:
    fused = fused_kernels("hadamard", kernels)

    views, first, second, out, bias = operands
    if not second:
        return fused.hadamard_forward("shared", views, (), first, out, bias, noise)
    return fused.hadamard_forward("cmf", views, first, second, out, bias, noise)


def _backward(
    kernels: str, grad: Tensor, operands: Sequence, needs: Sequence[bool]
) -> list[Tensor]:
    fused = fused_kernels("hadamard", kernels)

    views, first, second, out, _bias = operands
    if not second:
        return fused.hadamard_backward("shared", grad, views, (), first, out, needs)
    return fused.hadamard_backward("cmf", grad, views, first, second, out, needs)


_fused = register_fusion(
    "cmf_fusion",
    "Tensor[] views, Tensor[] first, Tensor[] second, Tensor out, Tensor bias",
    eager=cmf_eager,
    forward=_forward,
    backward=_backward,
    outputs=lambda views, first, second, out, bias: out.shape[0],
)
