"""The model and the update rule that a configuration names."""

import torch

from train import gan, speech2vid
from train.base import BaseTrainer, build_model
from train.config import TrainConfig

__all__ = ["build_model", "make_trainer"]


def make_trainer(config: TrainConfig, device: torch.device) -> BaseTrainer:
    """The trainer of a run, its model on ``device``; make its optimisers before a step."""
    kind = speech2vid.Trainer if config.system == "speech2vid" else gan.Trainer
    return kind(config, device)
