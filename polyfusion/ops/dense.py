"""The unfactored interaction tensor, eq. (1): exact, large, and contracted per clip first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyfusion.ops import _common as common
from polyfusion.ops.tucker import meet_clips


def dense_fusion(views: Sequence[Tensor], weight: Tensor, *, noise: Tensor | None = None) -> Tensor:
    """z̃ = 𝒲 ×₂ φ(z_1) ... ×_{V+1} φ(z_V), eqs. (1) and (6). Eager only.

    Args:
        views: V >= 2 tensors, (B, T, d_v), or (B, d_v) if constant over the clip (never repeated).
        weight: 𝒲 (m, d_1+1, ..., d_V+1); the last entries meet the appended 1's.
        noise: (B, T, n), or (B, n) if no view has frames; appended to the result, eq. (2).

    Returns:
        (B, T, m + n), or (B, m + n) if no view has frames. Differentiable to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    views, weight, noise = common.autocast(views, weight, noise)
    leading = common.check_views(views)
    outputs = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else 0
    expected = (outputs, *(view.shape[-1] + 1 for view in views))
    letters = f"(m, {', '.join(f'd_{v + 1}+1' for v in range(len(views)))})"
    common.check_shape("weight", weight, letters, expected)
    common.check_noise(noise, leading)
    common.check_alike(views=views, weight=weight, noise=noise)

    rows = [torch.cat([view, view.new_ones((*view.shape[:-1], 1))], -1) for view in views]
    per_clip, rows_of_frames = meet_clips(rows, [view.ndim == 3 for view in views], weight)
    fused = rows_of_frames if per_clip is None else rows_of_frames @ per_clip.mT
    return common.with_noise(fused, noise)
