"""The still part of a synthetic speaker: backdrop and shoulders, and the head with its hair.

Everything is painted with soft masks on a float canvas of any scale, once per clip.
"""

from __future__ import annotations

import cv2
import numpy as np

from train.data.synthetic.easel import (
    CENTRE_X,
    CHIN_Y,
    DESIGN_HEIGHT,
    EYE_SPREAD,
    EYE_Y,
    Easel,
    mirrored,
    spline,
)
from train.data.synthetic.hair import COVERS_EARS, hair_masks, paint_back_hair, paint_hair
from train.data.synthetic.identity import Identity


def _outline(who: Identity) -> np.ndarray:
    width = who.half_width
    jaw = width * (0.72 + 0.17 * who.jaw)
    chin = 9.0 + 7.5 * who.jaw
    skull = [(0, 9), (0.55 * width, 12.5), (0.9 * width, 26), (width, 46), (0.985 * width, 64)]
    lower = [(0.5 * (width + jaw), 80), (jaw * 0.93, 95), (chin + 4, 109), (chin * 0.55, 114.2)]
    return mirrored([*skull, *lower, (0, CHIN_Y)])


def eye_centres(who: Identity) -> tuple[tuple[float, float], tuple[float, float]]:
    """(x, y) of the left and the right eye in the picture."""
    spread = EYE_SPREAD * (0.96 + 0.08 * who.eye_spacing)
    return (CENTRE_X - spread, EYE_Y + 0.4), (CENTRE_X + spread, EYE_Y - 0.4)


def paint_backdrop(who: Identity, scale: float) -> np.ndarray:
    """(H, W, 3) float32 picture of what stays put: backdrop, hair at the back, neck, clothes."""
    easel = Easel(scale, who.backdrop)
    easel.rgb += (30 * easel.blob(26, 22, 46, 46) - 26 * (easel.y / DESIGN_HEIGHT) ** 2)[..., None]
    paint_back_hair(easel, who)
    neck = 17.0 + 5.0 * (who.kind == "man") + 2.0 * who.face_width
    throat = [(0, 84), (neck, 86), (neck, 106), (neck + 3, 118), (neck + 9, 134), (0, 134)]
    neck_mask = easel.mask(mirrored(throat))
    easel.paint(neck_mask, 0.93 * who.skin)
    easel.shade(neck_mask * easel.blob(CENTRE_X, 108, 26, 9), 0.62)
    torso = easel.mask(
        mirrored(
            [(0, 127), (8, 125), (neck + 1, 117), (neck + 12, 116), (50, 123), (56, 136), (0, 140)]
        ),
        0.4,
    )
    easel.paint(torso, who.cloth)
    easel.shade(torso * np.clip((easel.x - 46) / 60, 0, 1), 0.72)
    collar = [(-1.0, 116), (-0.5, 124), (0.0, 127), (0.5, 124), (1.0, 116)]
    stroke = easel.line([(CENTRE_X + dx * (neck + 3), y) for dx, y in collar], 2.4)
    easel.paint(stroke, 0.78 * who.cloth)
    return easel.rgb


def _paint_skin(easel: Easel, who: Identity, face: np.ndarray, width: float) -> None:
    """Light from the upper left, soft edges, blush, freckles."""
    easel.rgb += who.skin
    u = (easel.x - CENTRE_X) / width
    easel.shade(np.clip(u - 0.1, 0, 1) ** 1.5 + 0 * easel.y, 0.8)
    inner = cv2.GaussianBlur(face, (0, 0), 5.0 * easel.scale)
    easel.shade(np.clip(1 - inner, 0, 1), 0.72)
    blush = np.clip(who.skin * (1.04, 0.8, 0.78), 0, 255)
    for side in (-1, 1):
        x = CENTRE_X + side * 0.53 * width
        easel.paint(easel.blob(x, 67, 6.5, 5), blush, 0.15 + 0.4 * who.cheeks)
    light = np.minimum(who.skin * 1.13 + 10, 255)
    easel.paint(easel.blob(CENTRE_X - 7, 29, 13, 6), light, 0.6)
    easel.paint(easel.blob(CENTRE_X - 0.55 * width, 61, 6.5, 3.5), light, 0.45)
    easel.paint(easel.blob(CENTRE_X - 1, 107, 6, 3.2), light, 0.5)
    rng = np.random.default_rng(who.texture)
    for _ in range(int(34 * who.freckles)):
        side, r = rng.choice((-1, 1)), rng.uniform(0.35, 0.6)
        x, y = CENTRE_X + side * rng.uniform(3, 24), rng.normal(64, 4.5)
        easel.paint(easel.blob(x, y, r, r), who.skin * (0.72, 0.6, 0.52), 0.7)


def _paint_nose(easel: Easel, who: Identity) -> None:
    half, tip = 5.4 + 3.2 * who.nose_width, 66.5 + 6.5 * who.nose_length
    x = CENTRE_X
    light = np.minimum(who.skin * 1.15 + 12, 255)
    ridge = easel.line(
        [(x + 3.2, 45), (x + 2.8, 54), (x + half * 0.75, tip - 4), (x + half * 0.8, tip)], 3.2, 1.1
    )
    easel.shade(ridge, 0.8)
    easel.paint(easel.line([(x - 0.6, 44), (x - 0.8, tip - 6)], 2.8, 1.2), light, 0.55)
    easel.shade(easel.blob(x + 0.5, tip + 3.4, half * 0.75, 1.7), 0.78)
    easel.paint(easel.blob(x - 1.0, tip - 2.2, 2.4, 2.0), light, 0.8)
    for side in (-1, 1):
        wing = [
            (x + side * half * 0.8, tip - 3.5),
            (x + side * half * 1.05, tip - 0.4),
            (x + side * half * 0.75, tip + 1.7),
        ]
        easel.shade(easel.line(wing, 1.5, 0.35), 0.66)
        easel.shade(easel.blob(x + side * half * 0.48, tip + 1.4, 1.5, 0.8), 0.42)
        easel.shade(
            easel.line([(x + side * (half + 1), tip + 2), (x + side * (half + 7), 83)], 1.5, 1.2),
            0.95,
        )
    easel.shade(easel.blob(x, tip + 8, 1.3, 3.4), 0.93)


def _paint_brows(easel: Easel, who: Identity) -> None:
    colour = 0.75 * who.hair + 0.12 * who.skin
    weight, slant = 1.9 + 2.4 * who.brow_weight, 2.6 * (who.brow_angle - 0.4)
    for side, (x, y) in zip((-1, 1), eye_centres(who), strict=True):
        easel.shade(easel.blob(x - side * 6, y - 1, 4.5, 4.5), 0.86)
        easel.shade(easel.blob(x, y - 4, 8, 3), 0.9)
        easel.shade(easel.blob(x, y + 7.5, 6, 1.2), 0.95)
        brow = [
            (x - side * 9.5, y - 9.3 + slant),
            (x - side * 3, y - 11.2),
            (x + side * 4, y - 12 - slant),
            (x + side * 10, y - 8.6 - 0.4 * slant),
        ]
        easel.paint(easel.line(brow, weight, 0.3), colour, 0.9)
        if who.glasses:
            angle = np.arange(16) * np.pi / 8
            rim = np.stack(
                [
                    np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** 0.8,
                    np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** 0.8,
                ],
                1,
            )
            outer, inner = (
                easel.mask(spline(rim * (rx, rx * 0.83) + (x, y + 1.5))) for rx in (13.6, 12.2)
            )
            easel.paint(np.clip(outer - inner, 0, 1), (44, 38, 42))
            easel.paint(
                inner * np.clip((x - easel.x - (easel.y - y)) / 30 + 0.2, 0, 1),
                (255, 255, 255),
                0.16,
            )
    if who.glasses:
        easel.paint(
            easel.line([(CENTRE_X - 5, 43.6), (CENTRE_X, 42.4), (CENTRE_X + 5, 43.6)], 1.8),
            (44, 38, 42),
        )


def _paint_beard(easel: Easel, who: Identity, face: np.ndarray, width: float) -> None:
    colour = 0.85 * who.hair
    grain = np.random.default_rng(who.texture + 1).uniform(0.75, 1.0, face.shape).astype(np.float32)
    if who.beard in ("stubble", "full"):
        hole = [
            (0, 78),
            (9, 79),
            (0.62 * width, 76),
            (0.93 * width, 60),
            (1.2 * width, 40),
            (0.9 * width, 20),
            (0, 10),
        ]
        region = face * (1 - easel.mask(mirrored(hole), 1.6))
        easel.paint(region * grain, colour, 0.9 if who.beard == "full" else 0.3)
    if who.beard in ("moustache", "full"):
        shape = mirrored(
            [(0, 78.5), (6, 78.5), (13, 83), (16.5, 89), (12, 86.5), (5, 84), (0, 84.2)]
        )
        easel.paint(easel.mask(shape, 0.5) * grain, colour, 0.9)


def paint_head(who: Identity, scale: float) -> np.ndarray:
    """(H, W, 4) float32 premultiplied RGBA of the head; lips and eyeballs are drawn per frame."""
    easel = Easel(scale)
    width = who.half_width
    face = easel.mask(_outline(who))
    _, front = hair_masks(who, easel)
    ears = np.zeros_like(face)
    if who.style not in COVERS_EARS:
        for side in (-1, 1):
            ear = [(-1, 46), (3.0, 43), (5.4, 47), (4.2, 57), (1.4, 65), (-1, 63)]
            curve = spline([(CENTRE_X + side * (width - 0.6 + x), y) for x, y in ear])
            ears = np.maximum(ears, easel.mask(curve, 0.2))
    _paint_skin(easel, who, face, width)
    easel.shade(ears * (1 - face), 0.95)
    for side in (-1, 1):
        easel.shade(easel.blob(CENTRE_X + side * (width + 2.0), 54, 1.2, 5), 0.8)
    _paint_nose(easel, who)
    _paint_beard(easel, who, face, width)
    paint_hair(easel, who, front, np.maximum(face, ears))
    _paint_brows(easel, who)
    alpha = np.maximum(np.maximum(face, front), ears)[..., None]
    return np.concatenate([np.clip(easel.rgb, 0, 255) * alpha, 255 * alpha], axis=2)
