"""CPBD: how much of a picture is sharp, without a reference.

N. D. Narvekar and L. J. Karam, "A no-reference image blur metric based on the cumulative
probability of blur detection (CPBD)", IEEE Trans. Image Processing 20(9), 2011. An independent
implementation, which reproduces the numbers of the ``cpbd`` package (1.0.7), the usual Python port.

Vertical edges are measured across (P. Marziliano et al., 2002), in pixels; an edge of width w in a
block of contrast c looks blurred with probability 1 - exp(-(w / w_jnb(c))^3.6). CPBD is the share
of edges whose blur is seen with a probability of at most 63 %.

Traps. Blocks are 64 x 64 and do not overlap; what remains at the right and at the bottom is
ignored: of a 128 x 96 frame only edges in columns 0 to 63 count (the rest enters through the edge
threshold alone). ``blocks="cover"`` uses the whole frame. Where the package finds no block at all,
in a frame with a side below 64, a block is as long as that side here: 64 x 48 frames are one block.
A block only says whether it holds edges and how strong its contrast is; widths are in pixels, so
that figures of frames of different sizes cannot be compared.
Only vertical edges of nearly horizontal gradient count, so that a picture and its transpose differ.
Compression and noise make edges too: CPBD does not tell detail from artefacts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from train.metrics.quality import grey
from train.metrics.score import MetricError, Score, check_frames

BLOCK = 64  # pixels, or a frame's side where that is shorter
SMALLEST = 8  # pixels of a frame's side that the filters need
EDGE_SHARE = 0.002  # of a block's pixels, above which it is an edge block
LOW_CONTRAST, WIDTH_LOW, WIDTH_HIGH = 50, 5.0, 3.0  # just noticeable widths, pixels
BETA = 3.6
JUST_NOTICEABLE = 63  # percent
MAX_STEPS = 101  # pixels an edge is followed to each side
CANNY_LOW, CANNY_HIGH = 0.1, 0.2  # of a gradient on the scale 0..255: nearly every ridge


def cpbd(
    frames: Tensor, *, blocks: Literal["package", "cover"] = "package", chunk: int = 32
) -> Tensor:
    """CPBD of every frame, (B, T) float64 in 0..1, of uint8 RGB videos (B, T, 3, H, W).

    Args:
        frames: also (T, 3, H, W), which gives (1, T).
        blocks: "package" cuts non-overlapping 64 x 64 blocks and ignores the rest, as the ``cpbd``
            package does. "cover" shifts the last block of each row and column back to the border,
            so that every pixel counts; in frames that are multiples of 64 it is the same. Where
            two blocks overlap, an edge counts in both.
        chunk: frames processed at a time.

    A frame without edges has CPBD 0. MetricError for frames with a side below 8 pixels.
    """
    if blocks not in ("package", "cover"):
        raise MetricError(f"blocks={blocks!r}: expected 'package' or 'cover'")
    frames = check_frames(frames)
    height, width = frames.shape[-2:]
    if min(height, width) < SMALLEST:
        raise MetricError(f"frames of {height} x {width}: CPBD needs sides of {SMALLEST} or more")
    pictures = grey(frames).flatten(0, 1)
    scores = [_cpbd(part.double(), blocks == "cover") for part in pictures.split(chunk)]
    return torch.cat(scores).view(frames.shape[:2])


def cpbd_score(
    frames: Tensor, *, blocks: Literal["package", "cover"] = "package"
) -> dict[str, Score]:
    """Mean CPBD over all frames."""
    return {"cpbd": Score.of(cpbd(frames, blocks=blocks).mean())}


def _cpbd(pictures: Tensor, cover: bool) -> Tensor:
    """(N,) from grey pictures (N, H, W) float64."""
    widths = edge_widths(pictures)
    edges = canny(pictures)
    height, width = (min(BLOCK, side) for side in pictures.shape[1:])
    blurred = torch.zeros(len(pictures), 101, dtype=torch.float64, device=pictures.device)
    for top in _starts(pictures.shape[1], height, cover):
        for left in _starts(pictures.shape[2], width, cover):
            area = (slice(None), slice(top, top + height), slice(left, left + width))
            block, w = pictures[area].flatten(1), widths[area].flatten(1)
            is_edge_block = edges[area].flatten(1).sum(1) > EDGE_SHARE * height * width
            contrast = (block.amax(1) - block.amin(1)).floor()
            noticeable = torch.where(contrast <= LOW_CONTRAST, WIDTH_LOW, WIDTH_HIGH).to(w)
            probability = 1 - torch.exp(-((w / noticeable[:, None]) ** BETA))
            counted = (w > 0) & is_edge_block[:, None]
            bins = (100 * probability).round().long()
            blurred.scatter_add_(1, bins, counted.to(blurred))
    total = blurred.sum(1)
    sharp = blurred[:, : JUST_NOTICEABLE + 1].sum(1)
    return torch.where(total > 0, sharp / total.clamp_min(1), 0.0)


def _starts(side: int, block: int, cover: bool) -> list[int]:
    starts = list(range(0, side - block + 1, block))
    return starts if not cover or side % block == 0 else [*starts, side - block]


def edge_widths(pictures: Tensor) -> Tensor:
    """Widths (N, H, W) in pixels of the vertical edges of grey pictures (N, H, W), 0 elsewhere.

    From an edge pixel the width counts, along its row and to both sides, the first step whatever
    it is and those after it over which the intensity goes on rising or falling, as the gradient at
    the pixel says. Where the gradient has no horizontal part it counts as rising.
    """
    edges = vertical_edges(pictures)
    gy, gx = torch.gradient(pictures, dim=(1, 2))
    sector = torch.round(torch.atan2(gy, gx) * (4 / torch.pi))  # of 45 degrees
    rising, falling = (sector == 0) | (gx == 0), sector.abs() == 4
    step = pictures.diff(dim=2)
    width = torch.where(rising, _run_lengths(step > 0), _run_lengths(step < 0))
    inner = torch.zeros_like(edges)
    inner[:, 1:-1, 1:-1] = True
    return torch.where(edges & (rising | falling) & inner, width, 0).to(pictures)


def _run_lengths(holds: Tensor) -> Tensor:
    """(N, H, W) steps to both sides: the first and those through which ``holds`` (N, H, W - 1)
    lasts.

    Step i leads from pixel i to pixel i + 1. Without meaning for the first and the last pixel.
    """
    last = holds.shape[2]
    position = torch.arange(last + 1, device=holds.device)
    start = F.pad(torch.where(holds, 0, position[1:]), (1, 0)).cummax(2).values
    broken = torch.where(holds, last, position[:-1])
    end = F.pad(broken, (0, 1), value=last).flip(2).cummin(2).values.flip(2)
    left = (position - start).roll(1, 2) + 1
    right = (end - position).roll(-1, 2) + 1
    return left.clamp_max(MAX_STEPS) + right.clamp_max(MAX_STEPS)


def vertical_edges(pictures: Tensor) -> Tensor:
    """Mask (N, H, W) of the ridges of the horizontal gradient's energy above 2 sqrt(its mean)."""
    sobel = pictures.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 8
    padded = F.pad(pictures[:, None], (1, 1, 1, 1), mode="replicate")
    energy = F.conv2d(padded, sobel[None, None])[:, 0].square()
    threshold = 2 * energy.mean(dim=(1, 2), keepdim=True).sqrt()
    energy = torch.where(energy > threshold, energy, 0.0)
    around = F.pad(energy, (1, 1, 1, 1))
    in_row = (energy > around[:, 1:-1, :-2]) & (energy > around[:, 1:-1, 2:])
    in_column = (energy > around[:, :-2, 1:-1]) & (energy > around[:, 2:, 1:-1])
    return in_row | in_column


def canny(pictures: Tensor) -> Tensor:
    """Canny's edges (N, H, W) of grey pictures (N, H, W): Gaussian of sigma 1, thin ridges.

    The outermost pixels hold no edge. Thresholds are those of scikit-image for values in 0..1,
    although values here reach 255, which is how the package calls it: nearly every ridge passes.
    """
    offset = torch.arange(-4, 5, dtype=pictures.dtype, device=pictures.device)
    taps = torch.exp(-0.5 * offset**2)
    taps = taps / taps.sum()

    def smooth(x: Tensor) -> Tensor:
        x = F.conv2d(F.pad(x, (0, 0, 4, 4)), taps.view(1, 1, -1, 1))
        return F.conv2d(F.pad(x, (4, 4, 0, 0)), taps.view(1, 1, 1, -1))

    x = pictures[:, None]
    x = smooth(x) / smooth(torch.ones_like(x[:1]))
    sobel = pictures.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([sobel, sobel.T])[:, None]
    gradient = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernels)
    gx, gy = gradient[:, 0], gradient[:, 1]
    magnitude = torch.hypot(gx, gy)

    # A ridge is no lower than the two points one pixel along the gradient, interpolated between
    # the neighbour on the dominant axis and the diagonal one.
    around = F.pad(magnitude, (1, 1, 1, 1))
    height, width = pictures.shape[1:]

    def shifted(down: int, right: int) -> Tensor:
        return around[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    steep = gy.abs() > gx.abs()
    share = torch.minimum(gx.abs(), gy.abs()) / torch.maximum(gx.abs(), gy.abs()).clamp_min(1e-300)
    same = gx * gy >= 0  # the gradient points along the main diagonal
    ridge = magnitude > 0
    for sign in (1, -1):
        straight = torch.where(steep, shifted(sign, 0), shifted(0, sign))
        along = shifted(sign, sign)
        across = torch.where(steep, shifted(sign, -sign), shifted(-sign, sign))
        diagonal = torch.where(same, along, across)
        ridge &= magnitude >= diagonal * share + straight * (1 - share)
    ridge[:, [0, -1]] = False
    ridge[:, :, [0, -1]] = False

    weak = ridge & (magnitude >= CANNY_LOW)
    strong = weak & (magnitude >= CANNY_HIGH)
    while True:  # weak ridges count if they touch strong ones
        grown = F.max_pool2d(strong.to(pictures)[:, None], 3, 1, 1)[:, 0].bool() & weak
        if torch.equal(grown, strong):
            return strong
        strong = grown
