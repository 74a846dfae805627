"""The columns of the paper's Table 1, measured on videos and their real counterparts.

A column without a value carries the reason. The networks behind ACD and AV sync are named in every
row, for numbers of two networks cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.metrics.blinks import blink_scores, synthetic_ear
from train.metrics.cpbd import cpbd_score
from train.metrics.identity import OurEmbedder, identity_scores
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
    Column("cpbd", "CPBD", ".3f"),
    Column("acd", "ACD", ".3f", "min", "acd"),
    Column("acd_squared", "ACD²/E", ".2e", "min", "acd"),
    Column("av_offset", "AV offset", ".0f", "", "av"),
    Column("av_confidence", "AV conf.", ".2f", "max", "av"),
    Column("blinks_per_s", "blinks/s", ".2f", "", "blinks"),
    Column("blink_duration", "blink, s", ".2f", "", "blinks"),
)
Row = dict[str, Score]  # by Column.key


@dataclass(frozen=True)
class Pair:
    """A video to measure and the real one. Frames (T, 3, H, W) uint8; audio (N,) in [-1, 1]."""

    made: Tensor
    real: Tensor
    audio: np.ndarray
    fps: float
    sample_rate: int
    name: str = ""


@dataclass(frozen=True)
class Meters:
    """What measures beside the pictures themselves; None leaves dashes.

    `eyes` says that the faces are those of the built-in set, whose eyes `synthetic_ear` can read.
    """

    embedder: OurEmbedder | None = None
    syncnet: TwoStream | None = None
    eyes: bool = False
    masked: bool = False

    def titles(self) -> dict[str, str | None]:
        """What to print beside the numbers."""
        return {
            "acd": getattr(self.embedder, "title", None),
            "av": getattr(self.syncnet, "title", None),
            "blinks": "eyes read off the built-in faces" if self.eyes else None,
        }


def measure(pairs: Iterable[Pair], meters: Meters) -> Row:
    """One row: means over the clips, the median of the AV offset, blinks over all clips.

    Blinks are measured from and to 90 % of the openness, which is true to a frame on the built-in
    set (see `train.metrics.blinks`). MetricError names the clip whose video cannot be measured, or
    says that no clip of the set has any sound though there is a SyncNet.
    """
    found: dict[str, list[Score]] = {column.key: [] for column in COLUMNS}
    ears: list[np.ndarray] = []
    eyeless: list[Score] = []
    silent, count, fps = 0, 0, 25.0
    for pair in pairs:
        try:
            scores = _measure_clip(pair, meters)
        except MetricError as error:
            raise MetricError(f"{pair.name}: {error}" if pair.name else str(error)) from None
        for key, score in scores.items():
            if key in found:
                found[key].append(score)
        if meters.eyes:
            (ear,) = synthetic_ear(pair.made)
            (eyeless if isinstance(ear, Score) else ears).append(ear)  # type: ignore[arg-type]
        silent += float(np.sqrt(np.mean(np.square(pair.audio, dtype=np.float64)))) < SILENCE
        count, fps = count + 1, pair.fps
    if not count:
        raise MetricError("no clips to measure")
    if meters.syncnet is not None and silent == count:
        raise MetricError(
            "every clip is silent: AV offset and confidence need sound; leave the SyncNet out"
        )
    row = {key: mean_score(scores) for key, scores in found.items() if scores}
    if found["av_offset"]:
        row["av_offset"] = median_score(found["av_offset"])
    if meters.embedder is None:
        missing = "no identity embedder given; make one with `python -m train.embedder`"
        row |= dict.fromkeys(("acd", "acd_squared"), Score(None, missing))
    if meters.syncnet is None:
        missing = "no SyncNet given; make one with `python -m train.syncnet`"
        row |= dict.fromkeys(("av_offset", "av_confidence"), Score(None, missing))
    if not meters.eyes:
        missing = "no landmarks for these faces; the reader knows the built-in set only"
        row |= dict.fromkeys(("blinks_per_s", "blink_duration"), Score(None, missing))
    elif not ears:
        row |= dict.fromkeys(("blinks_per_s", "blink_duration"), mean_score(eyeless))
    else:
        note = mean_score([*eyeless, *[Score(0.0)] * len(ears)]).reason
        blinks = blink_scores(ears, fps=fps, edges="level")
        row |= {key: Score(score.value, score.reason or note) for key, score in blinks.items()}
    return row


def _measure_clip(pair: Pair, meters: Meters) -> Row:
    if len(pair.made) < 2:
        raise MetricError("a single frame is no video; expected at least 2 frames")
    scores = cpbd_score(pair.made)
    if pair.made is pair.real:
        same = "the real video itself"
        scores |= {"psnr": Score(None, same), "ssim": Score(None, same)}
    else:
        scores |= quality_scores(pair.made, pair.real)
    if meters.embedder is not None:
        scores |= identity_scores(meters.embedder, pair.real[0], pair.made)
    if meters.syncnet is not None:
        scores |= sync_scores(
            meters.syncnet,
            pair.made,
            pair.audio,
            fps=pair.fps,
            sample_rate=pair.sample_rate,
            masked=meters.masked,
        )
    return scores


def median_score(scores: list[Score]) -> Score:
    """Median of the scores that have a value, with what `mean_score` says of the others."""
    summary = mean_score(scores)
    values = [score.value for score in scores if score.value is not None]
    return Score(float(torch.tensor(values).median()), summary.reason) if values else summary


def to_json(row: Row) -> dict[str, dict[str, Any]]:
    """A row as plain JSON values."""
    return {key: {"value": score.value, "reason": score.reason} for key, score in row.items()}


def from_json(values: dict[str, dict[str, Any]]) -> Row:
    """The inverse of `to_json`."""
    return {key: Score(score["value"], score["reason"]) for key, score in values.items()}
