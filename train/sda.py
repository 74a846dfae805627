"""Take in the published system's checkpoints as runs, and give them back.

    python -m train.sda import grid.dat OUT      OUT is a run: evaluate it, or take its encoders
    python -m train.sda export OUT again.dat     the file again, for the published code

The published system is that of Vougioukas et al., IJCV 2019, whose package is called sda. Its files
are pickles: of those nothing is unpickled but tensors, NumPy arrays, numbers, text and containers
of them, and every tensor is checked before OUT is made.
"""

import functools
import inspect
import re
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from model import ModelConfig, TalkingFace
from model.published import (
    STATES,
    STILL,
    VALUES,
    from_published,
    published_config,
    published_tensors,
    to_published,
)
from train.config import TrainConfig
from train.data.align import FRAME
from train.data.landmarks import FIVE
from train.errors import UserError, run
from train.export import write_run
from train.files import as_json, replacing
from train.run.checkpoint import load_run, read_checkpoint

MEAN_FACE = "mean_face"
#: What a run keeps of a checkpoint beside the model: this tensor, and this record of its values.
KEPT_TENSOR, KEPT_VALUES = f"sda.{MEAN_FACE}", "sda"

File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


@dataclass(frozen=True)
class Published:
    """What a checkpoint of the published system holds."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    """Every tensor of its three state dicts, by ``STATE.name``."""
    mean_face: Tensor
    """(68, 2) landmarks as (x, y) in pixels of a frame, to which faces are aligned."""
    values: dict[str, Any]
    """Sizes and rates, :data:`model.published.VALUES`."""


def import_checkpoint(source: File, out: Out) -> Path:
    """Make a run of a checkpoint of the published system.

    Example: python -m train.sda import grid.dat runs/sda-grid

    Args:
        source: Checkpoint: grid.dat, crema.dat or timit.dat.
        out: Directory to make; it must not hold anything yet.

    Returns:
        ``out``.

    Raises:
        UserError: the file is no checkpoint of the published system, or ``out`` cannot be written.
    """
    found = read_published(source)
    with torch.device("meta"):  # weights that are replaced at once need not be drawn
        model = TalkingFace(found.config, "concat", "eager")
    model.load_state_dict(from_published(found.config, found.tensors), assign=True)
    face = nn.Module()
    face.register_buffer(MEAN_FACE, found.mean_face)
    config = TrainConfig(
        fusion="concat",
        alignment="dlib",
        places=places(found.mean_face.numpy(), found.config),
        model=found.config,
    )
    info = {"step": 0, KEPT_VALUES: as_json(found.values)}
    write_run(out, config, {"model": model, KEPT_VALUES: face}, info)
    print(f"{out}: {len(found.tensors)} tensors of {source}; take its encoders with")
    options = f"--model.sample-rate {found.config.sample_rate} --model.fps {found.config.fps:g}"
    options += f" --encoders {shlex.quote(str(out))}"
    print(f"  python -m train --preset paper --data PREPARED {options}")
    return out


def export_checkpoint(source: Run, out: Out) -> Path:
    """Write the checkpoint of the published system that a run was made of.

    Example: python -m train.sda export runs/sda-grid grid.dat

    Args:
        source: Run directory that ``python -m train.sda import`` made.
        out: File to write; it must not exist yet.

    Returns:
        ``out``.

    Raises:
        UserError: the run was not imported, or ``out`` cannot be written.
    """
    config, model = load_run(source, torch.device("cpu"), "eager")
    tensors, info = read_checkpoint(source)
    if KEPT_VALUES not in info or KEPT_TENSOR not in tensors:
        raise UserError(
            f"{source}: no run of `python -m train.sda import`; the published code needs the mean "
            "face that a checkpoint comes with"
        )
    values = info[KEPT_VALUES]
    whole: dict[str, Any] = {state: {} for state in STATES}
    for name, tensor in to_published(config.model, model.state_dict()).items():
        state, name = name.split(".", 1)
        whole[state][name] = tensor.clone(memory_format=torch.contiguous_format)
    whole |= values | {"img_size": tuple(values["img_size"])}
    whole[MEAN_FACE] = tensors[KEPT_TENSOR].numpy()
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name")
    try:
        with replacing(out) as temporary:
            torch.save(whole, temporary, _use_new_zipfile_serialization=False)
    except (OSError, RuntimeError) as error:  # of PyTorch's own writing, the latter
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{out}: cannot be written ({reason})") from None
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return out


def read_published(path: Path) -> Published:
    """Read and check a checkpoint of the published system; :class:`UserError` if it is none.

    Values and tensors that the published code does not read may be there and are left out.
    """
    whole = load_plain(path)
    if not isinstance(whole, dict):
        raise UserError(f"{path}: holds a {type(whole).__name__}, expected a dict of state dicts")
    for name in (*STATES, *VALUES, MEAN_FACE):
        if name not in whole:
            raise UserError(f"{path}: no {name} there, so it is no checkpoint of the published sda")
    tensors = {}
    for state in STATES:
        if not isinstance(whole[state], dict):
            kind = type(whole[state]).__name__
            raise UserError(f"{path}: {state} is a {kind}, expected a state dict")
        for name, value in whole[state].items():
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise UserError(f"{path}: {state}.{name} is a {kind}, expected a tensor")
            tensors[f"{state}.{name}"] = value
    try:
        values = {name: _plain(name, whole[name]) for name in VALUES}
        if STILL not in tensors or tensors[STILL].ndim != 4:
            raise ValueError(f"{STILL} is missing or no image convolution")
        config = published_config(values, len(tensors[STILL]))
        check_tensors(tensors, published_tensors(config))
        return Published(config, tensors, _mean_face(whole[MEAN_FACE]), values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def load_plain(path: Path) -> Any:
    """Unpickle what ``torch.save`` wrote, in either of its formats, to the CPU.

    Only tensors, NumPy's arrays and numbers, and Python's own numbers, text and containers;
    :class:`UserError` names anything else, and what is no such file.
    """
    try:
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise UserError(
                    f"{path}: a Git LFS pointer, not the file itself; get that with `git lfs pull`"
                )
        with warnings.catch_warnings(), torch.serialization.safe_globals(numpy_globals()):
            warnings.simplefilter("ignore")  # of pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except Exception as error:  # the restricted unpickler raises whatever a bad file leads to
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path}: asks for {refused[1]!r}, which no weights need; nothing of it was run"
            ) from None
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"{path}: not a file of torch.save, or a damaged one ({line})") from None


@functools.cache
def numpy_globals() -> list[Any]:
    """What pickles of NumPy's arrays and numbers ask for, under the names of old files too."""
    rebuild, scalar = (x.__reduce__()[0] for x in (np.empty(0), np.float64(0)))
    kinds = [type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8", "bool")]
    named: list[Any] = [(np.dtype, "numpy.dtype"), (np.ndarray, "numpy.ndarray"), *kinds]
    for package in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        named.append((rebuild, f"{package}.multiarray._reconstruct"))
        named.append((scalar, f"{package}.multiarray.scalar"))
    return named


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` naming the first of ``tensors`` that is not as ``expected``, or is
    missing, unknown, or not finite."""
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected:
            raise ValueError(f"{name} is {'unknown' if name in tensors else 'missing'}")
        value, like = tensors[name], expected[name]
        if value.shape != like.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected {tuple(like.shape)} by the sizes "
                "and rates that the file states"
            )
        if value.dtype != like.dtype or value.layout != torch.strided:
            raise ValueError(f"{name} is of {value.dtype}, {value.layout}: expected {like.dtype}")
        if not value.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        if not value.isfinite().all():
            raise ValueError(f"{name} has values that are infinite or no numbers")
        if name.endswith("running_var") and value.min() < 0:
            raise ValueError(f"{name} has a negative variance")


def places(mean_face: np.ndarray, config: ModelConfig) -> tuple[tuple[float, float], ...]:
    """Give where alignment puts the five points that speech hardly moves, in a 96×128 frame."""
    scale = np.array([FRAME[1] / config.width, FRAME[0] / config.height])
    five = (mean_face[list(FIVE)].astype(np.float64) + 0.5) * scale - 0.5
    return tuple((float(x), float(y)) for x, y in five)


def _mean_face(value: Any) -> Tensor:
    """A mean face as a tensor of its own; ``ValueError`` if it is none."""
    if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.float64):
        raise ValueError(f"{MEAN_FACE} is a {type(value).__name__}, expected an array of floats")
    if value.shape != (68, 2) or not np.isfinite(value).all() or not np.ptp(value, 0).all():
        raise ValueError(
            f"{MEAN_FACE} of shape {value.shape}: expected 68 landmarks (x, y), finite and apart"
        )
    return torch.from_numpy(value.copy())


def _plain(name: str, value: Any) -> Any:
    """A value of the checkpoint, NumPy's numbers as Python's; ``ValueError`` if it is no number."""
    if isinstance(value, list | tuple):
        return tuple(_plain(name, x) for x in value)
    number = value.item() if isinstance(value, np.generic) else value
    if not isinstance(number, int | float):
        raise ValueError(f"{name} is a {type(number).__name__}, expected a number")
    return number


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    command = functools.partial(
        tyro.extras.subcommand_cli_from_dict,
        {"import": import_checkpoint, "export": export_checkpoint},
        prog="python -m train.sda",
        description=inspect.cleandoc(__doc__ or ""),
    )
    return run(command)


if __name__ == "__main__":
    sys.exit(main())
