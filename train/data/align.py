"""Aligns faces: one similarity transform per clip puts the eye centres at fixed places.

Faces and eyes are found with OpenCV's Haar cascades on some of the frames; medians over the clip
make up for their noise, and a transform that does not change within the clip leaves the head's
own motion in the picture, without jitter.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import cv2
import cv2.data
import numpy as np

from train.errors import UserError

EYES = np.array([[31.4, 44.2], [65.9, 43.1]])  # (x, y) of both eye centres in a 96 x 128 frame
FRAME = (128, 96)  # (H, W) that EYES refers to
SAMPLE_EVERY = 5  # frames between two detections
DETECTION_SIDE = 640  # pixels; larger pictures are reduced before detection

# Eye centres as fractions of the box of haarcascade_frontalface_alt2, medians over GRID.
_EYES_IN_FACE = np.array([[0.312, 0.382], [0.649, 0.382]])


class NoFace(UserError):
    """No face was found where one is needed."""


def align_frames(frames: np.ndarray, size: tuple[int, int] = FRAME) -> np.ndarray:
    """Aligns the face of a clip.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        size: (H, W) of the result; eye positions scale with it, 4:3 is meant.

    Returns: (T, 3, H, W) uint8 RGB. Raises `NoFace`.
    """
    return warp(frames, locate_eyes(frames)[0], size)


def align_image(image: np.ndarray, size: tuple[int, int] = FRAME) -> np.ndarray:
    """Aligns the face of a photo, (H, W, 3) uint8 RGB, to (3, H, W) uint8. Raises `NoFace`."""
    return align_frames(image[None], size)[0]


def locate_eyes(frames: np.ndarray) -> tuple[np.ndarray, bool]:
    """Finds the median eye centres of the largest face.

    Args:
        frames: (T, H, W, 3) uint8 RGB; every fifth is searched.

    Returns: the centres (2, 2) as (x, y) in pixels, the one on the picture's left first, and
        whether eyes were found; if not, they are guessed from the face box.

    Raises: `NoFace` if no searched frame shows a face.
    """
    shrink = max(1.0, *(side / DETECTION_SIDE for side in frames.shape[1:3]))
    faces, pairs = [], []
    for frame in frames[::SAMPLE_EVERY]:
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        if shrink > 1:
            grey = cv2.resize(
                grey, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA
            )
        face = _largest_face(grey)
        if face is not None:
            faces.append(face)
            pair = _eye_pair(grey, face)
            if pair is not None:
                pairs.append(pair)
    if not faces:
        raise NoFace("no face found")
    # Eyes seen in a small part of the frames only are more likely nostrils or brows.
    found = len(pairs) >= 0.2 * len(faces)
    x, y, width, height = np.median(faces, axis=0)
    guess = np.array([x, y]) + _EYES_IN_FACE * [width, height]
    eyes = np.median(pairs, axis=0) if found else guess
    return (eyes + 0.5) * shrink - 0.5, found


def warp(frames: np.ndarray, eyes: np.ndarray, size: tuple[int, int] = FRAME) -> np.ndarray:
    """Maps `eyes` (2, 2) of `frames` (T, H, W, 3) to their places in (T, 3, *size) uint8.

    The picture is reduced by area averaging, not by sampling alone, so that nothing aliases:
    warped at twice the size, from frames first brought to about that scale.
    """
    height, width = size
    target = (EYES + 0.5) * [width / FRAME[1], height / FRAME[0]] * 2 - 0.5
    shrink = max(1.0, math.dist(*eyes) / math.dist(*target))
    matrix = _similarity((eyes + 0.5) / shrink - 0.5, target)
    aligned = np.empty((len(frames), 3, height, width), dtype=np.uint8)
    for frame, out in zip(frames, aligned, strict=True):
        if shrink > 1:
            frame = cv2.resize(
                frame, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA
            )
        double = cv2.warpAffine(
            frame,
            matrix,
            (2 * width, 2 * height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        out[:] = cv2.resize(double, (width, height), interpolation=cv2.INTER_AREA).transpose(
            2, 0, 1
        )
    return aligned


def _similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The 2 x 3 rotation, scale and shift that takes two points to two others."""
    a, b = source @ [1, 1j], target @ [1, 1j]
    turn = (b[1] - b[0]) / (a[1] - a[0])
    shift = b[0] - turn * a[0]
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


@functools.cache
def _cascade(name: str) -> Any:
    cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / f"haarcascade_{name}.xml"))
    if cascade.empty():
        raise RuntimeError(f"OpenCV's haarcascade_{name}.xml cannot be loaded; reinstall opencv")
    return cascade


def _largest_face(grey: np.ndarray) -> np.ndarray | None:
    """Box (x, y, width, height) of the largest face, or None."""
    for part in (4, 12):  # small faces only if there is no large one: they cost three times more
        side = max(24, min(grey.shape) // part)
        faces = _cascade("frontalface_alt2").detectMultiScale(grey, 1.1, 4, minSize=(side, side))
        if len(faces):
            return max(faces, key=lambda box: box[2] * box[3]).astype(float)
    return None


def _eye_pair(grey: np.ndarray, face: np.ndarray) -> np.ndarray | None:
    """Centres (2, 2) of the pair of eye detections that fits a face best, or None."""
    x, y, width, height = face.astype(int)
    top = y + height // 6  # above it is hair
    upper = grey[top : y + height * 6 // 10, x : x + width]
    if not upper.size:
        return None
    boxes = _cascade("eye").detectMultiScale(upper, 1.1, 3, minSize=(width // 6, width // 6))
    expected = face[:2] + _EYES_IN_FACE * face[2:]
    best, best_error = None, 0.18 * width  # a pair further from where eyes are is none
    for left in boxes:
        for right in boxes:
            pair = np.add([_centre(left), _centre(right)], [x, top])
            dx, dy = pair[1] - pair[0]
            alike = max(left[2], right[2]) <= 1.6 * min(left[2], right[2])
            level = dx > 0 and math.degrees(math.atan2(abs(dy), dx)) < 20
            apart = 0.25 * width < dx < 0.6 * width
            error = np.linalg.norm(pair - expected, axis=1).max()
            if alike and level and apart and error < best_error:
                best, best_error = pair, error
    return best


def _centre(box: np.ndarray) -> np.ndarray:
    return box[:2] + box[2:] / 2 - 0.5
