"""A tiny run, and faces, to animate."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import torch

from model import ModelConfig, TalkingFace
from tests.model.helpers import SMALL
from train.config import CONFIG_FILE, TrainConfig
from train.data.photo import read_image
from train.files import write_json
from train.run.checkpoint import CHECKPOINT_FILE, save_checkpoint

TINY = dataclasses.replace(
    SMALL, audio_encoder="mel", composition="warp", eyes=True, lips=True, sample_rate=16000
)
DOCS = Path(__file__).parents[2] / "docs"


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """The model with weights large enough for its frames to differ."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return model.eval()


def write_run(folder: Path, config: ModelConfig = TINY, alignment: str = "haar") -> Path:
    """Write a run of a network that was never trained."""
    torch.manual_seed(0)
    settings = TrainConfig(preset="demo", model=config, alignment=alignment)
    folder.mkdir()
    write_json(folder / CONFIG_FILE, settings.to_dict())
    model = lively(TalkingFace(config, "cp", "eager"))
    save_checkpoint(folder / CHECKPOINT_FILE, {"model": model}, {}, {"step": 0})
    return folder


def face(scale: float = 2.0) -> np.ndarray:
    """A person of GRID, (128, 96, 3) uint8 RGB enlarged."""
    crop = read_image(DOCS / "unseen.jpg")[:128, :96]
    return cv2.resize(crop, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def photo(*scales: float, size: tuple[int, int] = (300, 480)) -> np.ndarray:
    """Faces side by side on grey, (*size, 3) uint8 RGB."""
    image = np.full((*size, 3), 128, np.uint8)
    left = 20
    for scale in scales:
        person = face(scale)
        height, width = person.shape[:2]
        image[20 : 20 + height, left : left + width] = person
        left += width + 20
    return image


def speech(seconds: float = 0.6, rate: int = 16000) -> np.ndarray:
    """(N,) float32, noise whose loudness goes up and down four times a second."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.2, len(time))
    return (noise * np.sin(2 * np.pi * 2 * time) ** 2).clip(-1, 1).astype(np.float32)
