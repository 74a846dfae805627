"""The GRID corpus as it is downloaded: finding its clips, splitting its speakers, preparing a clip.

Cooke, Barker, Cunningham, Shao, "An audio-visual corpus for speech perception and automatic
speech recognition", JASA 2006: 33 speakers with video, 1000 sentences each, 75 frames at 25 fps.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .align import locate_eyes, warp
from .landmarks import align_landmarks, find_landmarks, load_predictor
from .media import MediaError, read_media
from .prepared import Clip, DataError, write_clip

FPS = 25.0
FRAMES = 75
SPLITS = {"train": 16, "val": 7, "test": 10}  # speakers of each, the proportions of Vougioukas
EYES_GUESSED = "eyes not found, placed by the face box"
_VIDEO = {".mpg", ".mpeg", ".mp4", ".avi", ".mov", ".mkv"}


@dataclass(frozen=True)
class Source:
    """One clip of the corpus on disk."""

    path: Path
    speaker: str
    name: str


def find_clips(raw: str | os.PathLike[str]) -> list[Source]:
    """Finds the videos under `raw`, at any depth, in a stable order.

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
    for path in sorted(paths, key=_natural):
        folders = [folder.name for folder in Path(os.path.abspath(path)).parents]
        speaker = next((name for name in folders if re.fullmatch(r"s\d+", name)), folders[0])
        sources.append(Source(path, speaker, path.stem))
    return sources


def _files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Everything below `folder` that is no folder, through links too, but not round in circles."""
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


def prepare_clip(
    source: Source,
    target: Path,
    *,
    sample_rate: int,
    size: tuple[int, int],
    min_frames: int = FRAMES,
    landmarks: str = "haar",
) -> Path:
    """Align the face of `source`, resample its sound to `sample_rate` Hz and write `target`.

    `landmarks` is what `train.data.landmarks.choose` returns: `haar` aligns by the eyes, `dlib` or
    a predictor's path by landmarks.

    Returns `target`. Raises `MediaError` or `NoFace` if the clip cannot be used.
    """
    frames, fps, audio = read_media(source.path, sample_rate)
    if abs(fps - FPS) > 0.01:
        raise MediaError(f"{source.path}: {fps:g} fps, GRID has {FPS:g}")
    if len(frames) < min_frames:
        raise MediaError(
            f"{source.path}: {len(frames)} frames, fewer than {min_frames} (truncated?)"
        )
    if landmarks == "haar":
        eyes, found = locate_eyes(frames)
        faces, note = warp(frames, eyes, size), "" if found else EYES_GUESSED
    else:
        face = find_landmarks(frames, load_predictor(landmarks))
        faces, note = align_landmarks(frames, face.points, size), face.note
    clip = Clip(faces, audio, FPS, sample_rate, source.speaker, source.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_clip(target, clip, note=note)
    return target


def draw_splits(clips: Collection[tuple[str, str]], seed: int) -> dict[tuple[str, str], str]:
    """Assigns (speaker, name) pairs to train, val and test in the proportions 16 : 7 : 10.

    Whole speakers are assigned, at least one to val and to test, the one with most clips to train.
    One or two speakers cannot be kept apart: then the clips are split instead, and val and test
    show faces that were trained on.
    """
    counts = Counter(speaker for speaker, _ in clips)
    if len(counts) < 3:
        return _divide(sorted(clips), None, seed)
    speakers = sorted(counts, key=_natural)
    split = _divide(speakers, max(speakers, key=counts.__getitem__), seed)
    return {(speaker, name): split[speaker] for speaker, name in clips}


def read_splits(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads {"train": [speakers], "val": [...], "test": [...]} as speaker -> split."""
    expected = 'expected {"train": ["s1", ...], "val": [...], "test": [...]}'
    try:
        lists = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read splits {path} ({error.strerror}); {expected}") from None
    except ValueError as error:
        raise DataError(f"splits {path} is not JSON ({error}); {expected}") from None
    if (
        not isinstance(lists, dict)
        or lists.keys() - SPLITS
        or not all(isinstance(speakers, list) for speakers in lists.values())
    ):
        raise DataError(f"splits {path} has another form; {expected}")
    pairs = [(str(speaker), split) for split, speakers in lists.items() for speaker in speakers]
    twice = [speaker for speaker, n in Counter(speaker for speaker, _ in pairs).items() if n > 1]
    if twice:
        raise DataError(f"splits {path} names {', '.join(twice)} more than once")
    return dict(pairs)


def _divide(items: list, first: object, seed: int) -> dict:
    """Shuffles `items`, brings `first` to the front, cuts them into the splits."""
    order = [items[i] for i in np.random.default_rng(seed).permutation(len(items))]
    order.sort(key=lambda item: item != first)
    whole = sum(SPLITS.values())
    val, test = (
        max(1, round(len(items) * SPLITS[split] / whole)) if len(items) > 2 else 0
        for split in ("val", "test")
    )
    names = ["train"] * (len(items) - val - test) + ["val"] * val + ["test"] * test
    return dict(zip(order, names, strict=True))


def _natural(value: object) -> list:
    """Sorting key that puts s2 before s10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(value))]
