"""Hair of the synthetic speakers: a function per style gives the hair behind and in front."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from train.data.synthetic.easel import AXIS, CENTRE_X, Easel, mirrored, spline
from train.data.synthetic.identity import Identity

COVERS_EARS = ("bob", "long", "bangs")


@dataclass(frozen=True)
class _Head:
    """What a style is cut to, in design pixels."""

    easel: Easel
    face: float  # half width of the face
    cap: float  # half width of the hair
    line: float  # y of the hairline
    right: bool  # side of the parting
    texture: int

    @property
    def bare(self) -> np.ndarray:
        return np.zeros((self.easel.height, self.easel.width), np.float32)

    def front(self, inner, crown=None) -> np.ndarray:
        """Mask between a crown and the hairline ``inner``, right halves given as (offset, y)."""
        w, face = self.cap, self.face
        crown = crown or [(0, 2), (0.6 * w, 5), (0.95 * w, 19), (w, 36)]
        temples = [(face * 0.98, 44), (face * 0.93, 35)]
        return self.easel.mask(mirrored([*crown, *temples, *inner]), 0.3)

    def both_sides(self, half) -> np.ndarray:
        """Mask of a closed curve given as (offset, y) together with its mirror image."""
        half = np.asarray(half, np.float64)
        sides = (half * (side, 1) + AXIS for side in (-1, 1))
        left, right = (self.easel.mask(spline(curve), 0.4) for curve in sides)
        return np.maximum(left, right)

    def swept(self) -> np.ndarray:
        """Mask of a side parting with the fringe swept across the forehead."""
        w, face, line = self.cap, self.face, self.line
        crown = [(-w - 0.2, 45), (-w, 30), (-0.9 * w, 15), (-0.5 * w, 3), (0, 0.5)]
        crown += [(0.5 * w, 3), (0.9 * w, 15), (w, 30), (w + 0.2, 45)]
        fringe = [(0.95 * face, 42), (0.86 * face, line + 7), (0.55 * face, line - 3)]
        fringe += [(0.3 * face, line - 9), (0.02 * face, line - 3), (-0.4 * face, line + 2)]
        fringe += [(-0.8 * face, line + 9), (-0.95 * face, 44)]
        curve = np.array(crown + fringe) * (1 if self.right else -1, 1) + AXIS
        return self.easel.mask(spline(curve), 0.3)

    def curls(self, angles: np.ndarray, along, radii: tuple[float, float], rng) -> np.ndarray:
        """Overlapping rounds at along(angle) -> (x, y)."""
        mask, circle = self.bare, np.arange(8) * np.pi / 4
        for angle in angles:
            radius = rng.uniform(*radii)
            ring = np.stack([np.cos(circle), np.sin(circle)], 1) * radius
            mask = np.maximum(mask, self.easel.mask(spline(ring + along(angle)), 0.3))
        return mask


def _bald(head: _Head):
    return head.bare, head.bare


def _crop(head: _Head):
    w, face, line = head.cap, head.face, head.line
    crown = [(0, 4.5), (0.6 * w, 7), (0.93 * w, 21), (w - 1.4, 38)]
    hairline = [(0.84 * face, line + 8), (0.62 * face, line - 2), (0.3 * face, line + 1), (0, line)]
    return head.bare, head.front(hairline, crown)


def _quiff(head: _Head):
    w, face, line = head.cap, head.face, head.line
    crest = [(-0.85 * w, 30.0), (-0.9 * w, 14), (-0.4 * w, -3), (0.3 * w, -4), (0.95 * w, 10)]
    crest += [(0.93 * w, 28), (0.6 * face, line - 2), (0, line - 5), (-0.6 * face, line - 1)]
    sides = head.front([(0.87 * face, line + 6), (0.62 * face, line - 2), (0, line - 8)])
    raised = head.easel.mask(spline(np.array(crest) + AXIS), 0.3)
    return head.bare, np.maximum(sides, raised)


def _side(head: _Head):
    return head.bare, head.swept()


def _falling(head: _Head, length: float, flare: float):
    w, face = head.cap, head.face
    back = [(0, 2), (0.7 * w, 6), (w + 1, 30), (w + flare, 66), (w + flare + 1, length - 8)]
    back += [(0.8 * w, length), (0, length - 2)]
    lock = [(0.93 * w, 26), (w + 1.5, 50), (w + flare, length - 16), (w + flare - 2, length - 6)]
    lock += [(w - 1, length - 4), (0.93 * face, length - 22), (0.99 * face, 62), (0.9 * face, 38)]
    front = np.maximum(head.swept(), head.both_sides(lock))
    return head.easel.mask(mirrored(back), 0.4), front


def _bob(head: _Head):
    return _falling(head, 96.0, 3.5)


def _long(head: _Head):
    return _falling(head, 140.0, 6.0)


def _bangs(head: _Head):
    w, face = head.cap, head.face
    back = [(0, 1), (0.7 * w, 5), (w + 1, 30), (w + 3.5, 66), (w + 2.5, 92), (0.7 * w, 97), (0, 96)]
    fringe = head.front([(0.88 * face, 36.5), (0.5 * face, 34.0), (0, 33.0)])
    return head.easel.mask(mirrored(back), 0.4), fringe


def _tails(head: _Head):
    w, face, line = head.cap, head.face, head.line
    tail = [(w - 5, 58), (w + 5, 56), (w + 11, 70), (w + 8, 90), (w + 1, 100), (w - 5, 84)]
    front = head.front([(0.86 * face, line + 8), (0.45 * face, line - 4), (0, line - 8)])
    return head.both_sides(tail), front


def _curls(head: _Head):
    w, face, line = head.cap, head.face, head.line
    rng = np.random.default_rng(head.texture)

    def cap(a):
        return CENTRE_X + (w - 1.5) * np.cos(a), 37 - 29 * np.sin(a)

    def fringe(a):
        return CENTRE_X + (face - 7) * np.cos(a), 33 - (40 - line) * np.sin(a)

    back = head.curls(np.linspace(-0.18, np.pi + 0.18, 22), cap, (7.5, 10.0), rng)
    front = head.curls(np.linspace(0.35, np.pi - 0.35, 12), fringe, (5.0, 7.0), rng)
    crown = head.front([(0.86 * face, line + 4), (0.5 * face, line - 6), (0, line - 8)])
    return back, np.maximum(front, crown)


_CUTS = {
    "bald": _bald,
    "crop": _crop,
    "quiff": _quiff,
    "side": _side,
    "bob": _bob,
    "long": _long,
    "bangs": _bangs,
    "tails": _tails,
    "curls": _curls,
}


def hair_masks(who: Identity, easel: Easel) -> tuple[np.ndarray, np.ndarray]:
    """Masks (H, W) of the hair behind the head and of the hair in front of it."""
    face = who.half_width
    line = 18.0 + 7.0 * who.hairline
    return _CUTS[who.style](_Head(easel, face, face + 3.0, line, who.texture % 2 == 1, who.texture))


def _strands(who: Identity, easel: Easel) -> np.ndarray:
    """(H, W) brightness of hair: about 1, streaked downwards."""
    rng = np.random.default_rng(who.texture + 2)
    noise = rng.standard_normal((easel.height, easel.width)).astype(np.float32)
    streaks = cv2.GaussianBlur(noise, (0, 0), sigmaX=0.45 * easel.scale, sigmaY=4.0 * easel.scale)
    return 1.0 + 0.07 * streaks / streaks.std()


def paint_back_hair(easel: Easel, who: Identity) -> None:
    """Paint the hair behind the head, in the shade."""
    back, _ = hair_masks(who, easel)
    fall = 0.86 - 0.2 * np.clip(easel.y / 128, 0, 1)
    easel.paint(back, who.hair * (_strands(who, easel) * fall)[..., None])


def paint_hair(easel: Easel, who: Identity, front: np.ndarray, skin: np.ndarray) -> None:
    """Paint the hair in front, with strands and a sheen, and its shadow on the skin (masks)."""
    shadow = cv2.GaussianBlur(
        np.roll(front, round(2.5 * easel.scale), axis=0), (0, 0), 1.8 * easel.scale
    )
    easel.shade(shadow * (1 - front), 0.76)
    light = _strands(who, easel)
    sheen = easel.blob(CENTRE_X - 9, 11, 20, 5) + 0.5 * easel.blob(CENTRE_X - 38, 62, 3, 18)
    light += (
        0.32 * sheen
        - 0.28 * np.clip((easel.x - CENTRE_X) / 40, 0, 1)
        - 0.1 * np.clip(easel.y / 128, 0, 1)
    )
    # Beyond the skin the paint runs over the edge, lest skin shine through where it is thin.
    mask = np.maximum(front, cv2.dilate(front, np.ones((5, 5), np.uint8)) * (1 - skin))
    easel.rgb += mask[..., None] * (who.hair * light[..., None] + 14 * sheen[..., None] - easel.rgb)
