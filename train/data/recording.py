"""Sound of any length, read in pieces: a file's, or a wave's that is in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol

import av
import numpy as np
import soxr

from train.data.decode import decodable, errors_of, open_media
from train.data.limits import Limits, MediaError
from train.data.sound import SILENCE, Piece, Sound

PIECE = 1.0  # s of sound given at once
SILENT = "silent: nothing is louder than -60 dB"
PROMISED = 0.5  # s that a file may be shorter than it says without a remark


class Source(Protocol):
    """Where sound comes from."""

    seconds: float
    remarks: tuple[str, ...]

    def pieces(self, rate: int) -> Iterator[np.ndarray]:
        """Give the sound at ``rate`` Hz, mono, as waves (N,) float32 in [-1, 1]."""


class Recording:
    """The first audio stream of a sound or video file.

    It is decoded once to learn its length and what is odd about it, and again by every
    ``pieces``: none of it is kept. Packets that cannot be decoded, and holes between packets, are
    silent. Raises ``MediaError`` if there is no sound to decode or it breaks a limit.
    """

    def __init__(self, path: str | os.PathLike[str], limits: Limits | None = None) -> None:
        self._path, self._limits = path, limits or Limits()
        sound = Sound()
        remarks: list[str] = []
        with errors_of(path):
            for piece in self._decode(sound, remarks):
                del piece
                self._limits.check_bytes(sound.nbytes)
                self._limits.check_seconds(sound.end - sound.start)
            if not sound.rate:
                raise MediaError("no sound could be decoded")
        self._rate, self._start, self._end = sound.rate, sound.start, sound.end
        self._weights = sound.weights(remarks)
        self.seconds = sound.end - sound.start
        if sound.peak < SILENCE:
            remarks.append(SILENT)
        self.remarks = tuple(remarks + sound.remarks(self._start))

    def pieces(self, rate: int) -> Iterator[np.ndarray]:
        """Give the sound at ``rate`` Hz, mono, as waves (N,) float32 in [-1, 1]."""
        stream = soxr.ResampleStream(self._rate, rate, 1, dtype="float32", quality="HQ")
        at = round(self._start * self._rate)
        waiting: list[np.ndarray] = []
        size = round(PIECE * self._rate)
        with errors_of(self._path):
            for piece in self._decode(Sound(), []):
                while piece.begin > at:  # a hole, perhaps a long one
                    waiting.append(np.zeros(min(piece.begin - at, size), np.float32))
                    at += len(waiting[-1])
                    yield from _resampled(stream, waiting, size)
                waiting.append(self._weights[piece.layout] @ piece.wave)
                at += len(waiting[-1])
                yield from _resampled(stream, waiting, size)
        yield from _resampled(stream, waiting, 0, last=True)

    def _decode(self, sound: Sound, remarks: list[str]) -> Iterator[Piece]:
        damaged = 0
        with open_media(self._path, self._limits) as container:
            streams = decodable(container, "audio")
            if not streams:
                raise MediaError("no audio stream to decode")
            for packet in container.demux(streams[0]):
                try:
                    frames: list[Any] = packet.decode()
                except av.InvalidDataError:
                    damaged += 1
                    continue
                for frame in frames:
                    sound.add(frame)
                yield from sound.take()
            promised = streams[0].duration and float(streams[0].duration * streams[0].time_base)
        length = sound.end - sound.start
        if promised and promised - length > PROMISED and sound.rate:
            remarks.append(f"cut short: {length:.2f} s of {promised:.2f} s of sound are there")
        if damaged:
            remarks.append(f"damaged: {damaged} packets cannot be decoded and are silent")


class Wave:
    """Sound that is in memory.

    Args:
        samples: (N,) or (N, channels), float in [-1, 1] or integers of 16 or 32 bits.
        rate: Hz.
    """

    def __init__(self, samples: np.ndarray, rate: int) -> None:
        if not rate >= 1:
            raise MediaError(f"sample_rate {rate}: expected a positive number, in Hz")
        self._samples, self._rate = as_wave(samples), rate
        self.seconds = len(self._samples) / rate
        self.remarks: tuple[str, ...] = ()
        if np.abs(self._samples).max(initial=0) < SILENCE:
            self.remarks = (SILENT,)

    def pieces(self, rate: int) -> Iterator[np.ndarray]:
        """Give the sound at ``rate`` Hz, mono, as waves (N,) float32 in [-1, 1]."""
        stream = soxr.ResampleStream(self._rate, rate, 1, dtype="float32", quality="HQ")
        size = round(PIECE * self._rate)
        for start in range(0, len(self._samples), size):
            yield from _resampled(stream, [self._samples[start : start + size]], 0)
        yield from _resampled(stream, [], 0, last=True)


def as_wave(samples: np.ndarray) -> np.ndarray:
    """(N,) float32 in [-1, 1] of samples (N,) or (N, channels), integers or floats."""
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "if":
        raise MediaError(
            f"sound: expected samples (N,) or (N, channels), signed integers or floats, "
            f"got {samples.shape} of {samples.dtype}"
        )
    scale = np.iinfo(samples.dtype).max + 1 if samples.dtype.kind == "i" else 1
    wave = samples.astype(np.float32) / np.float32(scale)
    if not np.isfinite(wave).all():
        raise MediaError("sound: some samples are not finite")
    return np.clip(wave if wave.ndim == 1 else wave.mean(axis=1), -1, 1)


def _resampled(
    stream: Any, waiting: list[np.ndarray], size: int, last: bool = False
) -> Iterator[np.ndarray]:
    """Resample what waits, once it is as long as ``size``, and forget it."""
    if not last and sum(map(len, waiting)) < max(size, 1):
        return
    wave = np.concatenate([np.zeros(0, np.float32), *waiting])
    waiting.clear()
    wave = np.clip(stream.resample_chunk(wave, last=last), -1, 1)
    if len(wave):
        yield wave
