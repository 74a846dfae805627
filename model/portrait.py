"""The face in a photo: found and aligned as a network expects it, and put back when it talks."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from train.data.align import EYES, FRAME, NoFace, find_all_eyes, similarity, warp
from train.data.landmarks import (
    FIVE,
    INSTALL,
    PLACES,
    choose,
    eye_centres,
    find_all_landmarks,
    installed,
    load_predictor,
)
from train.errors import UserError

LONGEST = 1280  # pixels of the longer side of a photo that a face is put back into
FEATHER = 0.18  # share of the face's width over which it fades into the photo
MOVED = 24.0  # levels of difference from which on a pixel counts as moved
ENLARGED = 2.0  # times that a face may be enlarged without a remark


@dataclass(frozen=True)
class Portrait:
    """A face, ready to be animated."""

    still: np.ndarray
    """(h, w, 3) uint8 RGB, aligned, at the network's size."""
    photo: np.ndarray
    """(H, W, 3) uint8 RGB, where it was found."""
    place: np.ndarray | None
    """(2, 3) similarity transform from the photo's pixels to the still's; None if it is a crop."""
    remarks: tuple[str, ...] = ()
    """What was done to the photo or is odd about it, as "kind: details"."""


def find_portrait(
    photo: np.ndarray,
    size: tuple[int, int],
    alignment: str,
    face: int | None = None,
    targets: Sequence[Sequence[float]] | None = None,
) -> Portrait:
    """Find a face and align it.

    Args:
        photo: (H, W, 3) uint8 RGB.
        size: (h, w) of the still.
        alignment: ``dlib``, ``haar`` or a predictor's path, as of ``train.prepare``, or ``none``
            for the best that is installed. Haar stands in where dlib is missing.
        face: number of the face, 1 the largest; by default the largest, which is remarked upon if
            there are others.
        targets: where the five points belong in a frame of 96 x 128 pixels, (5, 2); by default
            where ``train.prepare`` puts them.

    Raises:
        NoFace: there is none, or none of that number.
    """
    aligner, remarks = _aligner(alignment)
    if aligner == "haar":
        faces = find_all_eyes(photo)
        places = EYES if targets is None else eye_centres(np.array(targets))
    else:
        landmarks = find_all_landmarks(photo, load_predictor(aligner))
        faces, places = [points[list(FIVE)] for points in landmarks], PLACES
        if targets is not None:
            places = np.array(targets)
    if not faces:
        raise NoFace(
            "no face found; it has to be seen from the front and upright, or be cut out already "
            "(--aligned)"
        )
    if face is None and len(faces) > 1:
        remarks.append(f"{len(faces)} faces: the largest was taken; --face 2 takes the next")
    number = 1 if face is None else face
    if not 1 <= number <= len(faces):
        known = f"1 to {len(faces)}, the largest is 1" if len(faces) > 1 else "1, the only one"
        raise NoFace(f"--face {number}: expected {known}")
    points = faces[number - 1]
    height, width = size
    target = (places + 0.5) * [width / FRAME[1], height / FRAME[0]] - 0.5
    place = similarity(points, target)
    scale = float(np.hypot(*place[:, 0]))
    if scale > ENLARGED:
        remarks.append(f"small face: it is enlarged {scale:.1f} times")
    still = warp(photo[None], points, size, places)[0].transpose(1, 2, 0)
    return Portrait(np.ascontiguousarray(still), photo, place, tuple(remarks))


def _aligner(alignment: str) -> tuple[str, list[str]]:
    """What stands in for a run's alignment here, and what to say of it."""
    if alignment == "haar":
        return "haar", []
    if not installed():
        missing = (
            "aligned by OpenCV's eye detector: the network was trained on faces aligned by "
            f"landmarks, which fit better: {INSTALL}"
        )
        return "haar", [missing] * (alignment != "none")
    if alignment in ("none", "dlib"):
        return "dlib", []
    if not Path(alignment).is_file():
        return "dlib", [f"aligned by dlib's landmarks: those of the run, {alignment}, are not here"]
    return choose(alignment), []


def aligned_portrait(photo: np.ndarray, size: tuple[int, int]) -> Portrait:
    """Take a picture that shows an aligned face alone; its sides are cut to the still's shape."""
    (height, width), (h, w) = photo.shape[:2], size
    scale = max(h / height, w / width)
    rows, columns = min(height, round(h / scale)), min(width, round(w / scale))
    top, left = (height - rows) // 2, (width - columns) // 2
    cut = photo[top : top + rows, left : left + columns]
    remarks = []
    if rows < 0.98 * height or columns < 0.98 * width:
        remarks.append(f"cut: from {width} x {height} to {columns} x {rows}, the frame's shape")
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return Portrait(cv2.resize(cut, (w, h), interpolation=how), photo, None, tuple(remarks))


class Paste:
    """Puts frames of a portrait back into its photo, without a seam.

    What the network changed is added to the photo, and fades out towards the border of the face.
    Where nothing moves, the photo's own detail stays; where lips move, the frame takes its place,
    or the still's sharp lips would show through.
    """

    def __init__(self, portrait: Portrait) -> None:
        if portrait.place is None:
            raise UserError("--paste with --aligned: there is no photo to put the face back into")
        shrink = min(1.0, LONGEST / max(portrait.photo.shape[:2]))
        how = cv2.INTER_AREA
        self.photo = cv2.resize(portrait.photo, None, fx=shrink, fy=shrink, interpolation=how)
        h, w = portrait.still.shape[:2]
        turn = portrait.place[:, :2] / shrink
        shift = portrait.place[:, 2] + portrait.place[:, :2] @ np.full(2, 0.5 / shrink - 0.5)
        inverse = np.linalg.inv(turn)
        corners = (np.array([[0, 0], [w, 0], [0, h], [w, h]]) - 0.5 - shift) @ inverse.T
        low = np.maximum(0, np.floor(corners.min(0))).astype(int)
        high = np.minimum(self.photo.shape[1::-1], np.ceil(corners.max(0)).astype(int) + 1)
        self._box = slice(low[1], max(high[1], low[1])), slice(low[0], max(high[0], low[0]))
        back = np.column_stack([turn, shift + turn @ low])
        self._back = functools.partial(
            cv2.warpAffine,
            M=back,
            dsize=(self._box[1].stop - low[0], self._box[0].stop - low[1]),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        self._small = portrait.still.astype(np.float32)
        self._still = self._back(self._small)
        self._under = self.photo[self._box].astype(np.float32)
        self._mask = np.clip(self._back(_feathered(h, w)), 0, 1)[..., None]

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Frames (T, h, w, 3) uint8 → (T, H, W, 3) uint8."""
        pasted = np.repeat(self.photo[None], len(frames), axis=0)
        for frame, out in zip(frames, pasted, strict=True):
            change = frame.astype(np.float32) - self._small
            moved = cv2.GaussianBlur(np.abs(change).mean(2) / MOVED, (0, 0), frame.shape[1] / 48)
            replaced = self._mask * np.clip(self._back(moved), 0, 1)[..., None]
            face = self._under + self._mask * self._back(change)
            face += replaced * (self._still - self._under)
            out[self._box] = face.round().clip(0, 255)
        return pasted


def _feathered(height: int, width: int) -> np.ndarray:
    """(h, w) float32: 1 inside, falling smoothly to 0 at the border."""
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    border = np.minimum(np.minimum(x, width - x), np.minimum(y, height - y)) - 1
    share = np.clip(border / (FEATHER * width), 0, 1)
    return (share * share * (3 - 2 * share)).astype(np.float32)
