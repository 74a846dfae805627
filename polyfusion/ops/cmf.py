"""PF-CMF and PF-CMF-SR: z̃ = b + U (Σ_v V_vᵀ z_v + all products of two or more B_vᵀ z_v)."""

from collections.abc import Sequence

from torch import Tensor

from polyfusion.dispatch import resolve
from polyfusion.kernels.eager import hadamard
from polyfusion.ops import views as checks
from polyfusion.ops.register import register_fusion


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
    views, first, second, out, bias, noise = checks.autocast(views, first, second, out, bias, noise)
    _check(views, first, second, out, bias, noise)
    chosen = resolve(kernels, views)
    if chosen == "eager":
        return hadamard.cmf_forward(views, first, second or (), out, bias, noise)
    return _cmf(views, first, second or [], out, bias, noise, chosen)


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
    views, first, out, bias, noise = checks.autocast(views, first, out, bias, noise)
    leading = checks.check_views(views)
    checks.check_matrix("out", out, "(m, k)")
    _check_weights("first", first, views, out.shape[1])
    checks.check_shape("bias", bias, "(m,)", (out.shape[0],))
    checks.check_noise(noise, leading)
    checks.check_alike(views=views, first=first, out=out, bias=bias, noise=noise)
    return hadamard.cmf_first_order_forward(views, first, out, bias, noise)


@checks.once
def _check(
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor] | None,
    out: Tensor,
    bias: Tensor,
    noise: Tensor | None,
) -> None:
    leading = checks.check_views(views)
    checks.check_matrix("out", out, "(m, k)")
    _check_weights("first", first, views, out.shape[1])
    if second is not None:
        _check_weights("second", second, views, out.shape[1])
    checks.check_shape("bias", bias, "(m,)", (out.shape[0],))
    checks.check_noise(noise, leading)
    checks.check_alike(views=views, first=first, second=second, out=out, bias=bias, noise=noise)


def _check_weights(
    name: str, weights: Sequence[Tensor], views: Sequence[Tensor], rank: int
) -> None:
    checks.check_list(name, weights, len(views))
    for v, (view, weight) in enumerate(zip(views, weights, strict=True)):
        checks.check_shape(f"{name}[{v}]", weight, f"(d_{v + 1}, k)", (view.shape[-1], rank))


_cmf = register_fusion(
    "cmf_fusion",
    "Tensor[] views, Tensor[] first, Tensor[] second, Tensor out, Tensor bias",
    hadamard,
    outputs=lambda views, first, second, out, bias: out.shape[0],
)
