"""The configuration of a training run: presets, command line and its record on disk."""

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from model import ModelConfig
from model.config import Fusion, Kernels
from train.errors import UserError
from train.fields import kinds_of, wrong_field
from train.files import as_json

CONFIG_FILE = "config.json"
#: What may differ between a run and its resumption; everything else is what the run is.
RESUMABLE = {
    "steps",
    "kernels",
    "data",
    "device",
    "out",
    "workers",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep",
    "validate_every",
    "patience",
    "resume",
    "profile",
    "graph",
    "recompute",
}
#: What has to be at least 1, and at least 0.
POSITIVE = (
    "steps",
    "batch_size",
    "frames",
    "synthetic_clips",
    "synthetic_speakers",
    "log_every",
    "sample_every",
    "validate_every",
    "checkpoint_every",
    "keep",
    "validation_clips",
)
NOT_NEGATIVE = ("workers", "patience")


def check_sizes(config: Any, positive: Sequence[str], not_negative: Sequence[str] = ()) -> None:
    """Raise :class:`UserError` unless fields of ``config`` are at least 1, and at least 0."""
    for names, least, expected in (
        (positive, 1, "a positive number"),
        (not_negative, 0, "0 or more"),
    ):
        for name in names:
            if not getattr(config, name) >= least:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(config, name)}: expected {expected}")


def check_seed(seed: int) -> None:
    """Raise :class:`UserError` for a seed from which not every random source can be started."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: expected a number from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the objective, eqs (9)-(12) of the paper."""

    frame: float = 1.0
    """Weight λ_frame of the frame discriminator."""
    sequence: float = 0.2
    """Weight λ_seq of the sequence discriminator."""
    sync: float = 0.8
    """Weight λ_sync of the synchronisation discriminator."""
    l1: float = 600.0
    """Weight λ₁ of the mean absolute error on the bottom half of the frames."""
    l1_top: float = 0.0
    """Weight of the mean absolute error on the top half of the frames, which the paper leaves to
    the discriminators. A run of minutes is too short for that: the presets demo and small set
    it."""
    l1_mouth: float = 0.0
    """Weight of the mean absolute error in the mouth's box, on top of the bottom half's. Not in the
    paper."""
    l1_eyes: float = 0.0
    """Weight of the mean absolute error in the eyes' box of each frame as far as its eyes are
    closed, for a model with --model.eyes: closed eyes are too rare to count for anything else. Not
    in the paper."""
    drawn: float = 0.0
    """Weight of the share of the frames that is drawn instead of taken from the still, for a model
    with --model.composition mask or warp. What is drawn where nothing moves is learned by heart,
    and is wrong on other people. Not in the paper."""
    lips: float = 1.0
    """Weight of the squared error of the shape of the lips that the sound foretells, for a model
    with --model.lips. Not in the paper."""
    omega: float = 100.0
    """Weight λ₂ of the Frobenius penalty Ω on the fusion's parameters."""
    penalty: Literal["norm", "sumsq", "meansq", "none"] = "meansq"
    """Form of Ω: the sum of norms Σ‖P‖_F, of squares Σ‖P‖²_F, the mean square, or none. The literal
    norm with λ₂ = 100 drives the fusion to zero and the mouth stops moving (docs/results.md)."""
    saturating: bool = False
    """Let the generator minimise the literal log(1 − D) instead of −log D."""

    def __post_init__(self) -> None:
        for name in (
            "frame",
            "sequence",
            "sync",
            "l1",
            "l1_top",
            "l1_mouth",
            "l1_eyes",
            "drawn",
            "lips",
            "omega",
        ):
            if not getattr(self, name) >= 0:
                raise UserError(
                    f"--loss.{name.replace('_', '-')} {getattr(self, name)}: expected a number >= 0"
                )


@dataclass(frozen=True)
class TrainConfig:
    """Train the polynomial-fusion talking-face GAN, or the Speech2Vid baseline.

    Examples:

      python -m train --fusion cp --kernels triton        built-in data, a few minutes on a CPU
      python -m train --data PREPARED --preset paper      the paper's sizes on a prepared set
      python -m train --system speech2vid                 the baseline trained with L1 alone
      python -m train --resume runs/cp-1 --steps 2000     go on with a run

    Prepare a set with python -m train.prepare. Add --preset paper to --help to see its defaults.
    """

    preset: Literal["paper", "small", "demo"] = "paper"
    """Sizes and schedule to start from: paper, the paper's; small, the paper's frames with a
    smaller network; or demo, small frames too, for a few minutes of two CPU cores (default: paper
    with a GPU, demo without). Every other flag overrides the preset."""
    system: Literal["polyfusion", "speech2vid"] = "polyfusion"
    """System to train: polyfusion, the paper's GAN, or speech2vid, the baseline trained with L1
    alone. Of the sizes below, speech2vid uses the frame's, the rates and --model.base-channels."""
    fusion: Fusion = "cp"
    """Form of the fusion, which makes the joint representation of audio and identity."""
    kernels: Kernels = "auto"
    """Kernels that compute the fused operators. An explicit choice works or says why not."""
    data: str = "synthetic"
    """Clips to train on: synthetic (the built-in set) or the directory of a prepared set. A run
    that is gone on with takes the same set from another place."""
    encoders: str = "joint"
    """Source of the encoders: joint trains them with everything else; a run directory or a
    checkpoint is one to load them from, to be frozen."""
    out: Path | None = None
    """Run directory to write (default: a fresh one under runs/)."""
    resume: Path | None = None
    """Run directory to go on with from its last checkpoint; its own settings are the defaults."""
    steps: int = 40_000
    """Number of training steps, of one update of the discriminators and one of the generator."""
    batch_size: int = 16
    """Number of clips in a step."""
    frames: int = 75
    """Number of frames in a training clip, T (3 s at 25 frames/s in the paper)."""
    limit: int | None = None
    """Number of clips to train on, the first of the set (default: all)."""
    synthetic_clips: int = 2000
    """Number of clips of the built-in set."""
    synthetic_speakers: int = 200
    """Number of speakers of the built-in set."""
    synthetic_motion: float = 1.0
    """Amount of movement of the built-in set's heads; 0 holds them still, as alignment does."""
    mirror: bool = True
    """Flip training clips left to right at random."""
    augment: bool = False
    """Change the picture of every training clip at random: place, size, turn, light and colours."""
    any_still: bool = False
    """Train with any frame of a clip as its still, instead of the first of the frames shown."""
    balance: float = 0.0
    """Evenness with which speakers are seen: 0 takes every clip equally often, 1 every speaker; a
    speaker with n clips is drawn in proportion to n^(1 − balance)."""
    average: float = 0.0
    """Share of the running average of the model's weights that is kept at each step. Validation,
    samples and evaluation use the average; 0 means the weights themselves."""
    lr_generator: float = 1e-4
    """Adam's learning rate for the generator, fusion and encoders."""
    code_rate: float = 1.0
    """Learning rate of the last layer of the identity encoder, times the generator's. Below 1 it
    keeps z_d from sticking to the ends of its tanh, where a fusion has nothing to multiply."""
    lr_frame: float = 1e-4
    """Adam's learning rate for the frame discriminator."""
    lr_sequence: float = 1e-5
    """Adam's learning rate for the sequence discriminator."""
    lr_sync: float = 1e-5
    """Adam's learning rate for the synchronisation discriminator."""
    betas: tuple[float, float] = (0.5, 0.999)
    """Adam's momenta β₁ and β₂."""
    anneal: float = 0.0
    """Share of the steps, at the end, over which the learning rates fall linearly to zero."""
    deblur_share: float = 0.25
    """Share of the steps, at the end, that train speech2vid's deblurring network and nothing else;
    the learning rate falls in each of the two stages."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the computation; auto takes bf16 autocast on a GPU and fp32 on a CPU."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Record the GAN's step in a CUDA graph after some steps and launch it as a whole; auto does so
    where it can be done and says why elsewhere."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Let the fused kernels on a GPU make the generator's activations again in the backward instead
    of keeping them; auto keeps them if they take less than a tenth of the GPU's memory."""
    device: str = "auto"
    """Device to compute on: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the initialisation, data order, crops and noise."""
    workers: int = 2
    """Number of processes that read clips."""
    log_every: int = 10
    """Number of steps between two lines of metrics.jsonl."""
    sample_every: int = 1000
    """Number of steps between two picture grids and videos."""
    validate_every: int = 500
    """Number of steps between two validations."""
    checkpoint_every: int = 500
    """Number of steps between two checkpoints."""
    keep: int = 2
    """Number of checkpoints to keep, in case the newest is damaged; the best model by validation is
    kept beside them."""
    patience: int = 0
    """Number of validations in a row without a better PSNR after which the run stops; 0 means
    never."""
    validation_clips: int = 16
    """Number of clips to validate on, the same at every validation and with the same noise."""
    validation_split: Literal["train", "val", "test"] = "val"
    """Clips to validate on; train shows how well a run reconstructs what it saw."""
    profile: bool = False
    """Time the parts of the first 20 steps, print where the time goes and save it with a trace."""
    alignment: Annotated[str, tyro.conf.Suppress] = "none"
    """How the faces of the set were aligned (``--landmarks`` of ``train.prepare``), which a still
    must be too; read from the set."""
    places: Annotated[tuple[tuple[float, float], ...] | None, tyro.conf.Suppress] = None
    """Places (x, y), in a frame of 96 by 128 pixels, of the five points that alignment by landmarks
    takes there (default: those of ``train.data.landmarks``); imported checkpoints bring theirs."""
    data_identity: Annotated[str, tyro.conf.Suppress] = ""
    """What the set is, wherever it lies (``train.data.prepared.read_identity``): a run goes on with
    the same; read from the set."""
    loss: LossConfig = field(default_factory=LossConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        check_sizes(self, POSITIVE, NOT_NEGATIVE)
        check_seed(self.seed)
        if not self.code_rate > 0:
            raise UserError(f"--code-rate {self.code_rate}: expected a positive number")
        if not 0 <= self.balance <= 1:
            raise UserError(f"--balance {self.balance}: expected a share from 0 to 1")
        if not 0 <= self.average < 1:
            raise UserError(f"--average {self.average}: expected a share from 0 to below 1")
        if not 0 <= self.anneal <= 1:
            raise UserError(f"--anneal {self.anneal}: expected a share between 0 and 1")
        if not 0 <= self.deblur_share < 1:
            raise UserError(
                f"--deblur-share {self.deblur_share}: expected a share from 0 to below 1"
            )
        if self.system == "speech2vid":
            for name, default in (("fusion", "cp"), ("encoders", "joint")):
                if getattr(self, name) != default:
                    raise UserError(
                        f"--{name} {getattr(self, name)} with --system speech2vid, which has no "
                        f"fusion and encoders of its own; leave --{name} out"
                    )
            if self.patience and self.deblur_share:
                raise UserError(
                    f"--patience {self.patience} with --system speech2vid, whose deblurring "
                    "network is trained at the end; leave --patience out, or pass --deblur-share 0"
                )
            if self.model.sample_rate < 8000:
                raise UserError(
                    f"--model.sample-rate {self.model.sample_rate} with --system speech2vid: "
                    "expected at least 8000 Hz, its sound features reach up to 3700 Hz"
                )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: expected a positive number of clips")
        if self.frames < self.model.snippet_frames:
            raise UserError(
                f"--frames {self.frames}: expected at least {self.model.snippet_frames}, the 0.2 s "
                "that the synchronisation discriminator sees"
            )

    def located(self) -> "TrainConfig":
        """Return the configuration with absolute paths, which mean the same from every folder."""
        data, encoders = self.data, self.encoders
        return dataclasses.replace(
            self,
            data=data if data == "synthetic" else os.path.abspath(data),
            encoders=encoders if encoders == "joint" else os.path.abspath(encoders),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return as_json(dataclasses.asdict(self))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "TrainConfig":
        """Make a configuration of what :meth:`to_dict` returned.

        Raises :class:`UserError` that names a field of another type.
        """
        wrong = wrong_field(values, kinds_of(TrainConfig))
        for name, cls in (("loss", LossConfig), ("model", ModelConfig)):
            wrong = wrong or wrong_field(values[name], kinds_of(cls), name)
        if wrong:
            raise UserError(wrong)
        values = dict(values)
        values["loss"] = LossConfig(**values["loss"])
        values["model"] = ModelConfig(**values["model"])
        values["betas"] = tuple(values["betas"])
        if values.get("places") is not None:
            values["places"] = tuple(map(tuple, values["places"]))
        for name in ("out", "resume"):
            values[name] = Path(values[name]) if values[name] else None
        return TrainConfig(**values)


PRESETS = {
    "paper": TrainConfig(),
    "demo": TrainConfig(
        preset="demo",
        steps=300,
        batch_size=5,
        frames=8,
        synthetic_clips=64,
        synthetic_speakers=2,
        mirror=False,
        lr_generator=1e-3,
        lr_frame=2e-4,
        lr_sequence=1e-4,
        lr_sync=1e-4,
        betas=(0.9, 0.99),  # with 0.999 the mouths' small gradients stay scaled down to the end
        anneal=0.4,
        workers=1,
        log_every=5,
        sample_every=150,
        validate_every=150,
        checkpoint_every=30,
        validation_clips=4,
        loss=LossConfig(l1_top=300.0, omega=1.0),
        model=ModelConfig(
            height=64,
            width=48,
            depth=4,
            base_channels=16,
            identity_dim=32,
            audio_dim=64,
            audio_layers=1,
            fused_dim=64,
            rank=32,
            frame_disc_channels=16,
            sequence_disc_channels=8,
            sequence_dim=32,
            sync_disc_channels=16,
            sync_dim=32,
        ),
    ),
    "small": TrainConfig(
        preset="small",
        steps=2200,
        batch_size=8,
        frames=8,
        synthetic_clips=400,
        synthetic_speakers=100,
        augment=True,
        any_still=True,
        balance=0.7,
        average=0.998,
        lr_generator=1e-3,
        lr_frame=2e-4,
        lr_sequence=1e-4,
        lr_sync=1e-4,
        betas=(0.5, 0.99),
        anneal=0.5,
        workers=1,
        sample_every=500,
        validate_every=500,
        checkpoint_every=100,
        validation_clips=8,
        # With the paper's adversarial weights and this few steps it lost to the still on unseen
        # people; by L1 alone it did not (docs/real_faces.md).
        loss=LossConfig(
            frame=0.0,
            sequence=0.0,
            sync=0.0,
            l1=300.0,
            l1_top=300.0,
            l1_mouth=800.0,
            l1_eyes=1000.0,
            drawn=40.0,
            omega=1.0,
        ),
        model=ModelConfig(
            base_channels=16,
            identity_dim=64,
            audio_encoder="mel",
            audio_dim=96,
            composition="warp",
            eyes=True,
            lips=True,
            eyes_gain=1.5,
            lips_gain=1.3,
            fused_dim=128,
            rank=64,
            frame_disc_channels=16,
            sequence_disc_channels=4,
            sequence_dim=64,
            sync_disc_channels=16,
            sync_dim=64,
        ),
    ),
}


def default_preset() -> str:
    """Return ``paper`` on a machine with a CUDA device, ``demo`` on any other."""
    return "paper" if torch.cuda.is_available() else "demo"


def option(args: list[str], name: str) -> str | None:
    """Return the value of ``--name value`` or ``--name=value`` in ``args``, if it is there."""
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(name + "="):
            return arg.split("=", 1)[1]
    return None


def parse(args: list[str] | None = None) -> TrainConfig:
    """Read the command line. The preset, or the run resumed, gives the defaults of the rest.

    Raises :class:`UserError` for values that make no sense, and exits (code 2) on usage errors.
    """
    args = sys.argv[1:] if args is None else args
    resume = option(args, "--resume")
    preset = option(args, "--preset")
    if resume is not None:
        default = load_config(Path(resume))
        if preset not in (None, default.preset):
            raise UserError(
                f"--preset {preset} with --resume {resume}: the run is a {default.preset} run; "
                "leave --preset out"
            )
    else:
        default = PRESETS.get(preset or default_preset(), PRESETS[default_preset()])
    config = tyro.cli(
        TrainConfig,
        args=args,
        default=default,
        prog="python -m train",
        description=inspect.cleandoc(TrainConfig.__doc__ or ""),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    config = config.located()
    check_objective(config, default)
    if resume is not None:
        check_same_run(config, default.located(), Path(resume))
        config = dataclasses.replace(config, out=Path(resume))
    return config


def check_objective(config: TrainConfig, default: TrainConfig) -> None:
    """Raise :class:`UserError` if speech2vid is given settings of the GAN's objective."""
    for name in ("loss", "lr_frame", "lr_sequence", "lr_sync"):
        if config.system == "speech2vid" and getattr(config, name) != getattr(default, name):
            flag = "loss.*" if name == "loss" else name.replace("_", "-")
            raise UserError(
                f"--{flag} with --system speech2vid, which is trained with L1 alone; leave it out"
            )


def load_config(run: Path) -> TrainConfig:
    """Read the resolved configuration of a run directory."""
    path = run / CONFIG_FILE
    try:
        return TrainConfig.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{run}: no {CONFIG_FILE} there, so it is no run directory") from None
    except (OSError, ValueError, TypeError, KeyError, UserError) as error:
        raise UserError(f"{path}: not a run configuration of this version ({error})") from None


def check_same_run(config: TrainConfig, saved: TrainConfig, run: Path) -> None:
    """Raise :class:`UserError` if ``config`` changes what the run in ``run`` is."""
    new, old = config.to_dict(), saved.to_dict()
    for group in ("loss", "model"):
        for values in (new, old):
            values.update({f"{group}.{k}": v for k, v in values.pop(group).items()})
    changed = [
        f"--{name.replace('_', '-')} {new[name]} (the run has {old[name]})"
        for name in new
        if name not in RESUMABLE and new[name] != old[name]
    ]
    if changed:
        raise UserError(
            f"{run} holds a run of another configuration: {', '.join(changed)}; "
            "leave these flags out, or start a new run with another --out"
        )
