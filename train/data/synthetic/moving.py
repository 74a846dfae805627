"""The moving parts of a synthetic speaker: jaw, lips, teeth, tongue, eyelids and gaze.

Lips and lids are curves y(x), so every pixel's coverage is an analytic function of its distance to
them; all frames of a clip are drawn at once as arrays over (T, rows, columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from train.data.synthetic.easel import CENTRE_X, MOUTH_Y
from train.data.synthetic.face import eye_centres
from train.data.synthetic.identity import Identity

MOUTH_BOX = (24.0, 73.0, 74.0, 118.0)  # left, right, top, bottom in design pixels
JAW_TOP = 76.0  # rows below follow the jaw
CHIN_SHARE = 0.42  # the chin sinks by this share of the opening
EDGE = 1.25  # coverage ramp of the lips, per design pixel: a little softer than one pixel


@dataclass(frozen=True)
class Mouth:
    """Lip gesture of a clip, (T,) float32 each, in design pixels but for ``rounding`` in 0..1."""

    openness: np.ndarray  # inner height at the widest opening
    width: np.ndarray  # corner to corner
    rounding: np.ndarray


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _between(y: np.ndarray, upper: np.ndarray, lower: np.ndarray, edge: float) -> np.ndarray:
    """Coverage of the band upper(x) < y < lower(x), its edges ramps of slope ``edge``."""
    above = np.clip((y - upper) * edge + 0.5, 0.0, 1.0)
    return above * np.clip((lower - y) * edge + 0.5, 0.0, 1.0)


def lower_jaw(head: np.ndarray, openness: np.ndarray, who: Identity, scale: float) -> np.ndarray:
    """(T, rows, W, 4) uint8: the head below JAW_TOP in every frame, the chin sinking as it opens.

    head: (H, W, 4) uint8 at ``scale`` canvas pixels to the design pixel; openness: (T,).
    """
    top = round(JAW_TOP * scale)
    rows, columns = head.shape[0] - top, head.shape[1]
    y = (np.arange(rows, dtype=np.float32)[:, None] + top + 0.5) / scale
    x = (np.arange(columns, dtype=np.float32)[None, :] + 0.5) / scale
    width = who.half_width
    aside = (np.abs(x - CENTRE_X) / width - 0.55) / 0.45
    follow = (_smoothstep((y - JAW_TOP - 1) / 32) * (1 - _smoothstep(aside))).astype(np.float32)
    map_x = np.broadcast_to(np.arange(columns, dtype=np.float32), follow.shape).copy()
    map_y = np.broadcast_to(np.arange(top, top + rows, dtype=np.float32)[:, None], follow.shape)
    out = np.empty((len(openness), rows, columns, 4), np.uint8)
    for frame, opening in zip(out, openness, strict=True):
        sunk = map_y - (CHIN_SHARE * scale * opening) * follow
        cv2.remap(head, map_x, sunk, cv2.INTER_LINEAR, dst=frame, borderMode=cv2.BORDER_REPLICATE)
    return out


def draw_mouth(lower: np.ndarray, mouth: Mouth, who: Identity, scale: float) -> None:
    """Draw lips, teeth and tongue into ``lower`` (T, rows, W, 4) uint8, made by ``lower_jaw``."""
    left, right, top, bottom = (round(edge * scale) for edge in MOUTH_BOX)
    offset = round(JAW_TOP * scale)
    y = ((np.arange(top, bottom, dtype=np.float32) + 0.5) / scale)[None, :, None]
    x = ((np.arange(left, right, dtype=np.float32) + 0.5) / scale)[None, None, :]
    view = lower[:, max(top - offset, 0) : bottom - offset, left:right, :3]
    y = y[:, y.shape[1] - view.shape[1] :]

    _, _, _, asymmetry, upper_share, teeth, tongue, protrude = who.articulation.tolist()
    openness, half = mouth.openness[:, None, None], 0.5 * mouth.width[:, None, None]
    xi = (x - CENTRE_X) / half  # (T, 1, X); -1 and 1 at the corners
    inside = np.clip(1.0 - xi**2, 0.0, 1.0)
    skewed = np.clip(1.0 - (xi - 0.38 * asymmetry * inside) ** 2, 0.0, 1.0)
    gap = openness * skewed**0.6
    line = MOUTH_Y + 0.9 * asymmetry * xi - (4.4 * who.corner_lift - 0.8) * (xi**2 - 0.4)
    line = line + 0.5 * np.exp(-((xi / 0.22) ** 2))
    upper_in, lower_in = line - upper_share * gap, line + (1.0 - upper_share) * gap
    pout = (1.0 - 0.014 * openness) * (1.0 + (0.1 + 0.5 * protrude) * mouth.rounding[:, None, None])
    upper_lip = pout * (1.9 + 3.4 * who.lip_fullness) * (0.65 + 0.6 * who.lip_balance)
    lower_lip = pout * (2.4 + 4.4 * who.lip_fullness) * (1.25 - 0.5 * who.lip_balance)
    bow = 1.0 - 0.25 * np.exp(-((xi / 0.15) ** 2))
    upper_out = upper_in - upper_lip * bow * inside**0.8
    lower_out = lower_in + lower_lip * inside**0.6
    present = np.clip((1.0 - np.abs(xi)) * half * EDGE + 0.5, 0.0, 1.0)

    lips = _between(y, upper_out, lower_out, EDGE) * present
    cavity = _between(y, upper_in, lower_in, EDGE) * np.clip(gap * EDGE, 0.0, 1.0) * present
    below = y - 0.5 * (upper_in + lower_in)
    shut = np.clip(1.0 - gap / 1.6, 0.0, 1.0) * present
    seam = np.exp(-((below / 0.7) ** 2)) * shut * 0.55
    depth = (y - lower_in) / (lower_lip * inside**0.6 + 0.3)  # 0..1 across the lower lip
    shine = np.exp(-(((depth - 0.42) / 0.24) ** 2) - ((xi + 0.12) / 0.36) ** 2)
    rim = np.exp(-(((y - upper_out + 0.9) / 0.8) ** 2)) * inside
    shadow = np.exp(-(((y - lower_out - 2.4) / 1.7) ** 2)) * inside**0.5
    tone = np.where(below < 0, 0.80 + 0.035 * below, 0.98) * (1.0 - seam)
    bite = np.minimum((0.1 + 0.28 * teeth) * gap, 1.0 + 3.4 * teeth)
    dental = _between(y, upper_in - 1.0, upper_in + bite, EDGE) * np.clip(gap / 1.5 - 0.4, 0, 1)
    dental = dental * (0.95 - 0.55 * xi**2)
    mound = (0.06 + 0.3 * tongue) * gap * np.clip(1.1 - xi**2 * 2.2, 0.0, 1.0)
    lick = _between(y, lower_in - mound, lower_in - 0.5, 0.6) * np.clip(gap / 5.0 - 0.2, 0.0, 1.0)

    lip_colour = _lip_colour(who)
    gloss = np.minimum(lip_colour * 1.12 + 52, 255)
    for channel in range(3):
        skin = view[..., channel] * (1.0 - (0.26 - 0.02 * channel) * shadow)
        skin += (0.10 * who.skin[channel] + 6) * rim
        red = lip_colour[channel] * tone
        red += (0.55 * shine) * (gloss[channel] - red)
        dark = (40.0, 9.0, 14.0)[channel]
        dark = dark + lick * ((168.0, 66.0, 74.0)[channel] - dark)
        dark = dark + dental * ((240.0, 234.0, 224.0)[channel] - dark)
        skin += lips * (red - skin)
        skin += cavity * (dark - skin)
        view[..., channel] = np.clip(skin, 0.0, 255.0)


def _lip_colour(who: Identity) -> np.ndarray:
    natural = who.skin * (0.86, 0.66, 0.65)
    painted = np.array((196, 62, 78)) * (0.45 + 0.55 * who.skin.mean() / 205)
    return natural + (painted - natural) * (0.1 + 0.75 * who.lip_redness)


def draw_eyes(
    head: np.ndarray, openness: np.ndarray, gaze: np.ndarray, who: Identity, scale: float
) -> list[tuple[slice, slice, np.ndarray]]:
    """Both eyes in every frame, as (rows, columns, (T, rows, columns, 3) uint8) patches of
    ``head``.

    openness: (T,) 0 closed .. 1 open; gaze: (T, 2) shift of the irises in design pixels.
    """
    half, height = 7.8 + 1.6 * who.eye_size, 4.2 + 2.2 * who.eye_size
    iris_radius = 3.9 + 0.6 * who.eye_size
    lid_colour, lash = who.skin * (0.90, 0.86, 0.84), 0.35 * who.hair
    white = np.array((246, 244, 242)) * 0.985
    opened = openness[:, None, None]
    patches = []
    for side, (cx, cy) in zip((-1, 1), eye_centres(who), strict=True):
        rows = slice(round((cy - 9.5) * scale), round((cy + 7.0) * scale))
        columns = slice(round((cx - 11.5) * scale), round((cx + 11.5) * scale))
        y = ((np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) / scale)[None, :, None]
        x = ((np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) / scale)[None, None]
        base = head[rows, columns, :3].astype(np.float32)

        xi = (x - cx) / half * side  # 1 at the outer corner
        inside = np.clip(1.0 - xi**2, 0.0, 1.0)
        corner = cy + 0.6 - 0.7 * xi
        crest = corner - height * inside**0.62
        base_line = corner + 0.52 * height * inside**0.8
        lid = base_line + (crest - base_line) * opened  # (T, 1, X), the lower edge of the upper lid
        present = np.clip((1.0 - np.abs(xi)) * half * EDGE + 0.5, 0.0, 1.0)
        ball = (
            _between(y, lid, base_line, scale) * np.clip((base_line - lid) * scale, 0, 1) * present
        )
        covered = _between(y, crest - 0.4, lid, 1.5) * present * np.clip((lid - crest) * 1.5, 0, 1)
        lashes = _between(y, lid - 0.75 - 0.35 * (xi + 1) * opened, lid + 0.55, scale) * present
        crease = np.exp(-(((y - crest + 2.1) / 0.8) ** 2)) * inside * 0.22

        dx, dy = x - cx - gaze[:, :1, None], y - cy + 0.25 - gaze[:, 1:, None]
        radius = np.sqrt(dx**2 + dy**2)
        iris = np.clip((iris_radius - radius) * scale + 0.5, 0.0, 1.0)
        pupil = np.clip((0.46 * iris_radius - radius) * scale + 0.5, 0.0, 1.0)
        glint = np.exp(-((dx + 1.3) ** 2 + (dy + 1.4) ** 2) / 0.9)
        limbus = 1.0 - 0.45 * np.clip(radius / iris_radius - 0.55, 0.0, 1.0) / 0.45
        glow = limbus * (1.0 + 0.35 * np.clip(dy / iris_radius, -1.0, 1.0))
        shaded = 1.0 - 0.34 * np.exp(-(np.clip(y - lid, 0.0, None) / 1.5))

        patch = np.empty((len(openness), *base.shape), np.uint8)
        for channel in range(3):
            eye = white[channel] * (1.0 - 0.12 * xi**2)
            eye = eye + iris * (who.iris[channel] * 1.15 * glow - eye)
            eye += pupil * (16.0 - eye)
            eye *= shaded
            eye += glint * (255.0 - eye) * 0.95
            colour = base[..., channel] * (1.0 - crease)
            colour = colour + covered * (lid_colour[channel] - colour)
            colour += ball * (eye - colour)
            colour += lashes * (lash[channel] - colour)
            patch[..., channel] = np.clip(colour, 0.0, 255.0)
        patches.append((rows, columns, patch))
    return patches
