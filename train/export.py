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
from typing import Annotated

import torch
import tyro

from train.config import CONFIG_FILE, load_config
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
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        if any(config.out.iterdir()):
            raise UserError(f"{config.out}: not empty; choose another directory")
        record = settings.to_dict() | {"data": Path(settings.data).name}
        write_json(config.out / CONFIG_FILE, record)
        info = {"step": info["step"], "config": record}
        save_checkpoint(config.out / CHECKPOINT_FILE, {"model": model.half()}, {}, info)
    except OSError as error:
        raise UserError(f"{config.out}: cannot be written ({error.strerror})") from None
    size = (config.out / CHECKPOINT_FILE).stat().st_size / 1e6
    print(f"{config.out}: the weights of step {info['step']}, {size:.1f} MB")
    return config.out


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    return run(lambda: export(tyro.cli(ExportConfig, prog="python -m train.export")))


if __name__ == "__main__":
    sys.exit(main())
