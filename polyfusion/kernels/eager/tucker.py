"""Tucker, whole and without its last factor: clips' views meet the core before frames' views."""

from collections.abc import Sequence

from torch import Tensor

from polyfusion.kernels.eager.product import product
from polyfusion.kernels.eager.views import frames_as_rows, khatri_rao, project, with_noise


@frames_as_rows
def tucker_forward(
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    noise: Tensor | None,
) -> Tensor:
    """Eq. (8), with noise behind it."""
    per_clip, rows = meet_clips(_project(views, factors), _framed(views), core)
    if per_clip is None:
        return product(rows, out.mT, noise=noise)
    (count, width), (outputs, inner) = rows.shape[1:], out.shape
    if count * (width * inner + inner * outputs) <= width * outputs * (inner + count):
        return product(rows @ per_clip.mT, out.mT, noise=noise)
    return with_noise(rows @ (out @ per_clip).mT, noise)  # long clips: fold U₁ in once per clip


@frames_as_rows
def partial_tucker_forward(
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    noise: Tensor | None,
) -> Tensor:
    """Eq. (8) without U₁, with noise behind it."""
    return with_noise(contract(_project(views, factors), _framed(views), core), noise)


def contract(rows: Sequence[Tensor], framed: Sequence[bool], tensor: Tensor) -> Tensor:
    """A tensor (m, k_1, ..., k_V) times a row of every view."""
    per_clip, rows_of_frames = meet_clips(rows, framed, tensor)
    return rows_of_frames if per_clip is None else rows_of_frames @ per_clip.mT


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


def _project(views: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    return [project(z, u) for z, u in zip(views, factors, strict=True)]


def _framed(views: Sequence[Tensor]) -> list[bool]:
    return [view.ndim == 3 for view in views]
