"""Turns pictures with time stamps of their own into a constant frame rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

COMMON_RATES = (
    *(24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 48.0, 50.0, 60000 / 1001, 60.0),
    *(10.0, 12.0, 12.5, 15.0, 20.0, 100.0, 120.0),
)
STILL = 0.2  # seconds without a new picture that are worth a remark at a variable rate

T = TypeVar("T")


class ConstantRate(Generic[T]):
    """Choose the picture on show at each instant k / ``fps`` after the first one.

    A picture counts as on show from half its own duration before its time stamp, and at most half
    a frame of ``fps``, until the next one is. So where pictures follow each other closely the
    nearest is taken, rounded time stamps do no harm, and what is held over a hole is held until
    half a frame before its end: no picture is ever early by more than half a frame.
    """

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.count = 0  # pictures given so far
        self._shown: list[T] = []  # the last one that began, if any
        self._latest: tuple[float, T] | None = None  # its duration is not known yet
        self._start = 0.0

    def push(self, time: float, picture: T) -> Iterator[T]:
        """Take the next picture, at ``time`` in seconds; yield those whose turn is now certain."""
        if self._latest is None:
            self._start = time
        else:
            yield from self._begin_latest(time)
        self._latest = time, picture

    def finish(self, duration: float) -> Iterator[T]:
        """Yield what is left when the last picture stays for ``duration`` seconds."""
        if self._latest is None:
            return
        end = self._latest[0] + duration
        yield from self._begin_latest(end)
        total = max(1, round((end - self._start) * self.fps))
        while self.count < total:
            self.count += 1
            yield self._shown[0]

    def _begin_latest(self, following: float) -> Iterator[T]:
        assert self._latest is not None
        time, picture = self._latest
        begins = time - min(following - time, 1 / self.fps) / 2
        while self._shown and self._start + self.count / self.fps < begins:
            self.count += 1
            yield self._shown[0]
        self._shown = [picture]


def source_rate(times: np.ndarray, hints: Iterable[float]) -> tuple[float, bool]:
    """Find the rate of pictures shown at ``times`` (T,), ascending, in seconds; T is at least 2.

    Returns frames per second and whether the rate is constant: all but 5 % of the times lie on
    its raster, pictures that are missing aside. A variable rate is the average, brought to a
    common rate within 2 %. ``hints`` are rates that the file claims to have.
    """
    steps = np.diff(times)
    typical = float(np.median(steps))
    fits = []
    for rate in (*hints, *COMMON_RATES):
        if abs(typical * rate - 1) > 0.1:
            continue
        place = (times - times[0]) * rate
        off = np.abs(place - np.rint(place))
        # Half a frame says nothing; Matroska and others round to milliseconds.
        if (off <= min(0.25, 0.1 + 0.001 * rate)).mean() >= 0.95:
            fits.append((round(float(off.mean()), 2), rate))
    if fits:
        return min(fits, key=lambda fit: fit[0])[1], True
    average = len(times) / (times[-1] - times[0] + typical)
    near = min(COMMON_RATES, key=lambda rate: abs(rate / average - 1))
    return (near if abs(near / average - 1) < 0.02 else float(average)), False


def timing_remarks(times: np.ndarray, rate: float, constant: bool, fps: float) -> Iterator[str]:
    """Say what was done to pictures at ``times`` (T,) to bring them to ``fps``.

    ``rate`` and ``constant`` are what ``source_rate`` found.
    """
    if not constant:
        yield f"variable frame rate: averaging {rate:.5g} frames/s, resampled to {fps:.5g}"
    elif abs(rate - fps) > 0.01:
        yield f"resampled: from {rate:.5g} frames/s to {fps:.5g}"
    steps = np.diff(times)
    gaps = np.flatnonzero(steps > (1.5 / rate if constant else max(STILL, 4 * np.median(steps))))
    if not len(gaps):
        return
    first = times[gaps[0]] - times[0]
    if constant:
        missing = int((np.rint(steps[gaps] * rate) - 1).sum())
        yield f"frames missing: {missing}, from {first:.2f} s on; the one before was held"
    else:
        yield f"still picture: {steps[gaps].sum():.2f} s in all, from {first:.2f} s on"
