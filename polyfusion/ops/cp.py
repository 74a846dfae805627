"""PF-CP: z̃ = A₁ ∏_v (A_vᵀ φ(z_v)), eq. (7): project, gate, project."""

from collections.abc import Sequence
from operator import mul

from torch import Tensor

from polyfusion.ops import _common as common
from polyfusion.ops._dispatch import fused_kernels, resolve
from polyfusion.ops._product import product
from polyfusion.ops._register import register_fusion


def cp_fusion(
    views: Sequence[Tensor],
    factors: Sequence[Tensor],
    out: Tensor,
    *,
    noise: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Fuse views with a CP-factorised interaction tensor of every order up to V, eq. (7).

    Args:
        views: V >= 2 tensors, (B, T, d_v), or (B, d_v) if constant over the clip (never repeated).
        factors: A_v (d_v+1, k) for each view; the last row multiplies the appended 1.
        out: A₁ (m, k).
        noise: (B, T, n), or (B, n) if no view has frames; written behind the result, eq. (2).
        kernels: "auto", "eager", "triton" or "cuda".

    Returns:
        (B, T, m + n) in the dtype of the inputs (the autocast dtype under autocast), or (B, m + n)
        if no view has frames. Differentiable to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
        KernelsUnavailable: the kernels asked for cannot run here.
    """
    views, factors, out, noise = common.autocast(views, factors, out, noise)
    leading = common.check_views(views)
    common.check_matrix("out", out, "(m, k)")
    common.check_list("factors", factors, len(views))
    for v, (view, factor) in enumerate(zip(views, factors, strict=True)):
        expected = (view.shape[-1] + 1, out.shape[1])
        common.check_shape(f"factors[{v}]", factor, f"(d_{v + 1}+1, k)", expected)
    common.check_noise(noise, leading)
    common.check_alike(views=views, factors=factors, out=out, noise=noise)
    chosen = resolve(kernels, views)
    if chosen != "eager":
        return _fused(views, factors, out, noise, chosen)
    return common.with_noise(cp_eager(views, factors, out), noise)


def cp_eager(views: Sequence[Tensor], factors: Sequence[Tensor], out: Tensor) -> Tensor:
    """:func:`cp_fusion` in plain PyTorch, without checks."""
    views, framed = common.align(views)
    projected = [common.project(z, a) for z, a in zip(views, factors, strict=True)]
    return product(common.join(projected, framed, mul), out.mT)


def _forward(kernels: str, operands: Sequence, noise: Tensor | None) -> Tensor:
    fused = fused_kernels("hadamard", kernels)

    views, factors, out = operands
    return fused.hadamard_forward("cp", views, (), factors, out, None, noise)


def _backward(
    kernels: str, grad: Tensor, operands: Sequence, needs: Sequence[bool]
) -> list[Tensor]:
    fused = fused_kernels("hadamard", kernels)

    views, factors, out = operands
    return fused.hadamard_backward("cp", grad, views, (), factors, out, needs)


_fused = register_fusion(
    "cp_fusion",
    "Tensor[] views, Tensor[] factors, Tensor out",
    eager=cp_eager,
    forward=_forward,
    backward=_backward,
    outputs=lambda views, factors, out: out.shape[0],
)
