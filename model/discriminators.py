"""The frame, sequence and synchronisation discriminators; each returns logits (real > 0)."""

import math

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.convolution import HalvingConv2d
from model.encoders import AudioWindowEncoder, audio_windows
from model.init import gaussian_init
from model.recurrent import GRU
from polyfusion.nn import NormActivation

SLOPE = 0.2


class FrameStack(nn.Module):
    """Images (N, C, H, W) → (N, out_dim): stride-2 convolutions, batch norm on all but the first,
    LeakyReLU, and one valid convolution over the coarsest map."""

    def __init__(
        self, config: ModelConfig, in_channels: int, base: int, out_dim: int, kernels: str = "auto"
    ):
        super().__init__()
        widths = config.channels(base)
        self.convs = nn.ModuleList(
            HalvingConv2d(i, o) for i, o in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.norms = nn.ModuleList(
            NormActivation(o, slope=SLOPE, kernels=kernels) for o in widths[1:]
        )
        self.head = nn.Conv2d(widths[-1], out_dim, config.bottom, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.convs[0](x), SLOPE)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = norm(conv(x))
        return self.head(x).flatten(1)


class FrameDiscriminator(nn.Module):
    """Is this frame real, given the still? Both are stacked along channels."""

    def __init__(self, config: ModelConfig, kernels: str = "auto"):
        super().__init__()
        self.stack = FrameStack(config, 6, config.frame_disc_channels, 1, kernels)

    def forward(self, frame: Tensor, still: Tensor) -> Tensor:
        """frame, still (B, 3, H, W) → logits (B,)."""
        return self.stack(torch.cat([frame, still], 1)).squeeze(1)


class SequenceDiscriminator(nn.Module):
    """Is this whole sequence real, given its speech? 3-D convolutions and speech windows → GRU."""

    def __init__(self, config: ModelConfig, kernels: str = "auto"):
        super().__init__()
        widths, extent = config.channels(config.sequence_disc_channels), config.sequence_extent
        self.convs = nn.ModuleList(
            nn.Conv3d(i, o, (extent, 4, 4), (1, 2, 2), (extent // 2, 1, 1), bias=False)
            for i, o in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.norms = nn.ModuleList(
            NormActivation(o, slope=SLOPE, kernels=kernels) for o in widths[1:]
        )
        dim = config.sequence_dim
        self.head = nn.Conv3d(widths[-1], dim, (1, *config.bottom), bias=False)
        self.window, self.stride = config.window, config.samples_per_frame
        self.audio = AudioWindowEncoder(config.sample_rate, dim, max(config.audio_dim // 16, 1))
        self.rnn = GRU(2 * dim, dim, batch_first=True)
        self.classify = nn.Linear(dim, 1)

    def forward(self, frames: Tensor, audio: Tensor) -> Tensor:
        """frames (B, T, 3, H, W), audio (B, T·s) → logits (B,)."""
        x = nn.functional.leaky_relu(self.convs[0](frames.transpose(1, 2)), SLOPE)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = conv(x)  # (B, C, T, H, W)
            x = norm(x.flatten(2, 3)).unflatten(2, x.shape[2:4])
        video = self.head(x).flatten(2).transpose(1, 2)  # (B, T, dim)
        speech = speech_features(self.audio, audio, self.window, self.stride)
        _, last = self.rnn(torch.cat([video, speech], 2))
        return self.classify(last[-1]).squeeze(1)


class PatchSequenceDiscriminator(nn.Module):
    """Is every patch of this sequence real, given its speech? The mean of the patches' logits.

    The 3-D PatchGAN of MoCoGAN: stride (1, 2, 2) at every layer, so that a logit sees a part of the
    frame for a part of the time. Speech joins before the first normalisation, added as a linear
    map of features per frame, which is what concatenating them along channels amounts to.
    """

    def __init__(self, config: ModelConfig, kernels: str = "auto"):
        super().__init__()
        widths, extent = config.channels(config.sequence_disc_channels)[:-1], config.sequence_extent
        self.convs = nn.ModuleList(
            nn.Conv3d(i, o, (extent, 4, 4), (1, 2, 2), (extent // 2, 1, 1), bias=False)
            for i, o in zip([3, *widths], [*widths, 1], strict=True)
        )
        self.norms = nn.ModuleList(
            NormActivation(o, slope=SLOPE, kernels=kernels) for o in widths[1:]
        )
        self.window, self.stride = config.window, config.samples_per_frame
        dim = config.sequence_dim
        self.audio = AudioWindowEncoder(config.sample_rate, dim, max(config.audio_dim // 16, 1))
        self.join = nn.Linear(dim, widths[1], bias=False)

    def forward(self, frames: Tensor, audio: Tensor) -> Tensor:
        """frames (B, T, 3, H, W), audio (B, T·s) → logits (B,)."""
        speech = self.join(speech_features(self.audio, audio, self.window, self.stride))
        x = nn.functional.leaky_relu(self.convs[0](frames.transpose(1, 2)), SLOPE)
        for conv, norm in zip(self.convs[1:-1], self.norms, strict=True):
            x = conv(x)  # (B, C, T, H, W)
            if norm is self.norms[0]:
                x = x + speech.transpose(1, 2)[..., None, None]
            x = norm(x.flatten(2, 3)).unflatten(2, x.shape[2:4])
        return self.convs[-1](x).mean(dim=(1, 2, 3, 4))


SEQUENCE_DISCRIMINATORS = {"gru": SequenceDiscriminator, "patch": PatchSequenceDiscriminator}


def speech_features(encoder: AudioWindowEncoder, audio: Tensor, window: int, stride: int) -> Tensor:
    """Audio (B, T·s) → the encoder's features of every frame's window, (B, T, dim)."""
    windows = audio_windows(audio, window, stride)
    return encoder(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])


class SyncDiscriminator(nn.Module):
    """Do these 0.2 s of video and audio belong together? Distance of two embeddings → logit."""

    def __init__(self, config: ModelConfig, kernels: str = "auto"):
        super().__init__()
        self.video = FrameStack(
            config, 3 * config.snippet_frames, config.sync_disc_channels, config.sync_dim, kernels
        )
        self.audio = AudioWindowEncoder(
            config.sample_rate, config.sync_dim, max(config.audio_dim // 16, 1)
        )
        self.classify = nn.Linear(1, 1)
        # near means in sync; a random pair starts with a logit of about −1, not −20
        nn.init.constant_(self.classify.weight, -1 / math.sqrt(config.sync_dim))
        nn.init.zeros_(self.classify.bias)

    def forward(self, frames: Tensor, audio: Tensor) -> Tensor:
        """frames (B, n, 3, H, W), n = 0.2 s; audio (B, W), the same 0.2 s → logits (B,)."""
        return self.compare(self.see(frames), self.audio(audio))

    def see(self, frames: Tensor) -> Tensor:
        """Embed snippets (B, n, 3, H, W) → (B, sync_dim)."""
        stacked = frames.permute(0, 3, 4, 1, 2).flatten(3)  # one copy: (B, H, W, n·3)
        return self.video(stacked.permute(0, 3, 1, 2))

    def compare(self, video: Tensor, audio: Tensor) -> Tensor:
        """Two embeddings (B, sync_dim) → logits (B,)."""
        return self.classify((video - audio).norm(dim=1, keepdim=True)).squeeze(1)


class Discriminators(nn.Module):
    """The three together, with the paper's Gaussian initialisation of their convolutions."""

    def __init__(self, config: ModelConfig, kernels: str = "auto"):
        super().__init__()
        self.frame = FrameDiscriminator(config, kernels)
        self.sequence: nn.Module = SEQUENCE_DISCRIMINATORS[config.sequence_disc](config, kernels)
        self.sync = SyncDiscriminator(config, kernels)
        self.apply(gaussian_init)
