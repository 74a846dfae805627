"""PSNR and SSIM of generated against real video.

The definitions are by default those of the authors' evaluation tool ``fae`` (2021): pictures turned
to 8-bit grey as OpenCV does, PSNR of a video from the mean of its frames' squared errors, SSIM as
sewar computes it (uniform 11 x 11 window, only where it fits, population variance) averaged over
frames. Which code made the paper's table is not known.

Traps. PSNR from the mean error is never higher than the mean of the frames' PSNR (Jensen), by as
much as 2 dB if the error varies. A uniform window gives another SSIM than the Gaussian one of
Wang et al. (2004). Colour PSNR is lower than grey: grey averages the channels' errors. Three things
``fae`` does are left out: it resizes videos of different size and cuts the longer one (here both
are errors), and it drops frames whose SSIM is not positive, which flatters bad videos.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from train.metrics.score import MetricError, Score, check_frames, check_pair, mean_score

PEAK = 255.0
WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def grey(frames: Tensor) -> Tensor:
    """Luma (..., H, W) uint8 of RGB frames (..., 3, H, W) uint8, to the bit ``cv2.cvtColor``."""
    red, green, blue = frames.to(torch.int32).unbind(-3)
    return ((9798 * red + 19235 * green + 3735 * blue + (1 << 14)) >> 15).to(torch.uint8)


def _planes(frames: Tensor, colour: bool) -> Tensor:
    """(B, T, C, H, W) float64, C = 1 unless ``colour``."""
    return (frames if colour else grey(frames).unsqueeze(2)).double()


def psnr(
    generated: Tensor,
    real: Tensor,
    *,
    colour: bool = False,
    average: Literal["video", "frame"] = "video",
) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,) float64, of RGB videos (B, T, 3, H, W).

    They are uint8, or with ``colour`` floating-point in [−1, 1] as in training. ``average="video"``
    takes the logarithm of the mean squared error of the video, "frame" the mean of the frames'
    PSNR. Identical pictures give inf. MetricError if the shapes differ.
    """
    if average not in ("video", "frame"):
        raise MetricError(f"average={average!r}: expected 'video' or 'frame'")
    generated, real = check_pair(generated, real, floats=colour)
    peak = PEAK if real.dtype == torch.uint8 else 2.0
    error = (_planes(generated, colour) - _planes(real, colour)).square().mean(dim=(2, 3, 4))
    if average == "video":
        return -10 * torch.log10(error.mean(1) / peak**2)
    return (-10 * torch.log10(error / peak**2)).mean(1)


def ssim(
    generated: Tensor,
    real: Tensor,
    *,
    colour: bool = False,
    window: Literal["uniform", "gaussian"] = "uniform",
) -> Tensor:
    """Structural similarity, (B,) float64, mean over frames of uint8 RGB videos (B, T, 3, H, W).

    ``window="gaussian"`` weighs the 11 x 11 window with sigma 1.5 (Wang et al. 2004); ``colour``
    averages over the three channels. MetricError if the shapes differ or a side is under 11.
    """
    if window not in ("uniform", "gaussian"):
        raise MetricError(f"window={window!r}: expected 'uniform' or 'gaussian'")
    generated, real = check_pair(generated, real)
    height, width = real.shape[-2:]
    if min(height, width) < WINDOW:
        raise MetricError(
            f"frames of {height} x {width}: SSIM needs sides of at least {WINDOW}, its window"
        )
    offset = torch.arange(WINDOW, dtype=torch.float64, device=real.device) - WINDOW // 2
    taps = torch.exp(-0.5 * (offset / SIGMA) ** 2) if window == "gaussian" else offset * 0 + 1
    taps = taps / taps.sum()

    def local_mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))

    scores = []
    for made, true in zip(generated, real, strict=True):  # one clip at a time bounds the memory
        x, y = (_planes(v[None], colour).flatten(0, 2).unsqueeze(1) for v in (made, true))
        mx, my = local_mean(x), local_mean(y)
        vx, vy = local_mean(x * x) - mx * mx, local_mean(y * y) - my * my
        covariance = local_mean(x * y) - mx * my
        c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
        similarity = (2 * mx * my + c1) * (2 * covariance + c2)
        similarity = similarity / ((mx * mx + my * my + c1) * (vx + vy + c2))
        scores.append(similarity.mean())
    return torch.stack(scores)


def quality_scores(generated: Tensor, real: Tensor) -> dict[str, Score]:
    """PSNR and SSIM of one or more videos in the authors' definitions, averaged over the videos."""
    check_frames(real, "real frames")
    ratios = psnr(generated, real)
    same = "identical to the real video"
    return {
        "psnr": mean_score(Score.of(ratio, same) for ratio in ratios),
        "ssim": mean_score(Score.of(value) for value in ssim(generated, real)),
    }
