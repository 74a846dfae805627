"""What dlib measures on aligned faces: their landmarks, and who they are.

Both networks come with the extra ``faces`` (see ``train.data.landmarks`` for the licence of the
landmarks' predictor). Frames are taken as aligned, so the face is at a fixed place, and enlarged to
about three times 128 x 96. The face-recognition network (D. E. King, 2017: a ResNet of 29 layers,
vectors of 128 numbers, the same person within 0.6) sees the face chip that its own procedure cuts
out, 150 x 150.

Traps. The predictor answers for every picture, whether it shows a face or not; so a detector must
first find one in the middle, the first or the last frame, about where aligned faces are.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from train.data.align import FRAME
from train.data.landmarks import detect, load_predictor, model_file, predict
from train.metrics.score import Score, check_frames

FACE_BOX = np.array([3.0, 21.0, 95.0, 108.0])  # of dlib's detector, medians over GRID
OVERLAP = 0.5  # intersection over union of a face with the box where it should be
DETECTION_WIDTH = 144  # pixels; the detector needs faces of 80
MODEL = "dlib_face_recognition_resnet_model_v1.dat"
CHIP = 150
REMEMBERED = 3  # videos whose landmarks are kept, for a real clip has several counterparts
NO_FACE = "no face found where aligned frames have it"


def face_box(size: tuple[int, int]) -> np.ndarray:
    """(left, top, right, bottom) in pixels of the face in aligned frames of (H, W)."""
    return FACE_BOX * np.tile([size[1] / FRAME[1], size[0] / FRAME[0]], 2)


def shows_face(picture: np.ndarray) -> bool:
    """Whether dlib's detector finds a face at its place in an aligned (H, W, 3) uint8."""
    factor = max(1.0, DETECTION_WIDTH / picture.shape[1])
    large = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    found = detect(large)
    if found is None:
        return False
    a, b = found / factor, face_box(picture.shape[:2])
    shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return shared > OVERLAP * (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


class FaceReader:
    """Landmarks of aligned frames, and of the videos seen last without computing them again."""

    title = "dlib's 68 landmarks"

    def __init__(self, landmarks: str = "dlib"):
        self.predictor = load_predictor(landmarks)
        self._seen: OrderedDict[int, tuple[Tensor, np.ndarray | Score]] = OrderedDict()

    def read(self, frames: Tensor) -> np.ndarray | Score:
        """(T, 68, 2) as (x, y) in pixels of (T, 3, H, W) uint8, or a Score that says why not."""
        if id(frames) not in self._seen:
            self._seen[id(frames)] = frames, self._read(check_frames(frames)[0])
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        self._seen.move_to_end(id(frames))
        return self._seen[id(frames)][1]

    def _read(self, frames: Tensor) -> np.ndarray | Score:
        pictures = np.ascontiguousarray(frames.permute(0, 2, 3, 1).cpu().numpy())
        if not any(shows_face(pictures[t]) for t in (len(pictures) // 2, 0, -1)):
            return Score(None, NO_FACE)
        if (pictures == pictures[:1]).all():  # a still: one frame says it all
            first = predict(pictures[:1], face_box(pictures.shape[1:3]), self.predictor)
            return np.repeat(first, len(pictures), axis=0)
        return predict(pictures, face_box(pictures.shape[1:3]), self.predictor)


class FaceEmbedder:
    """Aligned pictures (N, 3, H, W) uint8 to dlib's vectors (N, 128), each 0.1 s of a core."""

    title = "dlib's face-recognition network"
    every = 15  # frames between two that are embedded

    def __init__(self, landmarks: str = "dlib"):
        import dlib

        self.predictor = load_predictor(landmarks)
        self.network = dlib.face_recognition_model_v1(str(model_file(MODEL)))
        self._seen: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def __call__(self, pictures: Tensor) -> Tensor:
        vectors = []
        for picture in np.ascontiguousarray(pictures.permute(0, 2, 3, 1).cpu().numpy()):
            key = picture.tobytes()
            if key not in self._seen:  # of a still there are many
                self._seen[key] = self._embed(picture)
                if len(self._seen) > 64:
                    self._seen.popitem(last=False)
            vectors.append(self._seen[key])
        return torch.from_numpy(np.stack(vectors))

    def _embed(self, picture: np.ndarray) -> np.ndarray:
        import dlib

        factor = max(1, round(3 * FRAME[1] / picture.shape[1]))
        large = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        box = face_box(large.shape[:2])
        (points,) = predict(large[None], box, self.predictor)
        parts = [dlib.point(*map(round, point)) for point in points.tolist()]
        shape: Any = dlib.full_object_detection(dlib.rectangle(*map(round, box.tolist())), parts)
        chip = dlib.get_face_chip(large, shape, size=CHIP)
        return np.array(self.network.compute_face_descriptor(chip))
