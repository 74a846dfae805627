"""Prepare one clip of a corpus: its face aligned, its sound resampled, in pieces if it is long."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.align import EYES, NoFace, find_face, warp
from train.data.corpus import Source
from train.data.decode import load_pieces
from train.data.landmarks import (
    PLACES,
    align_landmarks,
    eye_centres,
    eye_openness,
    find_landmarks,
    lip_shape,
    load_predictor,
)
from train.data.media import Limits, MediaError, stated_seconds
from train.data.prepared import Clip, write_clip
from train.errors import one_line

SAMPLED = 16  # clips whose length is looked up beforehand
TYPICAL = 3.0  # seconds, where none of them says how long it is
LONGEST_NAME = 255  # bytes of a file's name, on all common file systems
_PIECE = re.compile(r"(.+)-(\d+)of(\d+)", re.DOTALL)


@dataclass(frozen=True)
class _Face:
    """The aligned face of a piece."""

    frames: np.ndarray  # (T, 3, H, W) uint8 RGB
    remarks: list[str]
    known: dict[str, np.ndarray]


def expected_seconds(sources: Sequence[Source]) -> float:
    """Mean length of the clips in seconds, by the headers of a few that have one."""
    some = sources[:: max(1, len(sources) // SAMPLED)]
    known = [seconds for seconds in map(stated_seconds, (s.path for s in some)) if seconds]
    return sum(known) / len(known) if known else TYPICAL


def prepare_first(copies: Sequence[Source], folder: Path, **options: Any) -> list[Path]:
    """Call ``prepare_clip`` with the first of a clip's copies that can be used.

    Those before it are named in a remark. Raises ``MediaError`` if none can be used.
    """
    problems: list[str] = []
    for source in copies:
        remarks = [f"another copy: taken because {'; '.join(problems)}"] if problems else []
        try:
            return prepare_clip(source, folder, remarks=remarks, **options)
        except (MediaError, NoFace) as error:
            name = str(source.path)
            problems.append(f"{name}: {one_line(error).removeprefix(f'{name}: ')}")
    raise MediaError("; ".join(problems))


def prepare_clip(
    source: Source,
    folder: Path,
    *,
    remarks: Sequence[str] = (),
    fps: float,
    sample_rate: int,
    size: tuple[int, int],
    min_frames: int,
    max_frames: int,
    landmarks: str = "haar",
    limits: Limits | None = None,
    places: Sequence[Sequence[float]] | None = None,
) -> list[Path]:
    """Align the face of ``source``, resample its sound, and write it into ``folder``.

    Pictures of another rate are resampled to ``fps``, sound to ``sample_rate`` Hz. A clip of more
    than ``max_frames`` is cut into pieces of so many, NAME-1of2 and NAME-2of2; what is left at its
    end is a piece too unless it has fewer than ``min_frames``, and pieces without a face are left
    out. ``landmarks`` is what ``train.data.landmarks.choose`` returns: ``haar`` aligns by the eyes,
    ``dlib`` or a predictor's path by landmarks, and then the clip says how far its eyes are open
    and what shape its lips have. ``places`` are where ``landmarks.FIVE`` belong in a 96 x 128
    frame, instead of ``landmarks.PLACES``. What was done to the file and what is odd about it is
    stored with the clip, after ``remarks``.

    Returns the files written. Raises ``MediaError`` or ``NoFace`` if the clip cannot be used, or
    breaks ``limits``.
    """

    def align(frames: np.ndarray) -> _Face | NoFace:
        try:
            return _align(frames, size, landmarks, None if places is None else np.array(places))
        except NoFace as error:
            return error

    media = load_pieces(
        source.path,
        sample_rate,
        align,
        fps=fps,
        length=max_frames,
        least=min_frames,
        sound=source.sound,
        limits=limits,
    )
    if media.frames < min_frames:
        why = f"{media.frames} frames, fewer than {min_frames} (truncated?)"
        if abs(media.source_fps - fps) > 0.01:
            why += f"; it has {media.source_fps:.5g} fps, the set {fps:g}"
        raise MediaError(f"{source.path}: {why}")
    faces = [(first, count, face) for first, count, face in media.items if isinstance(face, _Face)]
    if not faces:
        raise next(face for *_, face in media.items if isinstance(face, NoFace))
    remarks, lost = [*remarks, *media.remarks], media.frames - sum(count for _, count, _ in faces)
    if lost:
        tail = media.frames - sum(count for _, count, _ in media.items)
        faceless = len(media.items) - len(faces)
        remarks.append(
            f"left out: {lost / fps:.2f} s"
            + (f", {faceless} pieces without a face" if faceless else "")
            + (f", the last {tail} frames, too few for a piece" if tail else "")
        )
    _file(folder, source.name).parent.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (first, count, face) in enumerate(faces, start=1):
        name, cut = source.name, []
        if media.frames > max_frames and len(media.items) > 1:
            name = f"{source.name}-{number}of{len(faces)}"
            begin, end, whole = (frame / fps for frame in (first, first + count, media.frames))
            cut = [f"cut: {begin:.2f} to {end:.2f} s of {whole:.2f} s"]
        begin, end = (round(frame / fps * sample_rate) for frame in (first, first + count))
        audio = media.audio[begin:end]
        clip = Clip(face.frames, audio, fps, sample_rate, source.speaker, name, face.known)
        path = _file(folder, name)
        write_clip(path, clip, remarks=[*remarks, *cut, *face.remarks])
        written.append(path)
    return written


def _file(folder: Path, name: str) -> Path:
    """The file of a clip; ``MediaError`` if its name would be too long."""
    path = folder / f"{name}.safetensors"
    over = len(os.fsencode(path.name)) - LONGEST_NAME
    if over > 0:
        raise MediaError(f"its name is {over} bytes too long to write {path.suffix} after it")
    return path


def whole_name(name: str) -> tuple[str, int]:
    """Give the name of the clip that ``name`` is a piece of, and its number of pieces."""
    match = _PIECE.fullmatch(name)
    return (match[1], int(match[3])) if match else (name, 1)


def _align(
    frames: np.ndarray, size: tuple[int, int], landmarks: str, places: np.ndarray | None
) -> _Face:
    if landmarks == "haar":
        eyes, centres = find_face(frames), EYES if places is None else eye_centres(places)
        return _Face(warp(frames, eyes.eyes, size, centres), eyes.remarks, {})
    face = find_landmarks(frames, load_predictor(landmarks))
    known = {"eye_openness": eye_openness(face.points), "lips": lip_shape(face.points)}
    faces = align_landmarks(frames, face.points, size, PLACES if places is None else places)
    return _Face(faces, face.remarks, known)
