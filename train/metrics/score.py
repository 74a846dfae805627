"""What every metric returns or raises: a number or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.errors import UserError


class MetricError(UserError):
    """What was handed to a metric makes no sense; the message is one line for the user."""


@dataclass(frozen=True)
class Score:
    """A metric's value, or None and the reason why it cannot be computed."""

    value: float | None
    reason: str = ""

    @staticmethod
    def of(value: float | Tensor, otherwise: str = "not finite") -> Score:
        """The value if it is finite, else None for the reason ``otherwise``."""
        number = float(value)
        return Score(number) if math.isfinite(number) else Score(None, otherwise)

    def __str__(self) -> str:
        return "-" if self.value is None else f"{self.value:.4g}"


def mean_score(scores: Iterable[Score]) -> Score:
    """Mean of the scores that have a value.

    If some have none, the reason of the first is kept with their number; if all, it is the dash's.
    """
    scores = list(scores)
    values = [score.value for score in scores if score.value is not None]
    missing = [score.reason for score in scores if score.value is None]
    if not scores:
        return Score(None, "no clips")
    if not values:
        return Score(None, missing[0])
    note = f"{len(missing)} of {len(scores)} clips left out: {missing[0]}" if missing else ""
    return Score(math.fsum(values) / len(values), note)


def check_frames(frames: Tensor, what: str = "frames", *, floats: bool = False) -> Tensor:
    """``frames`` as (B, T, 3, H, W); (T, 3, H, W) gets B = 1.

    They are uint8, or with ``floats`` floating-point in [−1, 1]; MetricError for anything else.
    """
    tensor = isinstance(frames, Tensor)
    if not tensor or not (frames.dtype == torch.uint8 or (floats and frames.is_floating_point())):
        kind = frames.dtype if tensor else type(frames).__name__
        raise MetricError(f"{what}: expected a uint8 tensor of RGB values 0..255, got {kind}")
    if frames.ndim == 4:
        frames = frames.unsqueeze(0)
    if frames.ndim != 5 or frames.shape[2] != 3 or not frames.numel():
        raise MetricError(
            f"{what}: expected (B, T, 3, H, W) or (T, 3, H, W), got {tuple(frames.shape)}"
        )
    return frames


def check_pair(generated: Tensor, real: Tensor, *, floats: bool = False) -> tuple[Tensor, Tensor]:
    """Both videos as :func:`check_frames` gives them; MetricError unless shapes and kinds agree."""
    generated = check_frames(generated, "generated frames", floats=floats)
    real = check_frames(real, "real frames", floats=floats)
    if (generated.dtype == torch.uint8) != (real.dtype == torch.uint8):
        raise MetricError(f"videos of {generated.dtype} and {real.dtype}: expected one scale")
    names = ("clips", "frames", "channels", "rows", "columns")
    for name, made, true in zip(names, generated.shape, real.shape, strict=True):
        if made != true:
            raise MetricError(
                f"generated video has {made} {name} and the real one {true}; "
                "cut or resize one to the other first"
            )
    return generated, real


def check_rates(fps: Sequence[float]) -> float:
    """The one frame rate all videos of a comparison share; MetricError if they differ."""
    if len({round(rate, 3) for rate in fps}) != 1 or fps[0] <= 0:
        listed = ", ".join(f"{rate:g}" for rate in fps)
        raise MetricError(f"videos of {listed} fps: expected one rate; resample them first")
    return fps[0]
