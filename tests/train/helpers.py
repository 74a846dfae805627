"""Small configurations, batches, trainers and runs."""

import sys
from collections.abc import Iterable

import torch

from tests.model.helpers import SMALL
from train.__main__ import main
from train.config import TrainConfig
from train.device import Batch
from train.metrics.table import Meters, Pair, Row, Tally
from train.trainer.gan import Trainer

CPU = torch.device("cpu")
CONFIG = TrainConfig(frames=8, batch_size=3, model=SMALL, lr_generator=1e-3, kernels="eager")
#: Arguments of a run that takes seconds.
TINY = [
    word
    for line in (
        "--preset demo --kernels eager --workers 0 --frames 6 --batch-size 2 --anneal 0",
        "--log-every 1 --checkpoint-every 2 --validation-clips 2",
        "--model.height 32 --model.width 24 --model.depth 3 --model.base-channels 4",
        "--model.audio-dim 16 --model.identity-dim 8 --model.fused-dim 12 --model.rank 4",
    )
    for word in line.split()
]


def batch(config: TrainConfig = CONFIG) -> Batch:
    """Random clips."""
    rng = torch.Generator().manual_seed(5)
    m = config.model
    shape = (config.batch_size, config.frames, 3, m.height, m.width)
    frames = torch.rand(shape, generator=rng) * 2 - 1
    samples = config.frames * m.samples_per_frame
    return Batch(frames, torch.rand(config.batch_size, samples, generator=rng) * 2 - 1)


def measure(pairs: Iterable[Pair], meters: Meters) -> Row:
    """The row of these clips."""
    tally = Tally(meters)
    for pair in pairs:
        tally.add(pair)
    return tally.row()


def trainer(config: TrainConfig = CONFIG) -> Trainer:
    """A trainer of the GAN, ready for a step."""
    made = Trainer(config, CPU)
    made.make_optimizers()
    return made


def run(args: list[str], monkeypatch) -> int:
    """Run ``python -m train`` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["train", *args])
    try:
        return main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
