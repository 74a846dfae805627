"""Tensor-train fusion: the interaction tensor as a chain of cores, one for each view."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyfusion.kernels.eager.views import append_one, with_noise
from polyfusion.ops import views as checks


def tensor_train_fusion(
    views: Sequence[Tensor], cores: Sequence[Tensor], *, noise: Tensor | None = None
) -> Tensor:
    """z̃ = G_0 (φ(z_1) ×₂ G_1) ... (φ(z_V) ×₂ G_V). Eager only.

    Args:
        views: V >= 2 tensors, (B, T, d_v), or (B, d_v) if constant over the clip (never repeated).
        cores: G_0 (m, r_1), then G_v (r_v, d_v+1, r_{v+1}) for each view; the last, G_V, is
            (r_V, d_V+1). The last entry of a mode d_v+1 meets the appended 1.
        noise: (B, T, n), or (B, n) if no view has frames; appended to the result, eq. (2).

    Returns:
        (B, T, m + n), or (B, m + n) if no view has frames. Differentiable to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    views, cores, noise = checks.autocast(views, cores, noise)
    leading = checks.check_views(views)
    _check_cores(views, cores)
    checks.check_noise(noise, leading)
    checks.check_alike(views=views, cores=cores, noise=noise)

    rows = [append_one(view) for view in views]
    chain = rows[-1] @ cores[-1].mT  # (B, r) until a view has frames, then (B, T, r)
    for row, core in zip(rows[-2::-1], cores[-2:0:-1], strict=True):
        chain = _extend(chain, row, core)
    return with_noise(chain @ cores[0].mT, noise)


def _extend(chain: Tensor, row: Tensor, core: Tensor) -> Tensor:
    """Σ_{i,s} G[r, i, s] row[i] chain[s], what is constant over a clip first."""
    if chain.ndim == row.ndim:
        pairs = (row.unsqueeze(-1) * chain.unsqueeze(-2)).flatten(-2)
        return pairs @ core.flatten(1).mT
    if chain.ndim == 2:
        per_clip = torch.einsum("ris,bs->bri", core, chain)
        return row @ per_clip.mT
    per_clip = torch.einsum("ris,bi->brs", core, row)
    return chain @ per_clip.mT


def _check_cores(views: Sequence[Tensor], cores: Sequence[Tensor]) -> None:
    count = len(views) + 1
    expected = f"{count} tensors for {len(views)} views"
    checks.check_sequence("cores", cores, expected)
    if len(cores) != count:
        raise ValueError(f"cores: expected {expected}, got {len(cores)}")
    checks.check_matrix("cores[0]", cores[0], "(m, r_1)")
    for v, view in enumerate(views, 1):
        before, last = cores[v - 1].shape[-1], v == len(views)
        core = cores[v]
        after = core.shape[-1] if isinstance(core, Tensor) and core.ndim and not last else 0
        letters = f"(r_{v}, d_{v}+1)" if last else f"(r_{v}, d_{v}+1, r_{v + 1})"
        sizes = (before, view.shape[-1] + 1) if last else (before, view.shape[-1] + 1, after)
        checks.check_shape(f"cores[{v}]", core, letters, sizes)
