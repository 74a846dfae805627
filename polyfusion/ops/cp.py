"""PF-CP: z̃ = A₁ ∏_v (A_vᵀ φ(z_v)), eq. (7): project, gate, project."""

from collections.abc import Sequence

from torch import Tensor

from polyfusion.dispatch import resolve
from polyfusion.kernels.eager import hadamard
from polyfusion.ops import views as checks
from polyfusion.ops.register import register_fusion


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
    views, factors, out, noise = checks.autocast(views, factors, out, noise)
    _check(views, factors, out, noise)
    chosen = resolve(kernels, views)
    if chosen == "eager":
        return hadamard.cp_forward(views, factors, out, noise)
    return _cp(views, factors, out, noise, chosen)


@checks.once
def _check(
    views: Sequence[Tensor], factors: Sequence[Tensor], out: Tensor, noise: Tensor | None
) -> None:
    leading = checks.check_views(views)
    checks.check_matrix("out", out, "(m, k)")
    checks.check_list("factors", factors, len(views))
    for v, (view, factor) in enumerate(zip(views, factors, strict=True)):
        expected = (view.shape[-1] + 1, out.shape[1])
        checks.check_shape(f"factors[{v}]", factor, f"(d_{v + 1}+1, k)", expected)
    checks.check_noise(noise, leading)
    checks.check_alike(views=views, factors=factors, out=out, noise=noise)


_cp = register_fusion(
    "cp_fusion",
    "Tensor[] views, Tensor[] factors, Tensor out",
    hadamard,
    outputs=lambda views, factors, out: out.shape[0],
)
