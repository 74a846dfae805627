"""The design grid of the synthetic portraits, smooth curves on it, and a canvas with soft masks.

Coordinates are design pixels of a 128 x 96 frame, x right and y down, with the eyes at y 43.6 and
the closed mouth at (48.6, 88), about where the aligned faces of GRID have them.
"""

from __future__ import annotations

import cv2
import numpy as np

DESIGN_HEIGHT, DESIGN_WIDTH = 128, 96
CENTRE_X = 48.6
EYE_Y, EYE_SPREAD = 43.6, 17.25
MOUTH_Y = 88.0
CHIN_Y = 115.0
AXIS = np.array([CENTRE_X, 0.0])  # added to (offset, y) points


def spline(points) -> np.ndarray:
    """Closed Catmull-Rom curve through (P, 2) points, 10 steps a span."""
    p = np.asarray(points, np.float64)
    a, b, c, d = (np.roll(p, k, axis=0)[:, None] for k in (1, 0, -1, -2))
    t = (np.arange(10) / 10.0)[None, :, None]
    curve = 0.5 * (
        2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
    )
    return curve.reshape(-1, 2)


def mirrored(half) -> np.ndarray:
    """Closed curve symmetric about the face's axis, from its right half given as (offset, y)."""
    half = np.asarray(half, np.float64)
    left = half[half[:, 0] > 1e-6][::-1] * (-1, 1)
    return spline(np.concatenate([half, left]) + AXIS)


class Easel:
    """A float RGB picture with soft masks, at ``scale`` canvas pixels to the design pixel."""

    def __init__(self, scale: float, colour: np.ndarray | None = None):
        self.scale = scale
        self.height, self.width = round(DESIGN_HEIGHT * scale), round(DESIGN_WIDTH * scale)
        self.rgb = np.zeros((self.height, self.width, 3), np.float32)
        if colour is not None:
            self.rgb += colour
        self.y = ((np.arange(self.height, dtype=np.float32) + 0.5) / scale)[:, None]
        self.x = ((np.arange(self.width, dtype=np.float32) + 0.5) / scale)[None, :]

    def mask(self, curve: np.ndarray, blur: float = 0.0) -> np.ndarray:
        """(H, W) coverage 0..1 of a closed curve, its edge softened by ``blur`` design pixels."""
        image = np.zeros((self.height, self.width), np.uint8)
        points = np.round((curve * self.scale - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(image, [points], 255, cv2.LINE_AA, 4)
        soft = cv2.GaussianBlur(image, (0, 0), blur * self.scale) if blur else image
        return soft.astype(np.float32) / 255.0

    def line(self, points, width: float, blur: float = 0.0) -> np.ndarray:
        """(H, W) coverage of a stroke through (P, 2) points that tapers at both ends."""
        p = np.asarray(points, np.float64)
        t = np.linspace(0, len(p) - 1, 24)
        curve = np.stack([np.interp(t, np.arange(len(p)), p[:, i]) for i in (0, 1)], 1)
        curve[1:-1] = (curve[:-2] + curve[1:-1] * 2 + curve[2:]) / 4
        tangent = np.gradient(curve, axis=0)
        normal = tangent[:, ::-1] * (-1, 1) / np.linalg.norm(tangent, axis=1, keepdims=True)
        half = 0.5 * width * np.sin(np.linspace(0.12, 0.92, 24) * np.pi)[:, None]
        return self.mask(
            np.concatenate([curve + normal * half, (curve - normal * half)[::-1]]), blur
        )

    def blob(self, x: float, y: float, rx: float, ry: float) -> np.ndarray:
        """(H, W) Gaussian of standard deviations rx, ry, peak 1."""
        return np.exp(-0.5 * ((self.x - x) / rx) ** 2) * np.exp(-0.5 * ((self.y - y) / ry) ** 2)

    def paint(self, mask: np.ndarray, colour, opacity: float = 1.0) -> None:
        self.rgb += (mask * opacity)[..., None] * (np.asarray(colour, np.float32) - self.rgb)

    def shade(self, mask: np.ndarray, gain: float) -> None:
        """Multiply by ``gain`` where the mask is 1; shadows keep some red, as skin and hair do."""
        tint = np.array([0.9, 1.0, 1.03], np.float32) if gain < 1 else np.ones(3, np.float32)
        self.rgb *= 1 + mask[..., None] * ((gain - 1) * tint)
