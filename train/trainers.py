"""The model and the update rule that a configuration names."""

import torch
from torch import nn

from model import TalkingFace
from train.config import TrainConfig
from train.gan import Trainer


def build_model(config: TrainConfig) -> nn.Module:
    """The model of a run, on the CPU and untrained."""
    return TalkingFace(config.model, config.fusion, config.kernels)


def make_trainer(config: TrainConfig, device: torch.device) -> Trainer:
    """The trainer of a run, its model on ``device``."""
    return Trainer(config, device)
