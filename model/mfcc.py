"""Speech2Vid's sound features, computed in PyTorch: they run where the model runs.

The published demo's settings: 16-bit scale, pre-emphasis 0.97, Hamming windows of 25 ms every
10 ms, magnitude spectrum, 40 triangular mel filters from 300 to 3700 Hz, 13 cepstra lifted by 22.
(:mod:`train.metrics.mfcc` has SyncNet's features, of other settings, from the same filters.)
"""

import math

import torch
from torch import Tensor, nn

PREEMPHASIS = 0.97
FRAME_MS, HOP_MS = 25, 10
FILTERS, LOW_HZ, HIGH_HZ = 40, 300.0, 3700.0
CEPSTRA, LIFTER = 13, 22
#: Filter outputs below one step of a 16-bit integer count as one: digital silence gives 0, not −∞.
FLOOR = 1.0


class MFCC(nn.Module):
    """Waveforms (B, N) in [−1, 1] → cepstra (B, M, 13), one row every 10 ms.

    M = 1 + floor((N − frame) / hop): windows lie inside the signal. ``ValueError`` for sample rates
    below 8 kHz (the filters reach to 3700 Hz). Always computed in the buffers' precision, float32,
    whatever autocast says.
    """

    window: Tensor
    filters: Tensor
    dct: Tensor

    def __init__(self, sample_rate: int):
        super().__init__()
        if sample_rate < 8000:
            raise ValueError(
                f"sample_rate={sample_rate}: expected at least 8000 Hz, the mel filters reach up "
                f"to {HIGH_HZ:.0f} Hz"
            )
        self.frame, self.hop = sample_rate * FRAME_MS // 1000, sample_rate * HOP_MS // 1000
        self.fft = 1 << (self.frame - 1).bit_length()
        constants = {
            "window": torch.hamming_window(self.frame, periodic=False, dtype=torch.float64),
            "filters": mel_filters(sample_rate, self.fft, FILTERS, LOW_HZ, HIGH_HZ),
            "dct": lifted_dct(FILTERS),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        with torch.autocast(audio.device.type, enabled=False):
            x = audio.to(self.window.dtype) * 32768
            x = torch.cat([x[:, :1], x[:, 1:] - PREEMPHASIS * x[:, :-1]], 1)
            frames = x.unfold(1, self.frame, self.hop) * self.window  # (B, M, frame)
            magnitude = torch.fft.rfft(frames, self.fft).abs()
            return (magnitude @ self.filters.T).clamp_min(FLOOR).log() @ self.dct.T


def mel_filters(
    sample_rate: int, fft: int, count: int, low: float, high: float, *, to_bins: bool = False
) -> Tensor:
    """Triangles of height 1 whose corners are equidistant in mel from ``low`` to ``high`` Hz.

    Returns (count, fft/2 + 1) float64. ``to_bins`` rounds the corners down to bins of the Fourier
    transform, as some libraries do; a side without width then leaves its centre to the side that
    rises.
    """
    bottom, top = (1127 * math.log(1 + hz / 700) for hz in (low, high))
    mels = torch.linspace(bottom, top, count + 2, dtype=torch.float64)
    corners = 700 * (mels / 1127).expm1()
    place = torch.linspace(0, sample_rate / 2, fft // 2 + 1, dtype=torch.float64)
    if to_bins:
        corners = ((fft + 1) * corners / sample_rate).floor()
        place = torch.arange(fft // 2 + 1, dtype=torch.float64)
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = ((place - left) / (centre - left)).nan_to_num(torch.inf, torch.inf, -torch.inf)
    falling = ((right - place) / (right - centre)).nan_to_num(0.0, torch.inf, -torch.inf)
    return torch.minimum(rising, falling).clamp_min(0)


def lifted_dct(count: int) -> Tensor:
    """(13, count) float64: the cosine transform with the lifter's factors in its rows."""
    n = torch.arange(CEPSTRA, dtype=torch.float64)[:, None]
    m = torch.arange(count, dtype=torch.float64)
    dct = math.sqrt(2 / count) * (math.pi * n * (m + 0.5) / count).cos()
    return (1 + LIFTER / 2 * (math.pi * n / LIFTER).sin()) * dct


class SpeechWindows(nn.Module):
    """Waveforms (B, N) → one window of cepstra per video frame, (B, T, 12, 35), without c₀.

    T = floor(N / stride). Frame t lies in the middle of its 0.365 s; the sound is padded with
    zeros, so that every frame has its window; what lies beyond the last frame is heard. At
    25 frames/s windows are 4 columns apart; at rates that are no multiple of 10 ms they start at
    the nearest column.
    """

    columns = 35

    def __init__(self, sample_rate: int, stride: int):
        super().__init__()
        self.mfcc, self.stride = MFCC(sample_rate), stride
        self.span = (self.columns - 1) * self.mfcc.hop + self.mfcc.frame  # samples of a window

    @property
    def context(self) -> int:
        """Frames of sound that a window reaches beyond its frame, at either end."""
        return -(-(self.span - self.stride) // 2 // self.stride)

    def forward(self, audio: Tensor, context: int = 0) -> Tensor:
        """``context`` frames of sound at both ends are heard and get no window."""
        count, hop = audio.shape[1] // self.stride, self.mfcc.hop
        if count == 0:
            raise ValueError(
                f"audio of {audio.shape[1]} samples: expected at least one frame, {self.stride}"
            )
        starts = [round(t * self.stride / hop) for t in range(count)]
        left = (self.span - self.stride) // 2
        right = starts[-1] * hop + self.span - left - audio.shape[1]
        cepstra = self.mfcc(nn.functional.pad(audio, (left, right)))[..., 1:]  # (B, M, 12)
        index = torch.tensor(starts[context : count - context])[:, None]
        index = index + torch.arange(self.columns)
        return cepstra[:, index.to(audio.device)].transpose(2, 3)
