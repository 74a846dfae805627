"""PF-Tucker: z̃ = U₁ (𝒢 ×₂ U₂ᵀφ(z_1) ... ×_{V+1} U_{V+1}ᵀφ(z_V)), eq. (8)."""

from collections.abc import Sequence

from torch import Tensor

from polyfusion.dispatch import resolve
from polyfusion.kernels.eager import tucker
from polyfusion.ops import views as checks
from polyfusion.ops.register import register_fusion


def tucker_fusion(
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    *,
    noise: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Fuse views with a Tucker-factorised interaction tensor, eq. (8).

    The views that are constant over a clip are contracted with the core once per clip.

    Args:
        views: V >= 2 tensors, (B, T, d_v), or (B, d_v) if constant over the clip (never repeated).
        core: 𝒢 (k_1, k_2, ..., k_{V+1}).
        factors: U_{v+1} (d_v+1, k_{v+1}) for each view; the last row multiplies the appended 1.
        out: U₁ (m, k_1).
        noise: (B, T, n), or (B, n) if no view has frames; written behind the result, eq. (2).
        kernels: "auto", "eager", "triton" or "cuda".

    Returns:
        (B, T, m + n) in the dtype of the inputs (the autocast dtype under autocast), or (B, m + n)
        if no view has frames. Differentiable to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
        KernelsUnavailable: the kernels asked for cannot run here.
    """
    views, core, factors, out, noise = checks.autocast(views, core, factors, out, noise)
    _check(views, core, factors, out, noise)
    chosen = resolve(kernels, views)
    if chosen == "eager":
        return tucker.tucker_forward(views, core, factors, out, noise)
    return _tucker(views, core, factors, out, noise, chosen)


def partial_tucker_fusion(
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    *,
    noise: Tensor | None = None,
) -> Tensor:
    """Eq. (8) without U₁: the core's first mode is the output. Eager only.

    Args:
        views: V >= 2 tensors, (B, T, d_v), or (B, d_v) if constant over the clip (never repeated).
        core: 𝒢 (m, k_2, ..., k_{V+1}).
        factors: U_{v+1} (d_v+1, k_{v+1}) for each view; the last row multiplies the appended 1.
        noise: (B, T, n), or (B, n) if no view has frames; appended to the result, eq. (2).

    Returns:
        (B, T, m + n), or (B, m + n) if no view has frames. Differentiable to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    views, core, factors, noise = checks.autocast(views, core, factors, noise)
    leading = checks.check_views(views)
    _check_core_and_factors(views, core, factors, "m")
    checks.check_noise(noise, leading)
    checks.check_alike(views=views, core=core, factors=factors, noise=noise)
    return tucker.partial_tucker_forward(views, core, factors, noise)


@checks.once
def _check(
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    noise: Tensor | None,
) -> None:
    leading = checks.check_views(views)
    _check_core_and_factors(views, core, factors, "k_1")
    checks.check_matrix("out", out, "(m, k_1)")
    checks.check_shape("out", out, "(m, k_1)", (out.shape[0], core.shape[0]))
    checks.check_noise(noise, leading)
    checks.check_alike(views=views, core=core, factors=factors, out=out, noise=noise)


def _check_core_and_factors(
    views: Sequence[Tensor], core: Tensor, factors: Sequence[Tensor], first: str
) -> None:
    if not isinstance(core, Tensor) or core.ndim != len(views) + 1:
        got = checks.describe(core)
        raise ValueError(
            f"core: expected {len(views) + 1} sizes ({first}, ..., k_{len(views) + 1}) "
            f"for {len(views)} views, got {got}"
        )
    checks.check_list("factors", factors, len(views))
    for v, (view, factor) in enumerate(zip(views, factors, strict=True)):
        letters, expected = f"(d_{v + 1}+1, k_{v + 2})", (view.shape[-1] + 1, core.shape[v + 1])
        checks.check_shape(f"factors[{v}]", factor, letters, expected)


_tucker = register_fusion(
    "tucker_fusion",
    "Tensor[] views, Tensor core, Tensor[] factors, Tensor out",
    tucker,
    outputs=lambda views, core, factors, out: out.shape[0],
)
