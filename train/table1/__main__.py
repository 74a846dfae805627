"""The paper's Table 1: train and evaluate every row under one protocol, and print the table.

    python -m train.table1                                   built-in set, demo size, two CPU cores
    python -m train.table1 --data PREPARED --preset paper    the paper's sizes on a prepared set
    python -m train.table1 --rows cp cp-none --seeds 1       some rows only; all are named below

The protocol: a SyncNet and an identity embedder are trained for the metrics; the encoders are
pretrained with concatenation and frozen; every row then trains its fusion, generator and
discriminators (Speech2Vid trains everything) with the same number of steps, clips and frames, once
per seed, stops when the validation's PSNR no longer rises (not Speech2Vid), and is tested on
speakers of the test split. A run that was stopped or killed goes on with the same command.

OUT/table.md, table.json     the table so far, written after every row
OUT/report.html              table, pictures, videos and curves in one file
OUT/<row>-<seed>/            the runs; also pretrain, syncnet.safetensors, embedder.safetensors
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from train.checkpoint import CHECKPOINT_FILE, read_checkpoint
from train.cli import run
from train.config import PRESETS, LossConfig, TrainConfig, UserError, default_preset, option
from train.data.batches import open_set
from train.data.prepared import write_atomically
from train.embedder import EmbedderConfig, train_embedder
from train.evaluate import EVALUATION_FILE, EvaluateConfig, evaluate
from train.loop import find_data, pick_device, train
from train.methods import METHODS, PAPER_ROWS
from train.rundir import read_metrics, stalled
from train.syncnet import SyncNetConfig, train_syncnet
from train.table1_report import PRETRAIN, SETTINGS_FILE, TRUTH, write_report, write_table
from train.tasks import Task, TaskFailed, run_tasks

SYNCNET, EMBEDDER = "syncnet.safetensors", "embedder.safetensors"
#: What may differ between a table and its continuation.
MAY_CHANGE = ("rows", "seeds", "jobs", "kernels", "device", "out")


#: How a row trains, where the preset's own schedule is for another purpose.
PROTOCOL: dict[str, dict[str, Any]] = {
    "paper": {},
    "demo": {"lr_generator": 2e-3, "lr_frame": 2e-4, "lr_seq": 1e-4, "lr_sync": 1e-4,
             "betas": (0.5, 0.999), "anneal": 0.5, "code_rate": 0.02, "mirror": True,
             "log_every": 10, "loss": LossConfig(l1_top=300.0)},
}  # fmt: skip


@dataclass(frozen=True)
class Table1Config:
    """Train and evaluate every row of the paper's Table 1 under one protocol."""

    preset: Literal["paper", "demo"] = "paper"
    """Sizes and budget: the paper's, or a demo for two CPU cores (default: paper with a GPU, demo
    without)."""
    data: str = "synthetic"
    """`synthetic` (the built-in set) or the directory of a prepared set."""
    out: Path = Path("runs/table1")
    """Directory of the runs, the table and the report."""
    rows: tuple[str, ...] = tuple(PAPER_ROWS)
    """Rows to fill."""
    seeds: int = 3
    """Runs per row, with seeds 0, 1, …"""
    pretrain_steps: int = 40_000
    """Steps of the encoders' pretraining with concatenation."""
    steps: int = 40_000
    """Steps of every row."""
    batch_size: int = 16
    """Clips per step."""
    frames: int = 75
    """Frames per clip, T."""
    rank: int = 128
    """Rank k of CP and CMF."""
    synthetic_clips: int = 2000
    """Clips of the built-in set."""
    synthetic_speakers: int = 2000
    """Speakers of the built-in set: an articulation is read off an unseen face only by who has seen
    many."""
    patience: int = 5
    """Stop a row after so many validations (10 to a row) without a better PSNR; 0: never."""
    clips: int = 60
    """Test clips, spread over the speakers."""
    jobs: int = 0
    """Runs at a time; 0: one per core, one on a GPU."""
    kernels: Literal["auto", "eager", "triton", "cuda"] = "auto"
    """Who computes the fused operators."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        unknown = [row for row in self.rows if row not in METHODS]
        if unknown or not self.rows:
            raise UserError(
                f"--rows {' '.join(unknown) or '(none)'}: expected some of {', '.join(METHODS)}"
            )
        for name in ("seeds", "pretrain_steps", "steps", "batch_size", "frames", "rank", "clips",
                     "synthetic_clips", "synthetic_speakers"):  # fmt: skip
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: expected a positive number")
        if len(set(self.rows)) < len(self.rows):
            raise UserError(f"--rows {' '.join(self.rows)}: expected each row once")
        for name in ("jobs", "patience"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: expected 0 or more")

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
            preset, **PROTOCOL[self.preset], model=sizes,
            data=self.data, kernels=self.kernels, device=self.device,
            batch_size=self.batch_size, frames=self.frames, patience=self.patience,
            validation_clips=min(16, self.clips), workers=0 if self.at_once() > 1 else 2,
            synthetic_clips=self.synthetic_clips, synthetic_speakers=self.synthetic_speakers,
            synthetic_motion=0.0,
        )  # fmt: skip

    def scheduled(self, base: TrainConfig, steps: int) -> TrainConfig:
        """A training of so many steps: ten validations and checkpoints."""
        every = max(1, steps // 10)
        return dataclasses.replace(
            base, steps=steps, validate_every=every, checkpoint_every=every, sample_every=steps
        )


TABLES = {
    "paper": Table1Config(),
    "demo": Table1Config(
        preset="demo", seeds=3, pretrain_steps=1600, steps=800, batch_size=8, frames=10, rank=64,
        synthetic_clips=2400, synthetic_speakers=2400,
    ),
}  # fmt: skip


def table1(config: Table1Config) -> Path:
    """Fill the table; return the report's path."""
    out = config.out
    check_out(config)
    root = check_trainings(config)
    claim(config)
    failed = run_tasks(plan(config, root), out, config.at_once(), lambda _: write_table(out))
    text = write_table(out)
    report = write_report(out, root)
    print(f"\n{text}\n{report}")
    if failed:
        raise TaskFailed(
            f"failed: {', '.join(failed)}; see {out}/*.log; the same command tries again"
        )
    return report


def check_trainings(config: Table1Config) -> Path:
    """Check every row's settings, and that the data suit them; return the data's directory."""
    try:
        base = config.scheduled(config.base(), config.steps)
        for key in config.rows:
            METHODS[key].configure(base)
    except ValueError as error:
        raise UserError(str(error)) from None
    root = find_data(base, small=True)
    for split, frames in (("train", config.frames), ("val", None), ("test", None)):
        open_set(root, split, base.model, frames=frames)
    return root


def plan(config: Table1Config, root: Path) -> list[Task]:
    """Every piece of work, in the order in which it is begun; what is done already is left out."""
    out = config.out
    base = dataclasses.replace(config.base(), data=str(root))

    def measuring(run: Path, **options: Any) -> EvaluateConfig:
        return EvaluateConfig(
            run, data=str(root), clips=config.clips, syncnet=out / SYNCNET,
            embedder=out / EMBEDDER, kernels=config.kernels, device=config.device, **options,
        )  # fmt: skip

    def row(name: str, training: TrainConfig, *needs: str) -> Task:
        run = out / name
        training = dataclasses.replace(training, out=run)
        return Task(
            name, fill_row, (training, measuring(run)), needs, training.steps,
            at=lambda: progress(run), done=lambda: (run / EVALUATION_FILE).exists(),
        )  # fmt: skip

    pretraining = dataclasses.replace(base, fusion="concat")
    truth = measuring(out / PRETRAIN, ground_truth=True, out=out / f"{TRUTH}.json")
    jobs = [
        row(PRETRAIN, config.scheduled(pretraining, config.pretrain_steps), "networks"),
        Task("networks", train_networks, (out, str(root), config.device),
            done=lambda: (out / SYNCNET).exists() and (out / EMBEDDER).exists()),
        Task(TRUTH, evaluate, (truth,), ("networks", PRETRAIN),
            done=lambda: (out / f"{TRUTH}.json").exists()),
    ]  # fmt: skip
    for seed in range(config.seeds):
        for key in config.rows:
            method = METHODS[key]
            training = dataclasses.replace(
                method.configure(config.scheduled(base, config.steps)), seed=seed,
                encoders=str(out / PRETRAIN) if method.pretrained else "joint",
            )  # fmt: skip
            needs = ("networks", PRETRAIN) if method.pretrained else ("networks",)
            jobs.append(row(f"{key}-{seed}", training, *needs))
    return jobs


def fill_row(training: TrainConfig, measuring: EvaluateConfig) -> None:
    """Train a run, or go on with it, then test it."""
    run = measuring.target
    if (run / CHECKPOINT_FILE).exists():
        step = read_checkpoint(run)[1]["step"]
        if step < training.steps and not stalled(run, training.patience, step):
            train(dataclasses.replace(training, resume=run))
    else:
        if run.exists():
            shutil.rmtree(run)  # killed before its first checkpoint
        train(training)
    evaluate(measuring)


def train_networks(out: Path, root: str, device: str) -> None:
    """The two networks that measure; one that is there already is kept."""
    if not (out / EMBEDDER).exists():
        train_embedder(EmbedderConfig(out / EMBEDDER, data=root, device=device))
    if not (out / SYNCNET).exists():
        train_syncnet(SyncNetConfig(out / SYNCNET, data=root, device=device))


def progress(run: Path) -> int:
    """The last step that a run has logged."""
    lines = read_metrics(run)
    return lines[-1]["step"] if lines else 0


def settings_of(config: Table1Config) -> dict[str, Any]:
    """As JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def check_out(config: Table1Config) -> None:
    """UserError unless OUT is new or empty, or holds the same table."""
    path = config.out / SETTINGS_FILE
    try:
        if path.exists():
            old = json.loads(path.read_text())
            for key, value in settings_of(config).items():
                if key not in MAY_CHANGE and old.get(key) != value:
                    flag = key.replace("_", "-")
                    raise UserError(
                        f"{config.out} holds a table with --{flag} {old.get(key)}, not {value}; "
                        "leave the flag out or choose another --out"
                    )
        elif config.out.exists() and any(config.out.iterdir()):
            raise UserError(f"--out {config.out}: not empty and no table; choose another directory")
    except (OSError, ValueError) as error:
        raise UserError(f"--out {config.out}: cannot be used ({error})") from None


def claim(config: Table1Config) -> None:
    """Make OUT and keep the settings there."""
    text = json.dumps(settings_of(config), indent=2) + "\n"
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomically(config.out / SETTINGS_FILE, text.encode())
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be used ({error})") from None


def parse(args: list[str] | None = None) -> Table1Config:
    """Read the command line; the preset gives the defaults of the rest."""
    args = sys.argv[1:] if args is None else args
    preset = option(args, "--preset") or default_preset()
    titles = [f"  {key:<15} {method.title}" for key, method in METHODS.items()]
    titles.insert(len(PAPER_ROWS), "beyond the paper's:")
    return tyro.cli(
        Table1Config,
        args=args,
        default=TABLES.get(preset, TABLES["demo"]),
        prog="python -m train.table1",
        description="\n".join([inspect.cleandoc(__doc__ or ""), "", "Rows:", *titles]),
    )


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    return run(lambda: table1(parse()), "the same command goes on")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
