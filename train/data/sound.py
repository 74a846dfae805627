"""Lays decoded sound out by its time stamps, as one channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import soxr

from train.data.limits import MediaError

JITTER = 0.01  # seconds by which a time stamp may miss the end of the sound before it
MAX_OVERLAP = 0.5  # seconds of sound in all that may be given twice
NOTICED = 0.1  # seconds of silence at either end that are worth a remark
CANCELLED = 0.2  # share of the energy that is left when channels of opposite phase are mixed
SILENCE = 1e-3  # amplitude below which nothing is heard

# ITU-R BS.775, for one channel: the low-frequency channel is left out. Others, see ``_weights``.
_DOWNMIX = {"FL": 0.5, "FR": 0.5, "FC": 0.5**0.5, "LFE": 0.0, "LFE2": 0.0}


@dataclass
class Piece:
    """Decoded sound, where its time stamps put it."""

    begin: int  # in samples
    wave: np.ndarray  # (channels, samples) float32
    layout: str


class Sound:
    """Collects decoded audio frames; ``samples`` gives them as one wave.

    Whoever wants no more than pieces of it calls ``take`` after every ``add``.
    """

    def __init__(self) -> None:
        self.rate = 0  # Hz, the stream's own
        self.nbytes = 0
        self.peak = 0.0  # the largest amplitude of any channel
        self._begin: int | None = None
        self._products: dict[str, np.ndarray] = {}  # of each layout's channels with each other
        self._pieces: list[Piece] = []
        self._end = 0
        self._holes: list[tuple[float, float]] = []  # (time, length) in seconds
        self._overlap = 0.0
        self._resamplers: dict[tuple[str, str], Any] = {}
        self._names: dict[str, list[str]] = {}  # of the channels of each layout

    def add(self, frame: Any) -> None:
        """Append an audio frame of PyAV; it lies where its time stamp says."""
        if self._begin is None:
            self.rate = frame.sample_rate
        elif frame.sample_rate != self.rate:
            raise MediaError(
                f"the sound changes from {self.rate} to {frame.sample_rate} Hz; re-encode it"
            )
        wave, layout = self._to_float(frame), frame.layout.name
        begin = self._end if frame.time is None else round(frame.time * self.rate)
        jump = begin - self._end if self._begin is not None else 0
        if abs(jump) <= JITTER * self.rate:
            begin = begin if self._begin is None else self._end
        elif jump > 0:
            self._holes.append((self._end / self.rate, jump / self.rate))
        else:
            wave, begin = wave[:, -jump:], self._end
            self._overlap -= jump / self.rate
            if self._overlap > MAX_OVERLAP:
                raise MediaError(
                    "the time stamps of the sound go backwards (joined without re-encoding?)"
                )
        self._pieces.append(Piece(begin, wave, layout))
        self._begin = begin if self._begin is None else self._begin
        self._end = begin + wave.shape[1]
        self.nbytes += wave.nbytes
        self.peak = max(self.peak, float(np.abs(wave).max(initial=0)))
        self._products[layout] = self._products.get(layout, 0) + wave.astype(float) @ wave.T

    def take(self) -> list[Piece]:
        """Give the pieces that came since the last call, and keep them no longer."""
        taken, self._pieces = self._pieces, []
        return taken

    def _to_float(self, frame: Any) -> np.ndarray:
        """(channels, samples) float32; swresample's own downmix to mono can exceed [-1, 1]."""
        kind = frame.format.name, frame.layout.name
        if kind not in self._resamplers:
            self._resamplers[kind] = av.AudioResampler(format="fltp")
            self._names[kind[1]] = [channel.name for channel in frame.layout.channels]
        parts = [part.to_ndarray() for part in self._resamplers[kind].resample(frame)]
        wave = np.concatenate(parts, axis=1) if parts else np.zeros((1, 0), np.float32)
        return np.nan_to_num(wave, posinf=1, neginf=-1)  # files of floats may hold anything

    @property
    def start(self) -> float:
        """When the sound starts, in seconds of the file's clock."""
        return (self._begin or 0) / self.rate if self.rate else 0.0

    @property
    def end(self) -> float:
        """When the sound ends, in seconds of the file's clock."""
        return self._end / self.rate if self.rate else 0.0

    def samples(
        self, rate: int, start: float, count: int | None = None
    ) -> tuple[np.ndarray, list[str]]:
        """Mix and resample the sound from time ``start`` on.

        Args:
            rate: Hz of the result.
            start: seconds of the file's clock at which sample 0 is heard.
            count: length of the result; all sound there is if not given.

        Returns: (count,) float32 in [-1, 1], silent where there is no sound, and remarks.
        """
        remarks: list[str] = []
        if not self._pieces:
            return np.zeros(count or 0, np.float32), ["silent: no sound at all"]
        weights = self.weights(remarks)
        origin = round(start * self.rate)
        mono = np.zeros(max(0, self._end - origin), np.float32)
        for piece in self._pieces:
            skip = max(0, origin - piece.begin)
            wave = weights[piece.layout] @ piece.wave[:, skip:]
            at = piece.begin + skip - origin
            mono[at : at + len(wave)] = wave
        mono = np.clip(soxr.resample(mono, self.rate, rate, "HQ"), -1, 1)
        if count is not None:
            remarks += self._edges(start, count / rate)
            mono = np.pad(mono[:count], (0, max(0, count - len(mono))))
        remarks += self.remarks(start)
        if np.abs(mono).max(initial=0) < SILENCE:
            remarks.append("silent: nothing is louder than -60 dB")
        return mono.astype(np.float32), remarks

    def _edges(self, start: float, seconds: float) -> Iterator[str]:
        late, early = self.start - start, start + seconds - self.end
        if late > NOTICED:
            yield f"sound starts late: the first {late:.2f} s are silent"
        if early > NOTICED:
            yield f"sound cut off at the end: the last {early:.2f} s are silent"

    def remarks(self, start: float) -> list[str]:
        """Say what is odd about the time stamps; times count from ``start``, in seconds."""
        remarks = []
        if self._holes:
            length = sum(length for _, length in self._holes)
            remarks.append(
                f"hole in the sound: {length:.2f} s filled with silence, "
                f"from {self._holes[0][0] - start:.2f} s on"
            )
        if self._overlap:
            remarks.append(f"sound given twice: {self._overlap:.2f} s left out")
        return remarks

    def weights(self, remarks: list[str]) -> dict[str, np.ndarray]:
        """Weights (channels,) that mix each layout to mono; what is odd is added to ``remarks``."""
        return {layout: self._weights(layout, remarks) for layout in self._names}

    def _weights(self, layout: str, remarks: list[str]) -> np.ndarray:
        """(channels,) weights that sum to 1, or the loudest channel alone if mixing cancels it."""
        names = self._names[layout]
        known = "FL" in names or "FC" in names
        raw = np.array([_DOWNMIX.get(name, 0.5**1.5) if known else 1.0 for name in names])
        weights = (raw / raw.sum()).astype(np.float32)
        if len(names) == 1:
            return weights
        if len(names) > 2:
            remarks.append(f"downmixed: from {layout}")
        products = self._products[layout]
        energy = np.diag(products)
        if weights @ products @ weights < CANCELLED * float(np.square(weights) @ energy):
            remarks.append("opposite channels: they cancel each other, so the loudest was taken")
            weights = np.eye(len(names), dtype=np.float32)[np.argmax(energy * (raw > 0))]
        return weights
