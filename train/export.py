"""Keep what a trained run needs to be used: its configuration and the weights, in 16 bits.

    python -m train.export RUN OUT

OUT is a run directory to evaluate or to take encoders from, a tenth of RUN's size: without the
discriminators and the optimisers' state there is no resuming it. Where RUN keeps a running average
of the weights, that is what is exported.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from train.config import CONFIG_FILE, TrainConfig, load_config
from train.errors import UserError, run
from train.files import write_json
from train.run.checkpoint import (
    CHECKPOINT_FILE,
    load_run,
    read_checkpoint,
    run_of,
    save_checkpoint,
)


@dataclass(frozen=True)
class ExportConfig:
    """Keep what a trained run needs to be used: its configuration and the weights, in 16 bits.

    Example: python -m train.export runs/cp-1 talking-face
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory to export, or one of its checkpoints, such as RUN/best.safetensors."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory to make; it must not hold anything yet."""


def export(config: ExportConfig) -> Path:
    """Write OUT; :class:`UserError` for a run that cannot be read or an OUT that is in use."""
    settings = dataclasses.replace(
        load_config(run_of(config.source)), out=None, resume=None, average=0.0
    )
    _, model = load_run(config.source, torch.device("cpu"), "eager")
    _, info = read_checkpoint(config.source)
    settings = dataclasses.replace(settings, data=Path(settings.data).name)
    write_run(config.out, settings, {"model": model.half()}, {"step": info["step"]})
    size = (config.out / CHECKPOINT_FILE).stat().st_size / 1e6
    print(f"{config.out}: the weights of step {info['step']}, {size:.1f} MB")
    return config.out


def write_run(
    out: Path, config: TrainConfig, modules: dict[str, nn.Module], info: dict[str, Any]
) -> None:
    """Write a run directory to use and not to go on with, ``info`` and ``config`` in its
    checkpoint; :class:`UserError` if ``out`` is in use or cannot be written."""
    record = config.to_dict()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{out}: not empty; choose another directory")
        write_json(out / CONFIG_FILE, record)
        save_checkpoint(out / CHECKPOINT_FILE, modules, {}, {**info, "config": record})
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    return run(lambda: export(tyro.cli(ExportConfig, prog="python -m train.export")))


if __name__ == "__main__":
    sys.exit(main())
