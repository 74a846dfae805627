"""Random changes of a clip's picture, the same for all its frames and its still.

With a dozen people to learn from, a model learns their skin, their light and where their mouths
lie. A slightly turned, scaled and shifted face in another light is another person to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class PictureChange:
    """A similarity transform and a colour curve for each channel."""

    matrix: np.ndarray  # (2, 3), from places in the result to places in the picture, pixels
    curves: np.ndarray  # (3, 256) uint8, the new value of every old one

    @staticmethod
    def draw(rng: np.random.Generator, size: tuple[int, int]) -> PictureChange:
        """Draw one for pictures of ``size`` (H, W).

        Scale within 6 %, turn of about 2 degrees, shift of about 1 % of the frame; brightness
        within 25 %, white balance of about 12 %, gamma of about 20 % and black level of about 2 %.
        """
        height, width = size
        scale, turn = rng.uniform(0.94, 1.06), rng.normal(0, 0.03)
        shift = rng.normal(0, 0.01, 2) * (width, height)
        rotation = scale * np.array(
            [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
        )
        centre = np.array([(width - 1) / 2, (height - 1) / 2])
        matrix = np.column_stack([rotation, centre + shift - rotation @ centre])
        gain = rng.uniform(0.75, 1.25) * np.exp(rng.normal(0, 0.12, 3))
        gamma, level = math.exp(rng.normal(0, 0.2)), rng.normal(0, 0.02)
        values = np.linspace(0, 1, 256) ** gamma * gain[:, None] + level
        return PictureChange(matrix, np.rint(255 * values.clip(0, 1)).astype(np.uint8))

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Change frames (T, 3, H, W) uint8; what lies beyond the border repeats it."""
        height, width = frames.shape[2:]
        changed = np.empty_like(frames)
        for frame, out in zip(frames, changed, strict=True):
            for plane, curve, target in zip(frame, self.curves, out, strict=True):
                moved = cv2.warpAffine(
                    plane,
                    self.matrix,
                    (width, height),
                    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                    borderMode=cv2.BORDER_REPLICATE,
                )
                cv2.LUT(moved, curve, dst=target)
        return changed
