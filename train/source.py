"""Where the clips of a run come from: a prepared set, or the built-in one rendered on demand."""

import os
from pathlib import Path

from train.config import TrainConfig
from train.errors import UserError
from train.prepare import prepare_synthetic

#: Height and width of the built-in set.
FULL_SIZE = (128, 96)


def find_data(config: TrainConfig, small: bool = False) -> Path:
    """Find the prepared set to read; the built-in one is rendered on first use and kept.

    ``small`` renders it at the model's size, for many speakers in little space; otherwise it has
    the full size and is reduced when read.
    """
    if config.data != "synthetic":
        return Path(config.data)
    model = config.model
    cache = _cache() / "polyfusion"
    name = f"synthetic-{config.synthetic_clips}x{config.synthetic_speakers}-{model.sample_rate}"
    size = (model.height, model.width) if small else FULL_SIZE
    name += f"-{model.fps:g}-{config.synthetic_motion:g}"
    return prepare_synthetic(
        cache / (name if size == FULL_SIZE else f"{name}-{model.height}x{model.width}"),
        size=size,
        clips=config.synthetic_clips,
        speakers=config.synthetic_speakers,
        motion=config.synthetic_motion,
        sample_rate=model.sample_rate,
        fps=model.fps,
    )


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without an entry, as in a container
        raise UserError(
            "--data synthetic: no home directory to keep the built-in set in; "
            "set HOME or XDG_CACHE_HOME to a directory that can be written to"
        ) from None
