"""Small models and their inputs."""

import torch
from torch import Tensor, nn

from model import ModelConfig

SMALL = ModelConfig(
    height=32,
    width=24,
    depth=3,
    base_channels=4,
    identity_dim=8,
    audio_dim=16,
    audio_layers=1,
    noise_dim=3,
    fused_dim=12,
    rank=5,
    frame_disc_channels=4,
    sequence_disc_channels=4,
    sequence_dim=8,
    sync_disc_channels=4,
    sync_dim=8,
    sample_rate=8000,
)


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def inputs(config: ModelConfig, clips: int = 2, frames: int = 7) -> tuple[Tensor, Tensor]:
    """Random stills and speech."""
    rng = torch.Generator().manual_seed(1)
    still = torch.rand(clips, 3, config.height, config.width, generator=rng) * 2 - 1
    audio = torch.rand(clips, frames * config.samples_per_frame, generator=rng) * 2 - 1
    return still, audio
