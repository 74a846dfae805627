"""Align faces by similarity transforms that put points of the face at fixed places.

Without landmarks (see ``train.data.landmarks``) the points are the eye centres, found with OpenCV's
Haar cascades on some of the frames. Their detections are noisy: scale and rotation are one per
clip, from medians; only the slow movement of the head is followed, for the centre between the
eyes is smoothed over a second. Measured on 22 clips of 16 people of GRID against 68 landmarks,
the face then drifts by 0.56 px within a clip (0.23 px with landmarks), and its scale is wrong by
-10 to +5 %, for which neither eyes nor face boxes of the cascades are precise enough.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import cv2.data
import numpy as np
from scipy.ndimage import gaussian_filter1d, median_filter

from train.errors import UserError

EYES = np.array([[31.4, 44.2], [65.9, 43.1]])  # (x, y) of both eye centres in a 96 x 128 frame
FRAME = (128, 96)  # (H, W) that EYES refers to
SAMPLE_EVERY = 5  # frames between two detections
DETECTION_SIDE = 640  # pixels; larger pictures are reduced before detection
SECOND_FACE = 0.6  # of the width of the largest face, from where on another is a face too

# Eye centres as fractions of the box of haarcascade_frontalface_alt2, medians over GRID.
_EYES_IN_FACE = np.array([[0.312, 0.382], [0.649, 0.382]])
# The centre between the true eyes (the corners' middles) from where the cascades see it, along and
# across the line of the eyes in units of their distance: (1.4, 1.8) px of a 96 x 128 frame.
_CASCADE_OFFSET = np.array([0.040, 0.053])
_FOLLOW = 8.0  # frames, standard deviation of the smoothing of the head's movement


class NoFace(UserError):
    """No face was found where one is needed."""


@dataclass(frozen=True)
class Face:
    """Where the largest face of a clip is, and how sure that is."""

    eyes: np.ndarray  # (T, 2, 2) centres as (x, y) in pixels, the one on the picture's left first
    eyes_found: bool  # if not, they are guessed from the face box
    searched: int  # frames that were searched for faces
    seen: int  # those that show a face
    several: int  # those that show another face of about the same size

    @property
    def remarks(self) -> list[str]:
        """What is odd about it, as "kind: details"."""
        guessed = [] if self.eyes_found else ["eyes not found: placed by the face box"]
        return guessed + face_remarks(self.searched, self.seen, self.several)


def face_remarks(searched: int, seen: int, several: int) -> list[str]:
    """What to say of a clip whose face was ``seen``, and another beside it, in so many frames."""
    remarks = []
    if 2 * several >= seen:
        remarks.append("two faces: the largest was taken")
    if 2 * seen < searched:
        remarks.append(f"few faces: found in {seen} of {searched} frames searched")
    return remarks


def second_face(widths: Sequence[float]) -> bool:
    """Whether the second of the faces, the largest first, is about as wide as the first."""
    return len(widths) > 1 and widths[1] >= SECOND_FACE * widths[0]


def align_frames(frames: np.ndarray, size: tuple[int, int] = FRAME) -> np.ndarray:
    """Align the face of a clip by its eyes.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        size: (H, W) of the result; eye positions scale with it, 4:3 is meant.

    Returns: (T, 3, H, W) uint8 RGB. Raises ``NoFace``.
    """
    return warp(frames, locate_eyes(frames)[0], size)


def align_image(image: np.ndarray, size: tuple[int, int] = FRAME) -> np.ndarray:
    """Align the face of a photo, (H, W, 3) uint8 RGB, to (3, H, W) uint8. Raises ``NoFace``."""
    return align_frames(image[None], size)[0]


def locate_eyes(frames: np.ndarray) -> tuple[np.ndarray, bool]:
    """Give the eyes (T, 2, 2) of ``find_face`` and whether they were found."""
    face = find_face(frames)
    return face.eyes, face.eyes_found


def find_face(frames: np.ndarray) -> Face:
    """Find the eye centres of the largest face, always as far apart and in the same direction.

    Args:
        frames: (T, H, W, 3) uint8 RGB; every fifth is searched.

    Raises: ``NoFace`` if no searched frame shows a face.
    """
    shrink = max(1.0, *(side / DETECTION_SIDE for side in frames.shape[1:3]))
    guesses, pairs, several = {}, {}, 0
    times = range(0, len(frames), SAMPLE_EVERY)
    for t in times:
        grey = cv2.cvtColor(frames[t], cv2.COLOR_RGB2GRAY)
        if shrink > 1:
            grey = cv2.resize(
                grey, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA
            )
        found = find_faces(grey)
        if found:
            face = found[0]
            guesses[t] = face[:2] + _EYES_IN_FACE * face[2:]
            several += second_face([width for _, _, width, _ in found])
            pair = _eye_pair(grey, face)
            if pair is not None:
                pairs[t] = pair
    if not guesses:
        raise NoFace("no face found")
    # Eyes seen in a small part of the frames only are more likely nostrils or brows.
    eyes_found = len(pairs) >= 0.2 * len(guesses)
    seen = pairs if eyes_found else guesses
    left, right = np.median(list(seen.values()), axis=0)
    turn = right - left
    middle = _follow({t: pair.mean(0) for t, pair in seen.items()}, len(frames)) + _offset(turn)
    eyes = np.stack([middle - turn / 2, middle + turn / 2], axis=1)
    eyes = (eyes + 0.5) * shrink - 0.5
    return Face(eyes, eyes_found, len(times), len(guesses), several)


def find_all_eyes(image: np.ndarray) -> list[np.ndarray]:
    """Give the eye centres (2, 2) of every face in a photo (H, W, 3), the largest face first.

    The first are those that ``find_face`` finds.
    """
    shrink = max(1.0, *(side / DETECTION_SIDE for side in image.shape[:2]))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if shrink > 1:
        grey = cv2.resize(grey, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
    eyes = []
    for face in find_faces(grey):
        pair = _eye_pair(grey, face)
        pair = face[:2] + _EYES_IN_FACE * face[2:] if pair is None else pair
        eyes.append((pair + _offset(pair[1] - pair[0]) + 0.5) * shrink - 0.5)
    return eyes


def _offset(turn: np.ndarray) -> np.ndarray:
    """The way (2,) from where the cascades see the eyes to where they are."""
    along, across = _CASCADE_OFFSET
    return along * turn + across * np.array([-turn[1], turn[0]])


def _follow(seen: dict[int, np.ndarray], count: int) -> np.ndarray:
    """Smooth track (count, 2) of a point that was seen in some frames."""
    points = median_filter(np.stack(list(seen.values())), (3, 1), mode="nearest")
    every = [np.interp(np.arange(count), list(seen), column) for column in points.T]
    return gaussian_filter1d(np.stack(every, axis=1), _FOLLOW, axis=0, mode="nearest")


def warp(
    frames: np.ndarray,
    points: np.ndarray,
    size: tuple[int, int] = FRAME,
    places: np.ndarray = EYES,
) -> np.ndarray:
    """Move ``points`` of ``frames`` (T, H, W, 3) to their places in (T, 3, *size) uint8.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        points: (T, K, 2), or (K, 2) for all frames: (x, y) in pixels, K of at least 2.
        size: (H, W) of the result.
        places: (K, 2), where the points belong in a 96 x 128 frame. The similarity transform of
            least squared error takes them there.

    The picture is reduced by area averaging, not by sampling alone, so that nothing aliases:
    warped at twice the size, from frames first brought to about that scale.
    """
    height, width = size
    target = (places + 0.5) * [width / FRAME[1], height / FRAME[0]] * 2 - 0.5
    points = np.broadcast_to(points, (len(frames), *places.shape))
    scales = [math.hypot(*similarity(source, target)[:, 0]) for source in points]
    shrink = max(1.0, 1 / max(float(np.median(scales)), 1e-6))  # one, or textures would flicker
    aligned = np.empty((len(frames), 3, height, width), dtype=np.uint8)
    for frame, source, out in zip(frames, points, aligned, strict=True):
        if shrink > 1:
            frame = cv2.resize(
                frame, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA
            )
        double = cv2.warpAffine(
            frame,
            similarity((source + 0.5) / shrink - 0.5, target),
            (2 * width, 2 * height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        out[:] = cv2.resize(double, (width, height), interpolation=cv2.INTER_AREA).transpose(
            2, 0, 1
        )
    return aligned


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The 2 x 3 rotation, scale and shift that takes points (K, 2) to others, by least squares."""
    a, b = source @ [1, 1j], target @ [1, 1j]
    centred = a - a.mean()
    turn = np.vdot(centred, b - b.mean()) / np.vdot(centred, centred)
    shift = b.mean() - turn * a.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


@functools.cache
def _cascade(name: str) -> Any:
    cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / f"haarcascade_{name}.xml"))
    if cascade.empty():
        raise RuntimeError(f"OpenCV's haarcascade_{name}.xml cannot be loaded; reinstall opencv")
    return cascade


def find_faces(grey: np.ndarray) -> list[np.ndarray]:
    """Boxes (x, y, width, height) of the faces, the largest first."""
    for part in (4, 12):  # small faces only if there is no large one: they cost three times more
        side = max(24, min(grey.shape) // part)
        faces = _cascade("frontalface_alt2").detectMultiScale(grey, 1.1, 4, minSize=(side, side))
        if len(faces):
            return [faces[i].astype(float) for i in np.argsort(-faces[:, 2] * faces[:, 3])]
    return []


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
