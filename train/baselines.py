"""What a generated video must be better than: rows that need no training.

``still`` repeats the first frame, ``speaker mean`` the mean frame of what else the speaker said,
and ``real video`` is the clip itself. A frozen picture has a high whole-frame PSNR, for most pixels
hardly move; only the columns of the mouth, the synchronisation and the blinks tell it from a video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.data.prepared import PreparedSet
from train.metrics.score import Score
from train.metrics.table import Pair

STILL, SPEAKER_MEAN, REAL = "still", "speaker mean", "real video"
OTHERS = 8  # clips of a speaker at most that are averaged


class SpeakerMeans:
    """Mean frames of a prepared set's speakers, each of the other clips than the one in question.

    Of every split the clips at most ``OTHERS``, evenly chosen, count; the clip itself never does.
    """

    def __init__(self, root: Path, size: tuple[int, int]):
        self.data = PreparedSet(root, split=None, size=size)
        self._clips: dict[str, list[int]] = {}
        for index, clip in enumerate(self.data.clips):
            self._clips.setdefault(clip["speaker"], []).append(index)
        self._means: dict[int, Tensor] = {}

    def without(self, clip: dict[str, Any]) -> Tensor | None:
        """(3, H, W) uint8 for an entry of the manifest; None for a speaker of one clip."""
        others = [
            index
            for index in self._clips.get(clip["speaker"], [])
            if self.data.clips[index]["file"] != clip["file"]
        ]
        if not others:
            return None
        chosen = others[:: -(-len(others) // OTHERS)]
        mean = torch.stack([self._mean(index) for index in chosen]).mean(0)
        return mean.round().to(torch.uint8)

    def _mean(self, index: int) -> Tensor:
        if index not in self._means:
            self._means[index] = self.data[index]["frames"].float().mean(0)
        return self._means[index]


def baselines(
    pair: Pair, clip: dict[str, Any], means: SpeakerMeans | None = None
) -> Iterator[tuple[str, Pair | Score]]:
    """The rows beside the one of ``pair``, with a pair to measure or the reason why there is none.

    Without ``means`` there is no speaker mean; a real video gets no second row of its own.
    """
    yield STILL, _frozen(pair, pair.real[0])
    if means is not None:
        mean = means.without(clip)
        alone = Score(None, "the only clip of its speaker")
        yield SPEAKER_MEAN, alone if mean is None else _frozen(pair, mean)
    if pair.made is not pair.real:
        yield REAL, dataclasses.replace(pair, made=pair.real)


def _frozen(pair: Pair, picture: Tensor) -> Pair:
    made = picture.to(pair.real.device).expand_as(pair.real).contiguous()
    return dataclasses.replace(pair, made=made)
