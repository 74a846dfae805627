"""Trainers: a model, its optimisers and the rule that updates them."""

import torch

from train.config import TrainConfig
from train.trainer import gan, speech2vid
from train.trainer.base import BaseTrainer

TRAINERS: dict[str, type[BaseTrainer]] = {
    "polyfusion": gan.Trainer,
    "speech2vid": speech2vid.Trainer,
}


def make_trainer(config: TrainConfig, device: torch.device) -> BaseTrainer:
    """Make a run's trainer, its model on ``device``; make its optimisers before a step."""
    return TRAINERS[config.system](config, device)
