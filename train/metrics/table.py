"""The columns of the paper's Table 1, measured on videos and their real counterparts.

A column without a value carries the reason. The networks behind ACD and AV sync are named in every
row, for numbers of two networks cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from train.data.landmarks import INSTALL, eye_aspect_ratio
from train.metrics.blinks import blink_scores, synthetic_ear
from train.metrics.cpbd import cpbd_score
from train.metrics.faces import FaceEmbedder, FaceReader
from train.metrics.identity import OurEmbedder, identity_scores
from train.metrics.mouth import mouth_box, mouth_psnr, mouth_scores
from train.metrics.quality import quality_scores
from train.metrics.score import MetricError, Score, mean_score
from train.metrics.sync import SILENCE, TwoStream, sync_scores


@dataclass(frozen=True)
class Column:
    """A column of the table: its key in a row, its title, how to print it, which way is better."""

    key: str
    title: str
    form: str
    better: str = ""  # "max", "min", or "" where neither end is better
    meter: str = ""  # what measures it, a key of `Meters.titles`


COLUMNS = (
    Column("psnr", "PSNR, dB", ".3f", "max"),
    Column("ssim", "SSIM", ".4f", "max"),
    Column("mouth_psnr", "mouth PSNR, dB", ".2f", "max", "mouth"),
    Column("lmd", "LMD, %", ".2f", "min", "mouth"),
    Column("mouth_amplitude", "mouth amplitude", ".2f", "", "mouth"),
    Column("mouth_correlation", "mouth correlation", ".2f", "max", "mouth"),
    Column("cpbd", "CPBD", ".3f"),
    Column("acd", "ACD", ".3f", "min", "acd"),
    Column("acd_squared", "ACD²/E", ".2e", "min", "acd"),
    Column("av_offset", "AV offset", ".0f", "", "av"),
    Column("av_confidence", "AV conf. (LSE-C)", ".2f", "max", "av"),
    Column("av_distance", "AV distance (LSE-D)", ".2f", "min", "av"),
    Column("blinks_per_s", "blinks/s", ".2f", "", "blinks"),
    Column("blink_duration", "blink, s", ".2f", "", "blinks"),
)
Row = dict[str, Score]  # by Column.key
MOUTH_KEYS = tuple(column.key for column in COLUMNS if column.meter == "mouth")
NO_SOUND = "the video has no sound"
NO_READER = f"no landmarks without dlib: {INSTALL}"


@dataclass(frozen=True)
class Pair:
    """A video to measure and the real one. Frames (T, 3, H, W) uint8; audio (N,) in [-1, 1], of no
    samples if there is no sound."""

    made: Tensor
    real: Tensor
    audio: np.ndarray
    fps: float
    sample_rate: int
    name: str = ""
    speaker: str = ""


@dataclass(frozen=True)
class Meters:
    """What measures beside the pictures themselves; None leaves dashes.

    ``eyes`` says that the faces are those of the built-in set, whose eyes ``synthetic_ear`` reads.
    ``no_faces`` is the reason why there is no reader of ``faces``.
    """

    embedder: OurEmbedder | FaceEmbedder | None = None
    syncnet: TwoStream | None = None
    eyes: bool = False
    masked: bool = False
    faces: FaceReader | None = None
    no_faces: str = NO_READER

    def titles(self) -> dict[str, str | None]:
        """What to print beside the numbers."""
        reader = getattr(self.faces, "title", None)
        return {
            "mouth": reader,
            "acd": getattr(self.embedder, "title", None),
            "av": getattr(self.syncnet, "title", None),
            "blinks": "eyes read off the built-in faces" if self.eyes else reader,
        }


class Tally:
    """A row in the making: one clip after the other is measured, then the row is told.

    A row has the mean over the speakers of each one's mean over clips, the median of the AV offset
    over all clips, and the blinks over all clips. On the built-in set these are measured from and
    to 90 % of the openness, which is true to a frame there; on real faces by the authors' detector
    from peak to peak (see ``train.metrics.blinks``).
    """

    def __init__(self, meters: Meters):
        self.meters = meters
        self.found: dict[str, list[tuple[str, Score]]] = {column.key: [] for column in COLUMNS}
        self.ears: list[np.ndarray] = []
        self.eyeless: list[Score] = []
        self.left_out: list[Score] = []
        self.silent, self.count, self.fps = 0, 0, 25.0

    def add(self, pair: Pair) -> None:
        """Measure a clip; MetricError names the one that cannot be measured."""
        try:
            scores = _measure_clip(pair, self.meters)
        except MetricError as error:
            raise MetricError(f"{pair.name}: {error}" if pair.name else str(error)) from None
        for key, score in scores.items():
            if key in self.found:
                self.found[key].append((pair.speaker or pair.name, score))
        ear = _ear(pair.made, self.meters)
        if isinstance(ear, Score):
            self.eyeless.append(ear)
        elif ear is not None:
            self.ears.append(ear)
        self.silent += (
            len(pair.audio) > 0
            and float(np.sqrt(np.mean(np.square(pair.audio, dtype=np.float64)))) < SILENCE
        )
        self.count, self.fps = self.count + 1, pair.fps

    def leave_out(self, reason: str) -> None:
        """Count a clip for which there is nothing to measure."""
        self.left_out.append(Score(None, reason))

    def row(self) -> Row:
        """What was measured; MetricError for no clips, or a SyncNet and not one clip with sound."""
        meters = self.meters
        if not self.count:
            if not self.left_out:
                raise MetricError("no clips to measure")
            return dict.fromkeys(self.found, Score(None, self.left_out[0].reason))
        if meters.syncnet is not None and self.silent == self.count:
            raise MetricError(
                "every clip is silent: AV offset and confidence need sound; leave the SyncNet out"
            )
        row = {
            key: speaker_mean(scores, self.left_out) for key, scores in self.found.items() if scores
        }
        if self.found["av_offset"]:
            offsets = [score for _, score in self.found["av_offset"]]
            row["av_offset"] = median_score(offsets + self.left_out)
        missing = {
            "acd": "no identity embedder given; make one with `python -m train.embedder`",
            "av": "no SyncNet given; make one with `python -m train.syncnet`",
            "mouth": meters.no_faces,
            "blinks": meters.no_faces,
        }
        for column in COLUMNS:
            if column.key not in row and column.meter in missing:
                row[column.key] = Score(None, missing[column.meter])
        edges: Literal["level", "peak"] = "level" if meters.eyes else "peak"
        if self.ears:
            lost = self.eyeless + self.left_out
            note = mean_score([*lost, *[Score(0.0)] * len(self.ears)]).reason
            blinks = blink_scores(self.ears, fps=self.fps, edges=edges)
            row |= {key: Score(score.value, score.reason or note) for key, score in blinks.items()}
        elif self.eyeless:
            row |= dict.fromkeys(("blinks_per_s", "blink_duration"), mean_score(self.eyeless))
        return row


def _ear(made: Tensor, meters: Meters) -> np.ndarray | Score | None:
    """How open the eyes are, frame by frame; why that cannot be said; None if nothing reads it."""
    if meters.eyes:
        return synthetic_ear(made)[0]
    if meters.faces is None:
        return None
    points = meters.faces.read(made)
    return points if isinstance(points, Score) else eye_aspect_ratio(points)


def _measure_clip(pair: Pair, meters: Meters) -> Row:
    if len(pair.made) < 2:
        raise MetricError("a single frame is no video; expected at least 2 frames")
    scores = cpbd_score(pair.made)
    if pair.made is not pair.real:
        scores |= quality_scores(pair.made, pair.real)
    if meters.faces is not None:
        scores |= _measure_mouth(pair, meters.faces)
    if pair.made is pair.real:
        same = Score(None, "the real video itself")
        scores |= dict.fromkeys(("psnr", "ssim", *MOUTH_KEYS), same)
    if meters.embedder is not None:
        scores |= _measure_identity(pair, meters)
    if meters.syncnet is not None and not len(pair.audio):
        scores |= {c.key: Score(None, NO_SOUND) for c in COLUMNS if c.meter == "av"}
    elif meters.syncnet is not None:
        scores |= sync_scores(
            meters.syncnet,
            pair.made,
            pair.audio,
            fps=pair.fps,
            sample_rate=pair.sample_rate,
            masked=meters.masked,
        )
    return scores


def _measure_mouth(pair: Pair, reader: FaceReader) -> Row:
    """The columns of the mouth; none of them where the real clip shows no face."""
    real, made = reader.read(pair.real), reader.read(pair.made)
    if isinstance(real, Score):
        return dict.fromkeys(MOUTH_KEYS, Score(None, f"real video: {real.reason}"))
    height, width = pair.real.shape[-2:]
    box = mouth_box(real, (height, width))
    scores = {"mouth_psnr": mouth_psnr(pair.made, pair.real, box)}
    if isinstance(made, Score):
        return dict.fromkeys(MOUTH_KEYS, made) | scores
    return scores | mouth_scores(made, real)


def _measure_identity(pair: Pair, meters: Meters) -> Row:
    """ACD, if the network's own detector would see a face."""
    embedder = meters.embedder
    if isinstance(embedder, FaceEmbedder) and meters.faces is not None:
        face = meters.faces.read(pair.made)
        if isinstance(face, Score):
            return dict.fromkeys(("acd", "acd_squared"), face)
        return identity_scores(embedder, pair.real[0], pair.made[:: embedder.every])
    assert embedder is not None
    return identity_scores(embedder, pair.real[0], pair.made)


def speaker_mean(scores: list[tuple[str, Score]], left_out: Sequence[Score] = ()) -> Score:
    """Mean over the speakers of (speaker, score), with what ``mean_score`` says of the others."""
    summary = mean_score([*(score for _, score in scores), *left_out])
    by_speaker: dict[str, list[float]] = {}
    for speaker, score in scores:
        if score.value is not None:
            by_speaker.setdefault(speaker, []).append(score.value)
    if not by_speaker:
        return summary
    means = [math.fsum(values) / len(values) for values in by_speaker.values()]
    return Score(math.fsum(means) / len(means), summary.reason)


def median_score(scores: list[Score]) -> Score:
    """Median of the scores that have a value, with what ``mean_score`` says of the others."""
    summary = mean_score(scores)
    values = [score.value for score in scores if score.value is not None]
    return Score(float(torch.tensor(values).median()), summary.reason) if values else summary


def to_json(row: Row) -> dict[str, dict[str, Any]]:
    """A row as plain JSON values."""
    return {key: {"value": score.value, "reason": score.reason} for key, score in row.items()}


def from_json(values: dict[str, dict[str, Any]]) -> Row:
    """The inverse of ``to_json``."""
    return {key: Score(score["value"], score["reason"]) for key, score in values.items()}
