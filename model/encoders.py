"""The three encoders: identity (per clip), audio and noise (per frame). Spec: IJCV 2019, §3."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.convolution import HalvingConv2d
from model.recurrent import GRU
from polyfusion.nn import NormActivation


class IdentityEncoder(nn.Module):
    """Still (B, 3, H, W) → z_d (B, d) and the generator's skips, finest first.

    Stage i halves the resolution; the finest map is computed on the way but no skip, as in the
    published system.
    """

    def __init__(self, config: ModelConfig, kernels: str = "auto"):
        super().__init__()
        widths = config.channels(config.base_channels)
        self.convs = nn.ModuleList(
            HalvingConv2d(i, o) for i, o in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.norms = nn.ModuleList(NormActivation(o, kernels=kernels) for o in widths)
        self.head = nn.Conv2d(widths[-1], config.identity_dim, config.bottom, bias=False)

    def forward(self, still: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        x = still
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
            skips.append(x)
        return torch.tanh(self.head(x)).flatten(1), skips[1:]


def audio_windows(audio: Tensor, window: int, stride: int) -> Tensor:
    """Cut waveforms (B, N) into one window per frame: (B, T, window), T = floor(N / stride).

    Frame t sits in the middle of its window: windows start floor((window − stride) / 2) samples
    before their frames, and are silent beyond the ends of the audio. Sound beyond the last whole
    frame is heard in the windows that reach it, as by the published system.
    """
    frames = audio.shape[1] // stride
    if frames == 0:
        raise ValueError(
            f"audio of {audio.shape[1]} samples: expected at least one frame, {stride}"
        )
    left = (window - stride) // 2
    right = (frames - 1) * stride + window - left - audio.shape[1]  # negative: cut off
    return F.pad(audio, (left, right)).unfold(1, window, stride)


class AudioWindowEncoder(nn.Module):
    """Raw audio windows (N, W) → features (N, out_dim): six 1-D convolutions, the last + Tanh.

    Layer 1 works in time units (kernel 5 ms, stride 1 ms), so every rate gives 200 steps.
    """

    def __init__(self, sample_rate: int, out_dim: int, channels: int = 16):
        super().__init__()
        ms = sample_rate // 1000
        widths = [channels << i for i in range(5)]
        #          kernel, stride, padding
        layers = [(5 * ms, ms, 2 * ms), (4, 2, 1), (4, 2, 1), (4, 2, 1), (10, 5, 3)]
        self.convs = nn.ModuleList(
            nn.Conv1d(i, o, *layer)
            for i, o, layer in zip([1, *widths[:-1]], widths, layers, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(o) for o in widths)
        self.head = nn.Conv1d(widths[-1], out_dim, 5)

    def forward(self, windows: Tensor) -> Tensor:
        x = windows.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return torch.tanh(self.head(x)).squeeze(2)


class AudioEncoder(nn.Module):
    """Waveform (B, N) in [−1, 1] → z_a (B, T, a): window features, then a GRU over the frames."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.window, self.stride = config.window, config.samples_per_frame
        a = config.audio_dim
        self.windows = AudioWindowEncoder(config.sample_rate, a, a // 16)
        self.rnn = GRU(a, a, config.audio_layers, batch_first=True)

    def forward(self, audio: Tensor) -> Tensor:
        windows = audio_windows(audio, self.window, self.stride)  # (B, T, W)
        features = self.windows(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
        return self.rnn(features)[0]


class NoiseEncoder(nn.Module):
    """White noise (B, T, n) → z_n (B, T, n): GRU + Tanh, so that the noise varies smoothly."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.rnn = GRU(config.noise_dim, config.noise_dim, batch_first=True)

    def sample(self, batch: int, frames: int, rng: torch.Generator | None = None) -> Tensor:
        """Draw e (B, T, n) by :func:`draw_noise`, on the encoder's device."""
        return draw_noise(self.config, batch, frames, rng).to(next(self.parameters()).device)

    def forward(self, noise: Tensor) -> Tensor:
        return torch.tanh(self.rnn(noise)[0])


def draw_noise(
    config: ModelConfig, batch: int, frames: int, rng: torch.Generator | None = None
) -> Tensor:
    """Draw e (B, T, n) ~ N(0, σ²), on the CPU so that every device sees the same."""
    return torch.randn(batch, frames, config.noise_dim, generator=rng) * config.noise_std
