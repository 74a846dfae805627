"""The configuration of a table: its protocol, presets and command line."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from model.config import Kernels
from train.config import PRESETS, LossConfig, TrainConfig, check_sizes, default_preset, option
from train.device import pick_device
from train.errors import UserError
from train.table1.rows import PAPER_ROWS, ROWS

#: How a row trains, where the preset's own schedule is for another purpose.
PROTOCOL: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {},
    "demo": {
        "lr_generator": 2e-3,
        "lr_frame": 2e-4,
        "lr_sequence": 1e-4,
        "lr_sync": 1e-4,
        "betas": (0.5, 0.999),
        "anneal": 0.5,
        "code_rate": 0.02,
        "mirror": True,
        "log_every": 10,
        "loss": LossConfig(l1_top=300.0),
    },
}
#: What has to be at least 1, and at least 0.
POSITIVE = (
    "seeds",
    "pretrain_steps",
    "steps",
    "batch_size",
    "frames",
    "rank",
    "clips",
    "synthetic_clips",
    "synthetic_speakers",
)
NOT_NEGATIVE = ("jobs", "patience")


@dataclass(frozen=True)
class Table1Config:
    """Train and evaluate every row of the paper's Table 1 under one protocol."""

    preset: Literal["paper", "small", "demo"] = "paper"
    """Sizes and budget to start from: the paper's, small for real people on two CPU cores, or a
    demo for these (default: paper with a GPU, demo without). Every other flag overrides the
    preset."""
    data: str = "synthetic"
    """Clips to train and test on: synthetic (the built-in set) or the directory of a prepared
    set."""
    out: Path = Path("runs/table1")
    """Directory to write the runs, the table and the report to."""
    rows: tuple[str, ...] = tuple(PAPER_ROWS)
    """Rows of the table to fill."""
    seeds: int = 3
    """Number of runs of every row; their seeds are 0, 1, …"""
    pretrain_steps: int = 40_000
    """Number of training steps of the run with concatenation, which pretrains the encoders."""
    steps: int = 40_000
    """Number of training steps of every row."""
    batch_size: int = 16
    """Number of clips in a step."""
    frames: int = 75
    """Number of frames in a training clip, T."""
    rank: int = 128
    """Rank k of the cp, cmf and cmf-sr fusions; the Tucker fusion takes half of each size."""
    synthetic_clips: int = 2000
    """Number of clips of the built-in set."""
    synthetic_speakers: int = 2000
    """Number of speakers of the built-in set. Many, because only a model that has seen many faces
    can read an articulation off an unseen one."""
    patience: int = 5
    """Number of validations (10 to a row) without a better PSNR after which a row stops; 0 means
    never."""
    clips: int = 60
    """Number of test clips, spread over the speakers."""
    jobs: int = 0
    """Number of runs at a time; 0 means one per core, or one on a GPU."""
    kernels: Kernels = "auto"
    """Kernels that compute the fused operators. An explicit choice works or says why not."""
    device: str = "auto"
    """Device to compute on: auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        unknown = [row for row in self.rows if row not in ROWS]
        if unknown or not self.rows:
            raise UserError(
                f"--rows {' '.join(unknown) or '(none)'}: expected some of {', '.join(ROWS)}"
            )
        if len(set(self.rows)) < len(self.rows):
            raise UserError(f"--rows {' '.join(self.rows)}: expected each row once")
        check_sizes(self, POSITIVE, NOT_NEGATIVE)

    def at_once(self) -> int:
        """How many runs share the machine."""
        cpu = pick_device(self.device).type == "cpu"
        return self.jobs or ((os.cpu_count() or 1) if cpu else 1)

    def base(self) -> TrainConfig:
        """What all trainings have in common."""
        preset = PRESETS[self.preset]
        fused = preset.model.audio_dim + preset.model.identity_dim  # m = a + d, as in the paper
        sizes = dataclasses.replace(preset.model, fused_dim=fused, rank=self.rank)
        return dataclasses.replace(
            preset,
            **PROTOCOL[self.preset],
            model=sizes,
            data=self.data,
            kernels=self.kernels,
            device=self.device,
            batch_size=self.batch_size,
            frames=self.frames,
            patience=self.patience,
            validation_clips=min(16, self.clips),
            workers=0 if self.at_once() > 1 else 2,
            synthetic_clips=self.synthetic_clips,
            synthetic_speakers=self.synthetic_speakers,
            synthetic_motion=0.0,
        )

    def scheduled(self, base: TrainConfig, steps: int) -> TrainConfig:
        """A training of so many steps: ten validations and checkpoints."""
        every = max(1, steps // 10)
        return dataclasses.replace(
            base, steps=steps, validate_every=every, checkpoint_every=every, sample_every=steps
        )


TABLES = {
    "paper": Table1Config(),
    "small": Table1Config(
        preset="small",
        pretrain_steps=1000,
        steps=1000,
        batch_size=8,
        frames=8,
        rank=64,
        synthetic_clips=400,
        synthetic_speakers=100,
    ),
    "demo": Table1Config(
        preset="demo",
        pretrain_steps=1600,
        steps=800,
        batch_size=8,
        frames=10,
        rank=64,
        synthetic_clips=2400,
        synthetic_speakers=2400,
    ),
}


def parse(args: list[str] | None = None, about: str = "") -> Table1Config:
    """Read the command line; the preset gives the defaults of the rest.

    ``about`` is what ``--help`` begins with, before the names of the rows.
    """
    args = sys.argv[1:] if args is None else args
    preset = option(args, "--preset") or default_preset()
    titles = [f"  {key:<15} {row.title}" for key, row in ROWS.items()]
    titles.insert(len(PAPER_ROWS), "beyond the paper's:")
    return tyro.cli(
        Table1Config,
        args=args,
        default=TABLES.get(preset, TABLES["demo"]),
        prog="python -m train.table1",
        description="\n".join([about, "", "Rows:", *titles]),
    )
