"""The baseline of the paper: no fusion, z = [z_1, ..., z_V, noise]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyfusion.kernels.eager.views import align
from polyfusion.ops import views as checks


def concat_fusion(views: Sequence[Tensor], *, noise: Tensor | None = None) -> Tensor:
    """Concatenate the views, those constant over a clip expanded over its frames.

    Args:
        views: V >= 2 tensors, (B, T, d_v), or (B, d_v) if constant over the clip.
        noise: (B, T, n), or (B, n) if no view has frames.

    Returns:
        (B, T, Σ d_v + n), or (B, Σ d_v + n) if no view has frames.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    views, noise = checks.autocast(views, noise)
    leading = checks.check_views(views)
    checks.check_noise(noise, leading)
    checks.check_alike(views=views, noise=noise)
    views, _ = align(views)
    parts = [view.expand(*leading, -1) for view in views]
    return torch.cat(parts if noise is None else [*parts, noise], dim=-1)
