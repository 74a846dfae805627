"""Blinks per second and blink duration, from the openness of the eyes frame by frame.

The detector of DinoMan/blink-detector, the authors' own: eye aspect ratio (EAR; Soukupova and
Cech, 2016) of the 68-point landmarks, closings where it falls fastest, a blink from the EAR peak
before to the one after. Any source of landmarks will do; for the built-in set ``synthetic_ear``
reads the EAR off the pictures.

Traps. The threshold is a fall per frame, so it depends on the frame rate (it is meant for 25/s),
and slow blinks are missed. The start and the end are *peaks*: while the eye is open only the noise
of the landmarks makes peaks, which lengthens blinks by about two frames at 25/s; an EAR that is
exactly constant has none, and the blink then reaches to the start or the end of the clip.
``edges="level"`` measures from and to 90 % of the openness instead. Earlier versions of the
authors' tool have the threshold 0.0425.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from scipy.signal import find_peaks
from torch import Tensor
from torch.nn import functional as F

from train.metrics.score import MetricError, Score, check_frames

THRESHOLD = 0.072  # fall of the EAR from one frame to the next
DISTANCE = 4  # frames between closings
LEVEL = 0.9


def find_blinks(
    ear: np.ndarray,
    *,
    threshold: float = THRESHOLD,
    edges: Literal["peak", "level"] = "peak",
) -> np.ndarray:
    """(K, 2) int first and last frame of the blinks in an EAR signal (T,), at 25 frames/s.

    A closing is a frame after which the EAR falls by at least ``threshold``, more than around it.
    With edges="peak" (the authors) a blink starts at the last EAR peak before the closing and ends
    at the first one after it that are in the upper half of the clip's range; a closing without such
    an end before the next is none, one without any later peak ends with the clip. With "level" it
    starts and ends where the EAR is 90 % of the way from the blink's lowest to the clip's median.
    """
    ear = np.asarray(ear, np.float64)
    if ear.ndim != 1 or not np.isfinite(ear).all():
        raise MetricError(f"EAR: expected finite (T,), got shape {ear.shape}")
    if edges not in ("peak", "level"):
        raise MetricError(f"edges={edges!r}: expected 'peak' or 'level'")
    if len(ear) < 2:
        return np.zeros((0, 2), np.int64)
    closings = find_peaks(ear[:-1] - ear[1:], height=threshold, distance=DISTANCE)[0]
    upper_half = (ear.min() + ear.max()) / 2
    blinks = []
    for closing, limit in pairwise([*closings, len(ear)]):
        before, after = ear[: closing + 1], ear[closing:limit]
        if edges == "peak":
            starts = find_peaks(before, height=upper_half)[0]
            ends = find_peaks(ear[closing : limit + 1], height=upper_half)[0]  # limit is no peak
            if ear[closing - 1] <= ear[closing]:
                starts = np.append(starts, closing)
        else:
            lowest = int(after.argmin())
            level = after[lowest] + LEVEL * (np.median(ear) - after[lowest])
            starts = np.flatnonzero(before >= level)
            ends = lowest + np.flatnonzero(after[lowest:] >= level)
        if len(ends) or limit == len(ear):
            start = starts[-1] if len(starts) else 0
            blinks.append((start, closing + ends[0] if len(ends) else len(ear) - 1))
    return np.array(blinks, np.int64).reshape(-1, 2)


def blink_scores(
    ears: Sequence[np.ndarray],
    *,
    fps: float,
    threshold: float = THRESHOLD,
    edges: Literal["peak", "level"] = "peak",
) -> dict[str, Score]:
    """Blinks per second and mean duration in s over clips, each an EAR signal (T,).

    All blinks over all seconds, and the mean over blinks; both 0 if nobody blinks, as in the
    paper's table. No value for clips of less than two frames or at another rate than 25/s.
    """
    if not fps > 0:
        raise MetricError(f"fps {fps}: expected a positive rate")
    names = ("blinks_per_s", "blink_duration")
    frames = sum(map(len, ears))
    if max(map(len, ears), default=0) < 2:
        return {name: Score(None, "clips of less than two frames") for name in names}
    if abs(fps - 25) > 0.01:
        return {name: Score(None, f"{fps:g} fps, the threshold is for 25") for name in names}
    found = np.concatenate([find_blinks(ear, threshold=threshold, edges=edges) for ear in ears])
    duration = float(np.diff(found).mean()) / fps if len(found) else 0.0
    return dict(zip(names, (Score(len(found) * fps / frames), Score(duration)), strict=True))


# The built-in set: in pixels of its 128 x 96 design, what an eye and its surroundings cover.
_DESIGN = (128, 96)
_EYES_X, _EYE_ROWS, _EYE_HALF = (31.35, 65.85), (36.0, 48.0), 9.0
_CHEEK_ROWS, _CHEEK_HALF = (51.0, 55.0), 6.0
_LID = (0.90, 0.86, 0.84)  # colour of the lid relative to the skin
_SHUT = 0.35  # contrast of a closed eye (lashes, crease, corners) relative to an open one
_TEXTURE = 5.0  # grey levels; eyes have at least 16, even at 32 x 24 pixels
_OPEN_EAR = 0.42  # height over width of an open eye as drawn


def synthetic_ear(frames: Tensor) -> list[np.ndarray | Score]:
    """EAR signals (T,) of clips of the built-in set, or of videos generated from its stills.

    Args:
        frames: (B, T, 3, H, W) or (T, 3, H, W) uint8 RGB.

    How far the pixels around the eyes are from the colour of the lids, which is known from the
    cheek below, relative to the clip's median frame; that does not depend on where in the region
    iris and lashes are, as head and gaze move. Where the region is even, a Score without value
    stands in place of the signal. Of real faces it knows nothing.
    """
    signals: list[np.ndarray | Score] = []
    for clip in check_frames(frames):
        pictures = clip.float()
        if pictures.shape[-2:] != _DESIGN:
            pictures = F.interpolate(pictures, _DESIGN, mode="bilinear", antialias=True)
        contrast = torch.stack([_contrast(pictures, x) for x in _EYES_X]).mean(0)
        texture = _region(pictures, _EYES_X[0], _EYE_ROWS, _EYE_HALF).mean(1).std(1).median()
        if texture < _TEXTURE:
            signals.append(Score(None, "no eyes in the pictures"))
        else:
            openness = (contrast / contrast.median() - _SHUT) / (1 - _SHUT)
            signals.append((_OPEN_EAR * openness).double().cpu().numpy())
    return signals


def _contrast(pictures: Tensor, x: float) -> Tensor:
    """(T,) mean distance in RGB between the eye at column ``x`` and its lid, (T, 3, 128, 96)."""
    cheek = _region(pictures, x, _CHEEK_ROWS, _CHEEK_HALF)
    skin = cheek.transpose(0, 1).flatten(1).median(1).values
    lid = skin * skin.new_tensor(_LID)
    eye = _region(pictures, x, _EYE_ROWS, _EYE_HALF)
    return (eye - lid[:, None]).norm(dim=1).mean(1)


def _region(pictures: Tensor, x: float, rows: tuple[float, float], half: float) -> Tensor:
    """(T, 3, P) pixels of some rows around column ``x``."""
    columns = slice(round(x - half), round(x + half))
    return pictures[:, :, round(rows[0]) : round(rows[1]), columns].flatten(2)
