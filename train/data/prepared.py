"""Prepared clips: one safetensors file per clip, a manifest, and the dataset that reads them.

    ROOT/manifest.json                        what is there and with which settings it was made
    ROOT/clips/<speaker>/<name>.safetensors   frames uint8 (T, 3, H, W), audio int16 (N,)

Frames are stored raw so that any run of frames is read without decoding the rest: a clip of
75 frames at 128 x 96 takes 2.8 MB, 33 000 clips of GRID 92 GB (a quarter of it at 64 x 48).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from train.data.augment import PictureChange
from train.errors import UserError
from train.fields import (
    COUNT,
    FLAG,
    NAME,
    OBJECT,
    POSITIVE,
    STEP,
    TEXT,
    Kind,
    list_of,
    one_of,
    wrong_field,
)
from train.files import write_atomically
from train.tensors import CHECKSUMS, checksums, compare

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
PREPARE_HINT = "make it with: python -m train.prepare grid RAW {root} (or: synthetic {root})"
_HEADER = "clip"
_TRUTH = "truth."
EYES = "truth.eye_openness"  # (T,) from 0 (shut) to 1
LIPS = "truth.lips"  # (T, 3), see train.data.landmarks.lip_shape
_AUDIO_SCALE = 32768.0
_FIELDS = {
    "source": TEXT,
    "fps": POSITIVE,
    "sample_rate": COUNT,
    "size": list_of(COUNT, 2),
    "settings": OBJECT,
    "complete": FLAG,
    "clips": Kind("a list", lambda value: isinstance(value, list)),
}
_HEADER_FIELDS = {
    "fps": POSITIVE,
    "sample_rate": COUNT,
    "speaker": NAME,
    "name": NAME,
    "remarks": list_of(TEXT),
}
_CLIP_FIELDS = {
    "name": NAME,
    "speaker": NAME,
    "split": one_of("train", "val", "test"),
    "file": TEXT,
    "frames": COUNT,
    "samples": COUNT,
    "remarks": list_of(TEXT),
    "checksum": STEP,
}


class DataError(UserError):
    """Prepared data is missing, damaged or unsuitable; the message says what and what to do."""


@dataclass(frozen=True)
class Clip:
    """One talking-face clip: aligned frames and the sound that goes with them.

    Sample 0 of the audio is heard when frame 0 is shown.
    """

    frames: np.ndarray  # (T, 3, H, W) uint8 RGB
    audio: np.ndarray  # (N,) float32 in [-1, 1], mono
    fps: float
    sample_rate: int  # Hz
    speaker: str
    name: str
    truth: dict[str, np.ndarray] = field(default_factory=dict)  # what else is known of its frames


def write_clip(path: str | os.PathLike[str], clip: Clip, remarks: Sequence[str] = ()) -> None:
    """Write ``clip`` as one safetensors file; either the whole file appears at ``path`` or nothing.

    Audio is rounded to 16 bits and clipped to [-1, 1). ``remarks`` say how the clip was made and
    what is odd about it, each as "kind: details"; ``read_header`` gives them back.
    """
    frames, audio = np.asarray(clip.frames), np.asarray(clip.audio)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        raise DataError(
            f"clip {clip.name}: frames must be uint8 (T, 3, H, W), "
            f"got {frames.dtype} {tuple(frames.shape)}"
        )
    if audio.ndim != 1 or not np.isfinite(audio).all():
        raise DataError(
            f"clip {clip.name}: audio must be finite and mono (N,), got shape {audio.shape}"
        )
    pcm = np.clip(np.rint(audio * _AUDIO_SCALE), -_AUDIO_SCALE, _AUDIO_SCALE - 1).astype(np.int16)
    header = {
        "fps": float(clip.fps),
        "sample_rate": int(clip.sample_rate),
        "speaker": clip.speaker,
        "name": clip.name,
        "remarks": list(remarks),
    }
    tensors = {"frames": np.ascontiguousarray(frames), "audio": pcm}
    for key, value in clip.truth.items():
        tensors[_TRUTH + key] = np.ascontiguousarray(value)
    recorded = {CHECKSUMS: checksums({_HEADER: json.dumps(header), **tensors})}
    # one entry: several would come in any order, and equal clips make equal files
    metadata = {_HEADER: json.dumps({**header, **recorded})}
    write_atomically(path, save(tensors, metadata=metadata))


def read_clip(path: str | os.PathLike[str]) -> Clip:
    """Read a whole clip written by :func:`write_clip`; ``DataError`` if it is no whole one."""
    with _open_clip(path) as (file, header):
        _compare(file, header)
        return Clip(
            frames=file.get_tensor("frames"),
            audio=_to_float(file.get_tensor("audio")),
            truth={
                key.removeprefix(_TRUTH): file.get_tensor(key)
                for key in sorted(file.keys())
                if key.startswith(_TRUTH)
            },
            **{key: header[key] for key in ("fps", "sample_rate", "speaker", "name")},
        )


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read fps, sample_rate, speaker, name, remarks, frames (T), samples (N), size [H, W].

    "checksum" is one of all these and of the checksums of the tensors: it tells clips apart without
    reading their frames.
    """
    with _open_clip(path) as (file, header):
        frames = file.get_slice("frames").get_shape()
        samples = file.get_slice("audio").get_shape()[0]
        shape = {"frames": frames[0], "samples": samples, "size": frames[2:]}
        header = {key: value for key, value in header.items() if key != CHECKSUMS}
        return {"remarks": [], **header, **shape, "checksum": _checksum(file)}


def _checksum(file: Any) -> int:
    return zlib.crc32(file.metadata()[_HEADER].encode())


def _compare(file: Any, header: dict[str, Any]) -> None:
    """Raise ``Damaged`` unless an open clip file has the content that its checksums tell."""
    if CHECKSUMS in header:
        told = {key: value for key, value in header.items() if key != CHECKSUMS}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        compare(header[CHECKSUMS], {_HEADER: json.dumps(told), **tensors})


@contextmanager
def _open_clip(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a clip file, give (tensors, header), and turn what is wrong with it into one line."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            wrong = wrong_field(header, _HEADER_FIELDS)
            missing = (
                _HEADER_FIELDS.keys() - {"remarks", CHECKSUMS} - header.keys() if not wrong else ()
            )
            if wrong or missing:
                raise ValueError(wrong or f"it does not tell {', '.join(sorted(missing))}")
            if [len(file.get_slice(key).get_shape()) for key in ("frames", "audio")] != [4, 1]:
                raise ValueError("frames or audio of another shape")
            yield file, header
    except FileNotFoundError:
        raise DataError(f"clip file {path} does not exist") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable clip file (damaged or of another kind: {error}); "
            "delete it and prepare again"
        ) from None


def _to_float(pcm: np.ndarray) -> np.ndarray:
    return pcm.astype(np.float32) / np.float32(_AUDIO_SCALE)


def read_manifest(root: str | os.PathLike[str], hint: str = PREPARE_HINT) -> dict[str, Any]:
    """Read and check ROOT/manifest.json; ``DataError`` names what is wrong and what to do."""
    root = Path(root)
    hint = hint.format(root=root)
    path = root / MANIFEST
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        raise DataError(f"prepared set {root} {what}; {hint}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{root} holds no {MANIFEST}, so it is no prepared set; {hint}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}); {hint}") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != MANIFEST_VERSION:
        raise DataError(f"{path} has version {version}, expected {MANIFEST_VERSION}; {hint}")
    clip_keys = {"name", "speaker", "split", "file", "frames", "samples"}
    missing = {"fps", "sample_rate", "size", "clips"} - manifest.keys()
    wrong = wrong_field(manifest, _FIELDS)
    entries = [] if missing or wrong else manifest["clips"]
    for number, entry in enumerate(entries):
        wrong = wrong or wrong_field(entry, _CLIP_FIELDS, f"clips[{number}]")
        missing |= clip_keys - entry.keys() if not wrong else set()
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}; {hint}")
    wrong = wrong or _outside(root, entries)
    if wrong:
        raise DataError(f"{path}: {wrong}; {hint}")
    return manifest


def _outside(root: Path, entries: list[dict[str, Any]]) -> str | None:
    """Say which entry's file is not below ``root``, through links or by its name."""
    home = root.resolve()
    inside: set[Path] = set()  # folders: a clip itself is only followed if it is a link
    for number, entry in enumerate(entries):
        path = root / entry["file"]
        told = f"clips[{number}].file is {entry['file']}, expected a file inside {root}"
        if (
            "\0" in entry["file"]
            or Path(entry["file"]).is_absolute()
            or ".." in Path(entry["file"]).parts
        ):
            return told
        if path.parent not in inside and not path.parent.resolve().is_relative_to(home):
            return told
        inside.add(path.parent)
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            return told
    return None


def read_alignment(root: str | os.PathLike[str]) -> str:
    """Read how a set was aligned: ``haar``, ``dlib`` or a predictor's path; ``none`` if drawn."""
    return str(read_manifest(root).get("settings", {}).get("landmarks", "none"))


def read_identity(root: str | os.PathLike[str], hint: str = PREPARE_HINT) -> str:
    """Read what a set is, wherever it lies: a digest of its settings and of its clips' names,
    splits and lengths. Sets prepared alike from the same corpus are the same."""
    manifest = read_manifest(root, hint)
    keys = ("speaker", "name", "split", "frames", "samples")
    clips = sorted([entry[key] for key in keys] for entry in manifest["clips"])
    what = [manifest.get("settings"), clips]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def read_places(root: str | os.PathLike[str]) -> tuple[tuple[float, float], ...] | None:
    """Read to which places the faces of a set were aligned, if not to the usual ones."""
    places = read_manifest(root).get("settings", {}).get("places")
    return None if places is None else tuple((float(x), float(y)) for x, y in places)


class PreparedSet(torch.utils.data.Dataset):
    """The clips of one split of a prepared set, cropped to a fixed length.

    Args:
        root: directory made by ``python -m train.prepare``.
        split: "train", "val" or "test"; None for all clips.
        size: (H, W) to which frames are reduced by area averaging; None keeps the stored size.
        frames: T, the length of the contiguous crop; shorter clips are left out and counted in
            ``skipped``. None gives whole clips, which only batch if their lengths agree.
        seed, random_crop, mirror: the crop starts at frame 0, or anywhere with ``random_crop``;
            ``mirror`` flips left and right with probability 1/2. Both are functions of
            (seed, index) only. Indices count on over the epochs: epoch * len(clips) + index is
            the clip ``index`` with that epoch's crop.
        limit: keep the first ``limit`` clips only.
        any_still: give a frame drawn from the whole clip as the item's still, not the crop's first.
        augment: change every item's picture as ``PictureChange`` does.
        context: C, frames of sound to give beyond both ends of the crop.
        eyes: give how far the eyes are closed, for sets whose clips know it.
        lips: give the shape of the lips, likewise.

    Items are dict(frames=(T, 3, H, W) uint8, still=(3, H, W) uint8, index=int,
    audio=((T + 2 C) * window_stride,) float32), eyes=(T,) float32 from 0 (open) to 1, and
    lips=(T, 3) float32.
    The crop starting at frame t0 has the samples [t0 - C, t0 + T + C) * window_stride, with
    window_stride = floor(sample_rate / fps); sound beyond the clip's ends is silence.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = "train",
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        seed: int = 0,
        random_crop: bool = False,
        mirror: bool = False,
        limit: int | None = None,
        any_still: bool = False,
        augment: bool = False,
        context: int = 0,
        eyes: bool = False,
        lips: bool = False,
    ) -> None:
        self.root = Path(root)
        manifest = read_manifest(root)
        self.fps = float(manifest["fps"])
        self.sample_rate = int(manifest["sample_rate"])
        self.stored_size = (int(manifest["size"][0]), int(manifest["size"][1]))
        self.size = self.stored_size if size is None else (int(size[0]), int(size[1]))
        self.window_stride = math.floor(self.sample_rate / self.fps)
        self.frames, self.seed, self.random_crop, self.mirror = frames, seed, random_crop, mirror
        self.any_still, self.augment, self.context = any_still, augment, context
        self.eyes, self.lips = eyes, lips

        if not all(0 < new <= old for new, old in zip(self.size, self.stored_size, strict=True)):
            raise DataError(
                f"{root} holds frames of {_by(self.stored_size)} and cannot give {_by(self.size)}; "
                f"ask for a smaller size or prepare again with --size {_by(self.size, ' ')}"
            )
        if not manifest.get("complete", True):
            raise DataError(
                f"the preparation of {root} was stopped early; run the same command again, "
                "finished clips are kept"
            )
        if seed < 0:
            raise DataError(f"seed must not be negative, got {seed}")
        if frames is not None and frames < 1:
            raise DataError(f"frames must be at least 1, got {frames}")
        if limit is not None and limit < 1:
            raise DataError(f"limit must be at least 1, got {limit}")
        entries = manifest["clips"]
        if split is not None:
            known = sorted({entry["split"] for entry in entries})
            entries = [entry for entry in entries if entry["split"] == split]
            if not entries:
                raise DataError(
                    f"{root} has no split {split!r}; it has {', '.join(known) or 'no clips'}"
                )
        long_enough = [entry for entry in entries if entry["frames"] >= (frames or 1)]
        self.skipped = len(entries) - len(long_enough)
        self.clips: list[dict[str, Any]] = long_enough[:limit]
        if not self.clips:
            longest = max((entry["frames"] for entry in entries), default=0)
            raise DataError(
                f"no clip of {root} (split {split}) has {frames or 1} frames, "
                f"the longest has {longest}; ask for fewer frames"
            )
        for entry in self.clips:
            if not (self.root / entry["file"]).is_file():
                raise DataError(
                    f"clip file {self.root / entry['file']} is missing; prepare the set again"
                )
        self.speakers = sorted({entry["speaker"] for entry in self.clips})
        self._checked: set[str] = set()  # files

    def _check(self, entry: dict[str, Any], file: Any, header: dict[str, Any]) -> None:
        """Check a clip file when this process first reads it; ``DataError`` if it is another one.

        That reads all of it, which takes 1.5 ms for a clip of 3 s.
        """
        path = self.root / entry["file"]
        if entry["file"] in self._checked:
            return
        told = {"fps": self.fps, "sample_rate": self.sample_rate}
        told |= {key: entry[key] for key in ("speaker", "name", "frames", "samples")}
        frames, audio = (file.get_slice(key).get_shape() for key in ("frames", "audio"))
        found = {**header, "frames": frames[0], "samples": audio[0]}
        for key, value in told.items():
            if found[key] != value:
                raise DataError(
                    f"{path} does not match the manifest: its {key} is {found[key]}, not {value}; "
                    "prepare the set again"
                )
        if entry.get("checksum", _checksum(file)) != _checksum(file):
            raise DataError(
                f"{path} does not match the manifest: its checksum differs; prepare the set again"
            )
        _compare(file, header)
        for key in file.keys():  # noqa: SIM118
            if key.startswith(_TRUTH) and not np.isfinite(file.get_tensor(key)).all():
                raise DataError(f"{path}: {key} has a value that is not finite")
        self._checked.add(entry["file"])

    def clip(self, index: int) -> Clip:
        """Read the whole clip as stored, with its ground truth: no crop, resizing or mirroring."""
        entry = self.clips[index]
        with _open_clip(self.root / entry["file"]) as (file, header):
            self._check(entry, file, header)
        return read_clip(self.root / entry["file"])

    def __len__(self) -> int:
        return len(self.clips)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < 0:
            raise IndexError(f"clip index {index} is negative")
        epoch, index = divmod(index, len(self.clips))
        entry = self.clips[index]
        length = self.frames or entry["frames"]
        rng = np.random.default_rng([self.seed, epoch, index])
        start = int(rng.integers(entry["frames"] - length + 1)) if self.random_crop else 0
        flip = self.mirror and rng.random() < 0.5
        shown = int(rng.integers(entry["frames"])) if self.any_still else start
        first, count = (start - self.context) * self.window_stride, length + 2 * self.context
        audio = np.zeros(count * self.window_stride, dtype=np.float32)
        path = self.root / entry["file"]
        with _open_clip(path) as (file, header):
            self._check(entry, file, header)
            stored = file.get_slice("frames")
            frames, still = stored[start : start + length], stored[shown : shown + 1]
            begin, end = max(first, 0), min(first + len(audio), entry["samples"])
            if begin < end:
                pcm = file.get_slice("audio")[begin:end]
                audio[begin - first : begin - first + len(pcm)] = _to_float(pcm)
            known = {}
            if self.eyes:
                known["eyes"] = 1 - _measured(file, path, EYES, "eyes")[start : start + length]
            if self.lips:
                known["lips"] = _measured(file, path, LIPS, "lips")[start : start + length]
        if frames.shape != (length, 3, *self.stored_size):
            raise DataError(f"{path} does not match the manifest; prepare the set again")
        frames = np.concatenate([still, frames])
        if self.size != self.stored_size:
            frames = _reduce(frames, self.size)
        if self.augment:
            frames = PictureChange.draw(rng, self.size)(frames)
        if flip:
            frames = np.ascontiguousarray(frames[..., ::-1])
        item = {
            "frames": torch.from_numpy(frames[1:]),
            "still": torch.from_numpy(frames[0]),
            "audio": torch.from_numpy(audio),
            "index": index,
        }
        return item | {name: torch.from_numpy(values) for name, values in known.items()}


def _measured(file: Any, path: Path, key: str, option: str) -> Any:
    """What a clip file knows of its frames under ``key``; ``DataError`` if it does not."""
    if key not in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
        raise DataError(
            f"{path} does not say how its {option} are, which --model.{option} learns from; "
            f"prepare the set with --landmarks dlib, or leave --model.{option} out"
        )
    return file.get_slice(key)


def _reduce(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Area-average (T, 3, H, W) uint8 to ``size``."""
    height, width = size
    reduced = np.empty((*frames.shape[:2], height, width), dtype=np.uint8)
    for planes, target in zip(frames, reduced, strict=True):
        for plane, small in zip(planes, target, strict=True):
            cv2.resize(plane, (width, height), dst=small, interpolation=cv2.INTER_AREA)
    return reduced


def _by(size: tuple[int, int], separator: str = " x ") -> str:
    return separator.join(map(str, size))
