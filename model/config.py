"""Sizes of the talking-face system; the defaults are the paper's."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from polyfusion.dispatch import CHOICES
from polyfusion.nn.fusion import FUSIONS

if TYPE_CHECKING:
    Fusion: TypeAlias = str
    Kernels: TypeAlias = str
else:
    #: What a command line offers: the fusion layers there are, and the choices of kernels.
    Fusion, Kernels = Literal[tuple(FUSIONS)], Literal[tuple(CHOICES)]


@dataclass(frozen=True)
class ModelConfig:
    """Every size of the system. The defaults reproduce the paper's parameter counts."""

    height: int = 128
    """Frame height, pixels."""
    width: int = 96
    """Frame width, pixels."""
    depth: int = 5
    """Stride-2 stages of the identity encoder and the generator."""
    base_channels: int = 64
    """Channels at half resolution; they double with every stage. Speech2Vid's scale with it."""
    identity_dim: int = 128
    """Size d of the identity encoding."""
    audio_dim: int = 256
    """Size a of the audio encoding."""
    audio_layers: int = 2
    """Layers of the audio GRU (the paper's text says 1, the published weights have 2)."""
    audio_encoder: Literal["raw", "mel"] = "raw"
    """What the audio encoder hears: raw windows and a GRU, as published, or log-mel bands with
    convolutions over time, which learn from few voices and have no audio_layers. Ours."""
    composition: Literal["direct", "mask", "warp"] = "direct"
    """How a frame is made: drawn as a whole, as published; blended with the still by a mask; or
    blended with the still after its pixels have been moved. Ours."""
    eyes: bool = False
    """Take the closing of the eyes as an input: measured in training, drawn at random in
    generated videos, which then blink. Ours."""
    noise_dim: int = 10
    """Size n of the noise encoding."""
    noise_std: float = 0.33
    """Standard deviation of the noise fed to its GRU."""
    fused_dim: int = 384
    """Size m of the joint representation."""
    rank: int = 128
    """Rank k of CP and CMF; Tucker takes half of each mode instead."""
    fuse_noise: bool = False
    """Fuse the noise as a third view instead of concatenating it (multi-view machines). Ours."""
    within_view_degree: int = 1
    """Degree of a polynomial in each view before the fusion (Π-nets); 1 is none. Ours."""
    frame_disc_channels: int = 64
    """Channels of the frame discriminator at half resolution."""
    sequence_disc: Literal["gru", "patch"] = "gru"
    """Sequence discriminator: one verdict by a GRU, or the mean of those on patches (MoCoGAN)."""
    sequence_disc_channels: int = 32
    """Channels of the sequence discriminator at half resolution."""
    sequence_dim: int = 256
    """Features per frame and GRU size of the sequence discriminator."""
    sequence_extent: int = 3
    """Frames seen by each 3-D convolution of the sequence discriminator (odd)."""
    sync_disc_channels: int = 64
    """Channels of the synchronisation discriminator at half resolution."""
    sync_dim: int = 128
    """Size of the synchronisation discriminator's embeddings."""
    fps: float = 25.0
    """Video rate, frames per second."""
    sample_rate: int = 16000
    """Audio rate, hertz; a multiple of 1000."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool | str) and not value > 0:
                raise ValueError(f"model {name}={value!r}: expected a positive number")
        step = 2**self.depth
        if self.height % step or self.width % step:
            raise ValueError(
                f"frames of {self.height}×{self.width} with depth={self.depth}: height and width "
                f"must be multiples of 2^depth = {step}"
            )
        if self.sample_rate % 1000:
            raise ValueError(
                f"sample_rate={self.sample_rate}: expected a multiple of 1000 Hz (the first audio "
                "layer works in milliseconds); resample with `python -m train.prepare`"
            )
        if self.audio_dim % 16:
            raise ValueError(f"audio_dim={self.audio_dim}: expected a multiple of 16")
        if self.sequence_extent % 2 == 0:
            raise ValueError(f"sequence_extent={self.sequence_extent}: expected an odd number")
        if self.sequence_disc == "patch" and self.depth < 3:
            raise ValueError(f"sequence_disc='patch' with depth={self.depth}: expected 3 or more")

    @property
    def bottom(self) -> tuple[int, int]:
        """Size of the coarsest feature map, (4, 3) in the paper."""
        return self.height >> self.depth, self.width >> self.depth

    @property
    def samples_per_frame(self) -> int:
        """Audio stride s = floor(sample rate / fps)."""
        return math.floor(self.sample_rate / self.fps)

    @property
    def window(self) -> int:
        """Audio window W = 0.2 s, in samples."""
        return self.sample_rate // 5

    @property
    def snippet_frames(self) -> int:
        """Frames in a 0.2 s snippet."""
        return round(0.2 * self.fps)

    def channels(self, base: int) -> list[int]:
        """Channels after each stride-2 stage, finest first: base, 2·base, …"""
        return [base << i for i in range(self.depth)]
