"""The audio encoder's second form: log-mel bands in place of the raw waveform.

Raw windows have to learn a filter bank from the data; with a dozen voices to learn from they learn
those voices. Mel bands are given, and a voice that nobody trained on differs from the others by
little more than a shift along them, which training imitates.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.mfcc import mel_filters

BANDS, LOW_HZ, HIGH_HZ = 40, 60.0, 7600.0
WINDOW_SECONDS = 0.025
PER_FRAME = 4  # spectra to a video frame
PREEMPHASIS = 0.97
FLOOR = 1e-6  # power below which a band counts as silent
# Of the bands of speech at full scale, so that the first convolution sees about N(0, 1).
MEAN, SCALE = -6.0, 4.0


class LogMel(nn.Module):
    """Waveforms (B, N) in [−1, 1] → log-mel bands (B, 4 T, 40), four spectra to a video frame.

    T = floor(N / stride). Spectra lie evenly over a frame, whatever the rates; windows of 25 ms
    reach beyond the sound at both ends, where it is silent. In training mode every clip is heard
    through another throat and another microphone: its bands are shifted and stretched along the mel
    axis (vocal tract length perturbation, Jaitly and Hinton, 2013) and coloured by a smooth random
    gain. Random numbers come from PyTorch's default source.
    """

    filters: Tensor
    hann: Tensor

    def __init__(self, sample_rate: int, stride: int):
        super().__init__()
        if sample_rate < 2 * HIGH_HZ:
            raise ValueError(
                f"sample_rate={sample_rate}: expected at least {2 * HIGH_HZ:.0f} Hz, the mel bands "
                f"reach up to {HIGH_HZ:.0f} Hz"
            )
        self.stride, self.width = stride, round(WINDOW_SECONDS * sample_rate)
        self.fft = 1 << (self.width - 1).bit_length()
        filters = mel_filters(sample_rate, self.fft, BANDS, LOW_HZ, HIGH_HZ)
        self.register_buffer("filters", filters.float(), persistent=False)
        self.register_buffer("hann", torch.hann_window(self.width), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        with torch.autocast(audio.device.type, enabled=False):
            x = audio.float()
            count = x.shape[1] // self.stride * PER_FRAME
            x = F.pad(x[:, 1:] - PREEMPHASIS * x[:, :-1], (1 + self.width, self.width))
            middle = (torch.arange(count, device=x.device) + 0.5) * (self.stride / PER_FRAME)
            first = middle.long() - self.width // 2 + self.width
            at = first[:, None] + torch.arange(self.width, device=x.device)
            power = torch.fft.rfft(x[:, at] * self.hann, self.fft).abs().square()
            bands = (power @ self.filters.T).clamp_min(FLOOR).log()
            bands = (bands - MEAN) / SCALE
            return _another_voice(bands) if self.training else bands


def _another_voice(bands: Tensor) -> Tensor:
    """Bands (B, M, 40) shifted by up to 2.5, stretched by up to 6 %, and coloured."""
    batch, _, count = bands.shape
    like: Any = {"device": bands.device, "dtype": bands.dtype}
    shift = torch.empty(batch, 1, **like).uniform_(-2.5, 2.5)
    stretch = torch.empty(batch, 1, **like).uniform_(0.94, 1.06)
    at = (torch.arange(count, **like) * stretch + shift).clamp(0, count - 1)
    below = at.floor().clamp_max(count - 2).long()
    share = (at - below).unsqueeze(1)
    index = below.unsqueeze(1).expand(bands.shape)
    warped = bands.gather(2, index) * (1 - share) + bands.gather(2, index + 1) * share
    knots = torch.randn(batch, 1, 5, **like) / SCALE + torch.randn(batch, 1, 1, **like) / 2
    colour = F.interpolate(knots, count, mode="linear", align_corners=True)
    return warped + colour


class MelAudioEncoder(nn.Module):
    """Waveform (B, N) in [−1, 1] → z_a (B, T, a): log-mel bands, then five convolutions over time.

    The feature of a frame hears 0.24 s to each side of it (:attr:`context` frames) and nothing
    else: a part of a clip has the features of the whole, and a stream is late by that much.
    """

    context = 6  # frames

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.stride = config.samples_per_frame
        self.mel = LogMel(config.sample_rate, self.stride)
        a = config.audio_dim
        #          kernel, stride, padding; spectra become frames after the third
        layers = [(5, 1, 2), (4, 2, 1), (4, 2, 1), (5, 1, 2), (5, 1, 2)]
        self.convs = nn.ModuleList(
            nn.Conv1d(i, a, *layer) for i, layer in zip([BANDS, a, a, a, a], layers, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(a) for _ in layers)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Conv1d(a, a, 1)

    def forward(self, audio: Tensor, context: int = 0) -> Tensor:
        """``context`` frames of sound at both ends are heard and get no feature."""
        missing = self.context - context
        if missing < 0:
            raise ValueError(f"context={context}: expected at most {self.context} frames")
        left, beyond = missing * self.stride, audio.shape[1] % self.stride
        audio = F.pad(audio, (left, left - beyond))  # what lies beyond the last frame is heard
        x = self.mel(audio).transpose(1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.dropout(F.relu(norm(conv(x))))
        x = torch.tanh(self.head(x)).transpose(1, 2)
        return x[:, self.context : x.shape[1] - self.context]
