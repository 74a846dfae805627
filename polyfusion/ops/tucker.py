"""PF-Tucker: z̃ = U₁ (𝒢 ×₂ U₂ᵀφ(z_1) ... ×_{V+1} U_{V+1}ᵀφ(z_V)), eq. (8)."""

from collections.abc import Sequence
from functools import reduce

import torch.nn.functional as F
from torch import Tensor

from polyfusion.ops import _common as common
from polyfusion.ops._dispatch import resolve
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
    if not isinstance(core, Tensor) or core.ndim != len(views) + 1:
        got = tuple(core.shape) if isinstance(core, Tensor) else type(core).__name__
        raise ValueError(
            f"core: expected {len(views) + 1} ranks (k_1, ..., k_{len(views) + 1}) "
            f"for {len(views)} views, got {got}"
        )
    common.check_list("factors", factors, len(views))
    for v, (view, factor) in enumerate(zip(views, factors, strict=True)):
        letters, expected = f"(d_{v + 1}+1, k_{v + 2})", (view.shape[-1] + 1, core.shape[v + 1])
        common.check_shape(f"factors[{v}]", factor, letters, expected)
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
    """:func:`tucker_fusion` in plain PyTorch, without checks.

    Within a group of views (per frame, or constant over the clip) a Khatri-Rao product followed by
    one matrix product takes the fewest multiply-adds. If it would be wider than the core's k_1, the
    widest view is contracted first instead, which moves less memory for the same work.
    """
    projected = [common.project(z, u) for z, u in zip(views, factors, strict=True)]
    framed = [v for v, view in enumerate(views) if view.ndim == 3]
    still = [v for v, view in enumerate(views) if view.ndim == 2]
    core = core.permute(0, *(v + 1 for v in framed), *(v + 1 for v in still))
    clips = khatri_rao([projected[v] for v in still])  # (B, K)
    frames = khatri_rao([projected[v] for v in framed])  # (B, T, K')
    if frames is None:
        return F.linear(F.linear(clips, core.flatten(1)), out)
    core = core.flatten(1, len(framed))  # (k_1, K', ranks of the clips' views)
    if clips is None:
        return F.linear(F.linear(frames, core), out)
    count, width = frames.shape[1:]
    inner, outer = core.shape[0], out.shape[0]
    per_clip = (clips @ core.flatten(2).flatten(0, 1).mT).unflatten(1, (inner, width))
    if count * (width * inner + inner * outer) <= width * outer * (inner + count):
        return F.linear(frames @ per_clip.mT, out)
    return frames @ (out @ per_clip).mT  # long clips: fold U₁ in once per clip


def khatri_rao(factors: Sequence[Tensor]) -> Tensor | None:
    """Product of every combination of columns, the last factor's varying fastest."""
    if not factors:
        return None
    return reduce(lambda x, y: (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2), factors)


def _forward(kernels: str, operands: Sequence, noise: Tensor | None) -> Tensor:
    from polyfusion.kernels.tucker import tucker_forward

    return tucker_forward(*operands, noise)


def _backward(
    kernels: str, grad: Tensor, operands: Sequence, needs: Sequence[bool]
) -> list[Tensor]:
    from polyfusion.kernels.tucker import tucker_backward

    return tucker_backward(grad, *operands, needs)


_fused = register_fusion(
    "tucker_fusion",
    "Tensor[] views, Tensor core, Tensor[] factors, Tensor out",
    eager=tucker_eager,
    forward=_forward,
    backward=_backward,
    outputs=lambda views, core, factors, out: out.shape[0],
)
