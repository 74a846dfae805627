"""Find the 68 landmarks of a face with dlib's predictor, and align faces by five of them.

dlib and the predictor's file come with the extra ``faces``; they are optional and no part of this
package. The predictor was trained on the iBUG 300-W pictures,
whose licence excludes commercial use, and its author asks that it not be used in commercial
products: ``LICENCE`` is said wherever it is chosen.

The alignment is the published system's: the similarity transform of the five points that speech
hardly moves (base of the nose, corners of the eyes), frame by frame, smoothed over seven frames.
``PLACES`` are the mean face of the authors' aligner in the 96 x 128 frame. Over 22 clips of 16
people of GRID they put the eye centres at (31.3, 44.4) and (66.0, 43.3), within 0.3 px of
``align.EYES``. The authors' window looks forward; this one is centred, so that it does not lag
behind the head.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.ndimage import median_filter, uniform_filter1d

from train.data.align import (
    DETECTION_SIDE,
    FRAME,
    SAMPLE_EVERY,
    NoFace,
    face_remarks,
    find_faces,
    second_face,
    warp,
)
from train.data.prepared import DataError

FIVE = (33, 36, 39, 42, 45)  # base of the nose, corners of the eyes
PLACES = np.array([[49.7, 72.2], [24.5, 43.9], [38.3, 44.6], [59.1, 43.7], [72.7, 42.5]])
WINDOW = 7  # frames of the smoothing
RIGHT_EYE, LEFT_EYE = slice(36, 42), slice(42, 48)
UPPER_LIP, LOWER_LIP = 62, 66  # the middle of the inner lips
SHUT = 0.35  # aspect ratio of a shut eye, as a share of the same eye's open
PREDICTOR = "shape_predictor_68_face_landmarks.dat"
INSTALL = "pip install dlib-bin face_recognition_models"  # the extra ``faces``
LICENCE = "its training pictures (iBUG 300-W) exclude commercial use"
_ENLARGED = 280.0  # pixels, width of the box in which the predictor works
# dlib's box as fractions of the Haar cascade's, (left, top, right, bottom), medians over GRID.
_BOX_IN_FACE = np.array([0.07, 0.18, 0.925, 1.035])


@dataclass(frozen=True)
class Landmarks:
    """The landmarks of a clip: (T, 68, 2) as (x, y) in pixels, and how the face was found."""

    points: np.ndarray
    found: int
    """Frames in which a detector found the face."""
    searched: int
    """Frames that were searched; in the others the box is interpolated."""
    several: int
    """Frames that show another face of about the same size."""
    by_haar: bool
    """Whether the Haar cascade found it, because dlib's detector did not."""

    @property
    def remarks(self) -> list[str]:
        """What is odd about it, as "kind: details"."""
        placed = ["no face for dlib's detector: placed by the Haar cascade"] if self.by_haar else []
        return placed + face_remarks(self.searched, self.found, self.several)


def installed() -> bool:
    """Whether dlib and the folder of its models are there."""
    return all(importlib.util.find_spec(name) for name in ("dlib", "face_recognition_models"))


def model_file(name: str) -> Path:
    """Find a file of the package ``face_recognition_models``; ``DataError`` if it is not installed.

    The package is not imported: it needs ``pkg_resources``, which setuptools no longer has.
    """
    spec = importlib.util.find_spec("face_recognition_models")
    path = Path(spec.origin).parent / "models" / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise DataError(f"{name} is not installed; {INSTALL}")
    return path


def choose(landmarks: str) -> str:
    """Resolve ``auto``, ``haar``, ``dlib`` or a predictor's path to one of the last three.

    ``DataError`` if dlib is asked for and missing, or the file is no predictor of 68 points.
    """
    if landmarks == "auto":
        return "dlib" if installed() else "haar"
    if landmarks == "haar":
        return landmarks
    if importlib.util.find_spec("dlib") is None:
        raise DataError(f"--landmarks {landmarks} needs dlib: {INSTALL}, or use --landmarks haar")
    if landmarks == "dlib":
        load_predictor(landmarks)
        return landmarks
    path = Path(landmarks).expanduser().absolute()
    if not path.is_file():
        raise DataError(
            f"--landmarks {landmarks}: no such file; expected auto, haar, dlib or the path of a "
            "68-point shape predictor (*.dat)"
        )
    load_predictor(str(path))
    return str(path)


def describe(chosen: str) -> str:
    """What to say of the alignment that ``choose`` returned, with the licence to mind."""
    if chosen == "haar":
        return f"the Haar cascades of OpenCV; landmarks do it better: {INSTALL}"
    if chosen == "dlib":
        return f"dlib's 68 landmarks; {LICENCE}, --landmarks haar does without them"
    return f"the landmarks of {chosen}; mind the licence of what it was trained on"


@functools.cache
def load_predictor(landmarks: str = "dlib") -> Any:
    """Load dlib's predictor, or that of a path; ``DataError`` if it does not find 68 points."""
    import dlib

    path = model_file(PREDICTOR) if landmarks == "dlib" else Path(landmarks)
    try:
        predictor = dlib.shape_predictor(str(path))
        parts = predictor(np.zeros((8, 8, 3), np.uint8), dlib.rectangle(0, 0, 7, 7)).num_parts
    except RuntimeError as error:
        raise DataError(f"{path}: no shape predictor of dlib ({error})") from None
    if parts != 68:
        raise DataError(f"{path}: a predictor of {parts} points, expected 68")
    return predictor


def find_landmarks(frames: np.ndarray, predictor: Any = None) -> Landmarks:
    """Find the landmarks of the largest face in every frame.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        predictor: what ``load_predictor`` returns (default: dlib's own).

    Every fifth frame is searched with dlib's HOG detector, at half its smallest face (40 pixels of
    at most 640) if there is no larger one, and with the Haar cascade if it finds nothing in any
    frame. Raises ``NoFace`` if neither does.
    """
    predictor = predictor or load_predictor()
    shrink = max(1.0, *(side / DETECTION_SIDE for side in frames.shape[1:3]))
    times = range(0, len(frames), SAMPLE_EVERY)
    pictures = {}
    for t in times:
        picture = np.ascontiguousarray(frames[t])
        if shrink > 1:
            picture = cv2.resize(
                picture, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA
            )
        pictures[t] = picture
    for detector in (detect_all, detect_small, _haar_boxes):
        found = {t: faces for t in times if (faces := detector(pictures[t]))}
        if found:
            break
    else:
        raise NoFace("no face found")
    boxes = {t: faces[0] for t, faces in found.items()}
    several = sum(second_face([box[2] - box[0] for box in faces]) for faces in found.values())
    steady = median_filter(np.stack(list(boxes.values())), (min(3, len(boxes)), 1), mode="nearest")
    every = [np.interp(np.arange(len(frames)), list(boxes), side) for side in steady.T]
    points = predict(frames, np.stack(every, axis=1) * shrink, predictor)
    return Landmarks(points, len(boxes), len(times), several, detector is _haar_boxes)


def find_all_landmarks(image: np.ndarray, predictor: Any = None) -> list[np.ndarray]:
    """Give the landmarks (68, 2) of every face in a photo (H, W, 3), the largest face first.

    The first are those that ``find_landmarks`` finds.
    """
    predictor = predictor or load_predictor()
    shrink = max(1.0, *(side / DETECTION_SIDE for side in image.shape[:2]))
    small = np.ascontiguousarray(image)
    if shrink > 1:
        small = cv2.resize(small, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
    boxes = detect_all(small) or detect_small(small) or _haar_boxes(small)
    return [predict(image[None], box * shrink, predictor)[0] for box in boxes]


def predict(frames: np.ndarray, boxes: np.ndarray, predictor: Any) -> np.ndarray:
    """Landmarks (T, 68, 2) of frames (T, H, W, 3) uint8 within boxes (T, 4) or (4,).

    Boxes are (left, top, right, bottom) in pixels, as dlib's detector would put them. The
    predictor answers in whole pixels, so small faces are enlarged to about 280 of them.
    """
    import dlib

    points = np.empty((len(frames), 68, 2))
    boxes = np.broadcast_to(boxes, (len(frames), 4))
    factor = max(1, round(_ENLARGED / max(1.0, float(np.median(boxes[:, 2] - boxes[:, 0])))))
    margin = (boxes[:, 2:] - boxes[:, :2]) / 3  # of what the predictor may look at beside the box
    starts = np.maximum(0, np.floor(boxes[:, :2] - margin)).astype(int)
    stops = np.maximum(starts + 1, np.ceil(boxes[:, 2:] + margin).astype(int))
    for frame, box, (x, y), (end_x, end_y), out in zip(
        frames, boxes, starts, stops, points, strict=True
    ):
        face = np.ascontiguousarray(frame[y:end_y, x:end_x])
        if factor > 1:
            face = cv2.resize(face, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
        corner = np.array([x, y])
        area = (box - np.tile(corner, 2)) * factor
        shape = predictor(face, dlib.rectangle(*map(round, area.tolist())))
        found = np.array([(part.x, part.y) for part in shape.parts()])
        out[:] = (found + 0.5) / factor - 0.5 + corner
    return points


def align_landmarks(
    frames: np.ndarray,
    landmarks: np.ndarray,
    size: tuple[int, int] = FRAME,
    places: np.ndarray = PLACES,
) -> np.ndarray:
    """Align frames (T, H, W, 3) uint8 by landmarks (T, 68, 2): (T, 3, *size) uint8.

    ``places`` (5, 2) are where the five points belong, in a 96 x 128 frame.
    """
    return warp(frames, smooth(landmarks[:, FIVE]), size, places)


def eye_centres(places: np.ndarray) -> np.ndarray:
    """Where both eyes' centres (2, 2) belong, if the five points belong at ``places`` (5, 2)."""
    return places[1:].reshape(2, 2, 2).mean(1)


def smooth(points: np.ndarray) -> np.ndarray:
    """Mean of points (T, K, 2) over seven frames; the first and last count on at the ends."""
    return uniform_filter1d(points, WINDOW, axis=0, mode="nearest")


def eye_aspect_ratio(landmarks: np.ndarray) -> np.ndarray:
    """(T,) EAR, mean of both eyes, from 68-point landmarks (T, 68, 2).

    The eye aspect ratio of Soukupova and Cech (2016): an eye's height over its width. Frames
    without a face are NaN: they repeat the last EAR, or are 0 before the first face.
    """
    points = np.asarray(landmarks, np.float64)
    if points.ndim != 3 or points.shape[1:] != (68, 2):
        raise DataError(f"landmarks: expected (T, 68, 2), got {points.shape}")
    ratios = []
    for eye in (RIGHT_EYE, LEFT_EYE):
        p = points[:, eye]
        height = np.linalg.norm(p[:, 1] - p[:, 5], axis=1)
        height += np.linalg.norm(p[:, 2] - p[:, 4], axis=1)
        width = np.linalg.norm(p[:, 0] - p[:, 3], axis=1)
        ratios.append(height / np.maximum(2 * width, 1e-9))
    ear = np.mean(ratios, axis=0)
    for t in np.flatnonzero(~np.isfinite(ear)):
        ear[t] = ear[t - 1] if t else 0.0
    return ear


def eye_openness(landmarks: np.ndarray) -> np.ndarray:
    """(T,) float32 from 0 (shut) to 1 (open), from the landmarks (T, 68, 2) of one clip.

    Open is the clip's own: the aspect ratio that a fifth of its frames exceed.
    """
    ear = eye_aspect_ratio(landmarks)
    opened = max(float(np.quantile(ear, 0.8)), 1e-6)
    return np.clip((ear / opened - SHUT) / (1 - SHUT), 0, 1).astype(np.float32)


def eye_distance(points: np.ndarray) -> float:
    """Median distance in pixels of the eyes' centres over the frames of (T, 68, 2)."""
    apart = points[:, LEFT_EYE].mean(1) - points[:, RIGHT_EYE].mean(1)
    return float(np.median(np.linalg.norm(apart, axis=1)))


def opening(points: np.ndarray) -> np.ndarray:
    """(T,) distance of the inner lips over that of the eyes, from landmarks (T, 68, 2)."""
    lips = np.linalg.norm(points[:, LOWER_LIP] - points[:, UPPER_LIP], axis=1)
    return lips / max(eye_distance(points), 1e-9)


def lip_shape(points: np.ndarray) -> np.ndarray:
    """(T, 3) float32 shape of the lips, from the landmarks (T, 68, 2) of one clip.

    Opening (between the inner lips), height and width of the outer lips, over the distance of the
    eyes; height and width less their means over the clip, which are the speaker's own.
    """
    sides = points[:, [57, 54]] - points[:, [51, 48]]
    outer = np.linalg.norm(sides, axis=2) / max(eye_distance(points), 1e-9)
    return np.column_stack([opening(points), outer - outer.mean(0)]).astype(np.float32)


@functools.cache
def _detector() -> Any:
    import dlib

    return dlib.get_frontal_face_detector()


def detect(picture: np.ndarray) -> np.ndarray | None:
    """Box of the largest face that ``detect_all`` finds, or None."""
    return next(iter(detect_all(picture)), None)


def detect_all(picture: np.ndarray, enlarge: int = 0) -> list[np.ndarray]:
    """Boxes (left, top, right, bottom) of the faces of (H, W, 3) uint8, the largest first.

    dlib's HOG detector sees faces of 80 pixels and more, halved by each ``enlarge``.
    """
    found = sorted(_detector()(picture, enlarge), key=lambda box: -box.area())
    return [np.array([box.left(), box.top(), box.right(), box.bottom()], float) for box in found]


def detect_small(picture: np.ndarray) -> list[np.ndarray]:
    """``detect_all``, down to 40 pixels."""
    return detect_all(picture, 1)


def _haar_boxes(picture: np.ndarray) -> list[np.ndarray]:
    """Boxes as dlib's detector would put them, of the faces that the Haar cascade finds."""
    faces = find_faces(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
    return [np.tile(face[:2], 2) + _BOX_IN_FACE * np.tile(face[2:], 2) for face in faces]
