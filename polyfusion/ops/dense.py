"""The unfactored interaction tensor, eq. (1): exact, large, and contracted per clip first."""

from collections.abc import Sequence

from torch import Tensor

from polyfusion.kernels.eager.tucker import contract
from polyfusion.kernels.eager.views import append_one, with_noise
from polyfusion.ops import views as checks


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
    views, weight, noise = checks.autocast(views, weight, noise)
    leading = checks.check_views(views)
    outputs = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else 0
    expected = (outputs, *(view.shape[-1] + 1 for view in views))
    letters = f"(m, {', '.join(f'd_{v + 1}+1' for v in range(len(views)))})"
    checks.check_shape("weight", weight, letters, expected)
    checks.check_noise(noise, leading)
    checks.check_alike(views=views, weight=weight, noise=noise)
    rows = [append_one(view) for view in views]
    return with_noise(contract(rows, [view.ndim == 3 for view in views], weight), noise)
