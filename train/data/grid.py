"""The GRID corpus as it is downloaded: its clips, found and prepared one by one.

Cooke, Barker, Cunningham, Shao, "An audio-visual corpus for speech perception and automatic
speech recognition", JASA 2006: 33 speakers with video, 1000 sentences each, 75 frames at 25 fps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.align import NoFace, find_face, warp
from train.data.landmarks import (
    align_landmarks,
    eye_openness,
    find_landmarks,
    lip_shape,
    load_predictor,
)
from train.data.media import Limits, MediaError, load_media, stated_seconds
from train.data.prepared import Clip, DataError, write_clip
from train.data.splits import natural
from train.errors import one_line

FPS = 25.0
FRAMES = 75
SAMPLED = 16  # clips whose length is looked up beforehand
_VIDEO = {".mpg", ".mpeg", ".mp4", ".avi", ".mov", ".mkv"}


@dataclass(frozen=True)
class Source:
    """One clip of the corpus on disk; speaker and name can be printed, whatever the path holds."""

    path: Path
    speaker: str
    name: str


def find_clips(raw: str | os.PathLike[str]) -> list[Source]:
    """Find the videos under ``raw``, at any depth, in a stable order.

    The speaker is the nearest enclosing folder called s<number>; without one, the enclosing
    folder. So s1/bbaf2n.mpg and s1/video/mpg_6000/bbaf2n.mpg both are bbaf2n of speaker s1.
    Folders and files may be links; what counts is the name of the link, not where it leads.
    """
    raw = Path(raw)
    if not raw.is_dir():
        what = "is not a directory" if raw.exists() else "does not exist"
        raise DataError(f"RAW {raw} {what}; give the folder that holds s1/, s2/, ... with *.mpg")
    paths = [path for path in _files(raw) if path.suffix.lower() in _VIDEO and path.is_file()]
    if not paths:
        raise DataError(f"RAW {raw} holds no video ({', '.join(sorted(_VIDEO))}) at any depth")
    sources = []
    for path in sorted(paths, key=natural):
        folders = [folder.name for folder in Path(os.path.abspath(path)).parents]
        speaker = next((name for name in folders if re.fullmatch(r"s\d+", name)), folders[0])
        sources.append(Source(path, _printable(speaker), _printable(path.stem)))
    return sources


def _printable(name: str) -> str:
    """The name with what is not UTF-8 in it as in an address: the byte E9 becomes ``%E9``."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", name)


def _files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Everything below ``folder`` but folders, through links too, but not round in circles."""
    place = os.path.realpath(folder)
    if place in above:
        return
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror})") from None
    for path in entries:
        if path.is_dir():
            yield from _files(path, above | {place})
        else:
            yield path


def expected_seconds(sources: Sequence[Source]) -> float:
    """Mean length of the clips in seconds, by the headers of a few that have one."""
    some = sources[:: max(1, len(sources) // SAMPLED)]
    known = [seconds for seconds in map(stated_seconds, (s.path for s in some)) if seconds]
    return sum(known) / len(known) if known else FRAMES / FPS


def prepare_first(copies: Sequence[Source], target: Path, **options: Any) -> Path:
    """Call ``prepare_clip`` with the first of a clip's copies that can be used.

    Those before it are named in a remark. Raises ``MediaError`` if none can be used.
    """
    problems: list[str] = []
    for source in copies:
        remarks = [f"another copy: taken because {'; '.join(problems)}"] if problems else []
        try:
            return prepare_clip(source, target, remarks=remarks, **options)
        except (MediaError, NoFace) as error:
            name = str(source.path)
            problems.append(f"{name}: {one_line(error).removeprefix(f'{name}: ')}")
    raise MediaError("; ".join(problems))


def prepare_clip(
    source: Source,
    target: Path,
    *,
    remarks: Sequence[str] = (),
    sample_rate: int,
    size: tuple[int, int],
    min_frames: int = FRAMES,
    landmarks: str = "haar",
    limits: Limits | None = None,
) -> Path:
    """Align the face of ``source``, resample its sound to ``sample_rate`` Hz, write ``target``.

    Pictures of another rate are resampled to ``FPS``. ``landmarks`` is what
    ``train.data.landmarks.choose`` returns: ``haar`` aligns by the eyes, ``dlib`` or a predictor's
    path by landmarks, and then the clip says how far its eyes are open and what shape its lips
    have. What was done to the file and what is odd about it is stored with the clip, after
    ``remarks``.

    Returns ``target``. Raises ``MediaError`` or ``NoFace`` if the clip cannot be used, or breaks
    ``limits``.
    """
    media = load_media(source.path, sample_rate, fps=FPS, limits=limits)
    if len(media.frames) < min_frames:
        why = f"{len(media.frames)} frames, fewer than {min_frames} (truncated?)"
        if abs(media.source_fps - FPS) > 0.01:
            why += f"; it has {media.source_fps:.5g} fps, GRID has {FPS:g}"
        raise MediaError(f"{source.path}: {why}")
    known = {}
    if landmarks == "haar":
        eyes = find_face(media.frames)
        faces, seen = warp(media.frames, eyes.eyes, size), eyes.remarks
    else:
        face = find_landmarks(media.frames, load_predictor(landmarks))
        faces, seen = align_landmarks(media.frames, face.points, size), face.remarks
        known = {"eye_openness": eye_openness(face.points), "lips": lip_shape(face.points)}
    clip = Clip(faces, media.audio, FPS, sample_rate, source.speaker, source.name, known)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_clip(target, clip, remarks=[*remarks, *media.remarks, *seen])
    return target
