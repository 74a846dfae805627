"""PF-Tucker: z̃ = U₁ (𝒢 ×₂ U₂ᵀφ(z_1) ... ×_{V+1} U_{V+1}ᵀφ(z_V)), eq. (8)."""

from collections.abc import Sequence
from functools import reduce

from torch import Tensor

from polyfusion.ops import _common as common
from polyfusion.ops._dispatch import fused_kernels, resolve
from polyfusion.ops._product import product
from polyfusion.ops._register import register_fusion


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
    views, core, factors, out, noise = common.autocast(views, core, factors, out, noise)
    leading = common.check_views(views)
    _check_core_and_factors(views, core, factors, "k_1")
    common.check_matrix("out", out, "(m, k_1)")
    common.check_shape("out", out, "(m, k_1)", (out.shape[0], core.shape[0]))
    common.check_noise(noise, leading)
    common.check_alike(views=views, core=core, factors=factors, out=out, noise=noise)
    chosen = resolve(kernels, views)
    if chosen != "eager":
        return _fused(views, core, factors, out, noise, chosen)
    return common.with_noise(tucker_eager(views, core, factors, out), noise)


def tucker_eager(
    views: Sequence[Tensor], core: Tensor, factors: Sequence[Tensor], out: Tensor
) -> Tensor:
    """:func:`tucker_fusion` in plain PyTorch, without checks."""
    framed = [view.ndim == 3 for view in views]
    projected = [common.project(z, u) for z, u in zip(views, factors, strict=True)]
    per_clip, rows = meet_clips(projected, framed, core)
    if per_clip is None:
        return product(rows, out.mT)
    (count, width), (outputs, inner) = rows.shape[1:], out.shape
    if count * (width * inner + inner * outputs) <= width * outputs * (inner + count):
        return product(rows @ per_clip.mT, out.mT)
    return rows @ (out @ per_clip).mT  # long clips: fold U₁ in once per clip


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
    views, core, factors, noise = common.autocast(views, core, factors, noise)
    leading = common.check_views(views)
    _check_core_and_factors(views, core, factors, "m")
    common.check_noise(noise, leading)
    common.check_alike(views=views, core=core, factors=factors, noise=noise)
    framed = [view.ndim == 3 for view in views]
    projected = [common.project(z, u) for z, u in zip(views, factors, strict=True)]
    per_clip, rows = meet_clips(projected, framed, core)
    return common.with_noise(rows if per_clip is None else rows @ per_clip.mT, noise)


def meet_clips(
    rows: Sequence[Tensor], framed: Sequence[bool], core: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Contract a tensor (k, k_1, ..., k_V) with the rows of the views that lack frames.

    Returns M (B, k, K) and the frames' rows p (B, T, K), whose product p Mᵀ is the contraction, K
    the product of their k_v. If all views are of one kind: None and the contraction.

    Within a kind, a Khatri-Rao product followed by one matrix product takes the fewest
    multiply-adds, and the clips first takes fewer than the frames first.
    """
    with_frames = [v for v, has_frames in enumerate(framed) if has_frames]
    without = [v for v, has_frames in enumerate(framed) if not has_frames]
    core = core.permute(0, *(v + 1 for v in with_frames), *(v + 1 for v in without))
    if not with_frames or not without:
        return None, product(khatri_rao(rows), core.flatten(1).mT)
    frames = khatri_rao([rows[v] for v in with_frames])
    clips = khatri_rao([rows[v] for v in without])
    outputs, width = core.shape[0], frames.shape[-1]
    matrix = core.reshape(outputs * width, clips.shape[-1])
    return product(clips, matrix.mT).unflatten(1, (outputs, width)), frames


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Product of every combination of columns, the last factor's varying fastest."""
    return reduce(lambda x, y: (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2), factors)


def _check_core_and_factors(
    views: Sequence[Tensor], core: Tensor, factors: Sequence[Tensor], first: str
) -> None:
    if not isinstance(core, Tensor) or core.ndim != len(views) + 1:
        got = tuple(core.shape) if isinstance(core, Tensor) else type(core).__name__
        raise ValueError(
            f"core: expected {len(views) + 1} sizes ({first}, ..., k_{len(views) + 1}) "
            f"for {len(views)} views, got {got}"
        )
    common.check_list("factors", factors, len(views))
    for v, (view, factor) in enumerate(zip(views, factors, strict=True)):
        letters, expected = f"(d_{v + 1}+1, k_{v + 2})", (view.shape[-1] + 1, core.shape[v + 1])
        common.check_shape(f"factors[{v}]", factor, letters, expected)


def _forward(kernels: str, operands: Sequence, noise: Tensor | None) -> Tensor:
    fused = fused_kernels("tucker", kernels)

    return fused.tucker_forward(*operands, noise)


def _backward(
    kernels: str, grad: Tensor, operands: Sequence, needs: Sequence[bool]
) -> list[Tensor]:
    fused = fused_kernels("tucker", kernels)

    return fused.tucker_backward(grad, *operands, needs)


_fused = register_fusion(
    "tucker_fusion",
    "Tensor[] views, Tensor core, Tensor[] factors, Tensor out",
    eager=tucker_eager,
    forward=_forward,
    backward=_backward,
    outputs=lambda views, core, factors, out: out.shape[0],
)
