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
    """Height of a frame, in pixels."""
    width: int = 96
    """Width of a frame, in pixels."""
    depth: int = 5
    """Number of stages of the identity encoder and the generator, each of which halves or doubles
    the resolution."""
    base_channels: int = 64
    """Number of channels at half resolution, which doubles with every stage; Speech2Vid's scale
    with it."""
    identity_dim: int = 128
    """Size d of the identity code, which the still is encoded as."""
    audio_dim: int = 256
    """Size a of the audio code, which the sound of a frame is encoded as."""
    audio_layers: int = 2
    """Number of layers of the audio GRU (the paper's text says 1, the published weights have 2)."""
    audio_encoder: Literal["raw", "mel"] = "raw"
    """Form of the audio encoder: raw feeds windows of the waveform to a GRU, as published; mel, not
    in the paper, feeds log-mel bands to convolutions over time, which learn from few voices and
    have no audio_layers."""
    composition: Literal["direct", "mask", "warp"] = "direct"
    """Way to make a frame: direct draws it as a whole, as published; mask blends what is drawn with
    the still; warp moves the still's pixels first. mask and warp are not in the paper."""
    eyes: bool = False
    """Take the closing of the eyes as an input: measured in training, drawn at random in
    generated videos, which then blink. Not in the paper."""
    eyes_gain: float = 1.0
    """How much further than drawn at random the eyes close. A lid stops short where an L1 leaves it
    unsure; in training, where the closing is measured, it changes nothing."""
    lips: bool = False
    """Take the shape of the lips as an input: measured in training, predicted from the sound in
    generated videos. The lips then move as far as the sound foretells. Not in the paper."""
    lips_gain: float = 1.0
    """How much further than foretold the lips move. What is foretold of the movement is less than
    the movement, and what is drawn of it less again; in training it changes nothing."""
    noise_dim: int = 10
    """Size n of the noise code of a frame."""
    noise_std: float = 0.33
    """Standard deviation of the noise that the noise GRU is fed with."""
    fused_dim: int = 384
    """Size m of the joint representation of audio and identity."""
    rank: int = 128
    """Rank k of the CP, CMF and tensor-train fusions; the Tucker fusions take half of each size
    instead."""
    fuse_noise: bool = False
    """Fuse the noise as a third view instead of concatenating it. Not in the paper."""
    within_view_degree: int = 1
    """Degree of the polynomial of each view by itself before the fusion (Π-nets); 1 means none.
    Not in the paper."""
    frame_disc_channels: int = 64
    """Number of channels of the frame discriminator at half resolution."""
    sequence_disc: Literal["gru", "patch"] = "gru"
    """Form of the sequence discriminator: gru gives one verdict on a clip, as published; patch the
    mean of the verdicts on pieces of it, by 3-D convolutions (MoCoGAN)."""
    sequence_disc_channels: int = 32
    """Number of channels of the sequence discriminator at half resolution."""
    sequence_dim: int = 256
    """Number of features of a frame in the sequence discriminator, and the size of its GRU."""
    sequence_extent: int = 3
    """Number of frames that each 3-D convolution of the sequence discriminator sees, odd."""
    sync_disc_channels: int = 64
    """Number of channels of the synchronisation discriminator at half resolution."""
    sync_dim: int = 128
    """Size of the synchronisation discriminator's embeddings."""
    fps: float = 25.0
    """Rate of the video, in frames per second."""
    sample_rate: int = 16000
    """Rate of the sound, in Hz; a multiple of 1000."""

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
        """Number of frames in a snippet of 0.2 s."""
        return round(0.2 * self.fps)

    def channels(self, base: int) -> list[int]:
        """Channels after each stride-2 stage, finest first: base, 2·base, …"""
        return [base << i for i in range(self.depth)]
