"""What a video that does not move cannot score well in: the mouth, measured by itself.

Mouth PSNR is the grey PSNR of a box around the real clip's mouth. LMD, the landmark distance (Chen
et al., ECCV 2018), is the mean distance of the mouth's 20 landmarks from the real ones, here in
percent of the distance of the real eyes instead of in pixels, so that it does not depend on the
size of the frames, and without first centring the mouths, since all frames are aligned. The opening
is the distance of the inner lips (landmarks 62 and 66) over that of the eyes; of a clip's opening,
amplitude is its standard deviation over that of the real clip, and correlation is Pearson's.

Traps. A still has a fair PSNR and LMD; its amplitude, 0, is what gives it away. Landmarks are
noisy: on real clips of GRID the opening's deviation is 0.03 to 0.09 and its noise about 0.01, so
that a mouth that only trembles has an amplitude of about 0.2; read it beside the correlation. On
the built-in faces the correlation with the true opening is 0.6 to 0.99.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from train.data.landmarks import eye_distance, opening
from train.metrics.quality import psnr
from train.metrics.score import MetricError, Score, check_pair

MOUTH = slice(48, 68)
MARGIN = 0.1  # of the eyes' distance, added to every side of the mouth's box
MOVES = 0.005  # standard deviation of the opening below which a real mouth is at rest

Box = tuple[int, int, int, int]  # top, bottom, left, right in pixels, ends excluded


def mouth_box(points: np.ndarray, size: tuple[int, int]) -> Box:
    """The box in frames of (H, W) that holds the mouth of (T, 68, 2) in every frame."""
    margin = MARGIN * eye_distance(points)
    mouth = points[:, MOUTH].reshape(-1, 2)
    left, top = np.floor(mouth.min(0) - margin).astype(int)
    right, bottom = np.ceil(mouth.max(0) + margin).astype(int) + 1
    height, width = size
    box = max(0, top), min(height, bottom), max(0, left), min(width, right)
    if box[0] >= box[1] or box[2] >= box[3]:
        raise MetricError(f"landmarks: the mouth lies outside the frame of {height} x {width}")
    return int(box[0]), int(box[1]), int(box[2]), int(box[3])


def mouth_psnr(made: Tensor, real: Tensor, box: Box) -> Score:
    """Grey PSNR in dB of a box of one video (T, 3, H, W) uint8."""
    made, real = check_pair(made, real)
    top, bottom, left, right = box
    parts = (video[..., top:bottom, left:right] for video in (made, real))
    return Score.of(psnr(*parts)[0], "identical to the real video")


def mouth_scores(made: np.ndarray, real: np.ndarray) -> dict[str, Score]:
    """LMD, amplitude and correlation of the mouth, from landmarks (T, 68, 2) of both videos.

    No amplitude and no correlation where the real mouth is at rest; no correlation where the
    generated one is perfectly still. MetricError for other shapes.
    """
    if made.shape != real.shape or made.ndim != 3 or made.shape[1:] != (68, 2):
        raise MetricError(f"landmarks: expected (T, 68, 2) twice, got {made.shape}, {real.shape}")
    distance = np.linalg.norm(made[:, MOUTH] - real[:, MOUTH], axis=2).mean()
    scores = {"lmd": Score.of(100 * distance / max(eye_distance(real), 1e-9))}
    ours, true = opening(made), opening(real)
    if true.std() < MOVES:
        rest = Score(None, "the real mouth is at rest")
        return scores | {"mouth_amplitude": rest, "mouth_correlation": rest}
    scores["mouth_amplitude"] = Score.of(ours.std() / true.std())
    if ours.std() < 1e-9:
        return scores | {"mouth_correlation": Score(None, "the generated mouth does not move")}
    return scores | {"mouth_correlation": Score.of(np.corrcoef(ours, true)[0, 1])}
