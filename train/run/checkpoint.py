"""Checkpoints: safetensors files with everything a run needs to go on, replaced atomically.

RUN/checkpoint.safetensors        the newest
RUN/checkpoint-000120.safetensors the one of step 120, kept in case the newest is damaged
RUN/best.safetensors              the model alone, as it was at the best validation
"""

import dataclasses
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.talking_face import ENCODERS
from train.config import TrainConfig, load_config
from train.errors import UserError
from train.files import replacing
from train.tensors import not_finite, read_tensors, write_tensors
from train.trainer.base import build_model

CHECKPOINT_FILE = "checkpoint.safetensors"
BEST_FILE = "best.safetensors"
_OLDER = re.compile(r"checkpoint-(\d+)\.safetensors")
_HEADER = "polyfusion"
#: What Adam keeps for a parameter.
_ADAM = {"step", "exp_avg", "exp_avg_sq"}


def save_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    info: dict[str, Any],
    keep: int = 0,
) -> None:
    """Write weights, Adam moments and ``info`` (JSON values); the old file stays until the end.

    Of a run ``keep`` checkpoints stay: the one that is replaced under the name of its step, and so
    on; 0 leaves what is beside ``path`` alone. Raises :class:`UserError` that names the tensor if
    one is not finite; nothing is written then.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    trained: dict[str, list[int]] = {}
    for name, optimizer in optimizers.items():
        state = optimizer.state_dict()["state"]
        trained[name] = sorted(state)
        for index, values in state.items():
            tensors |= {f"adam.{name}.{index}.{key}": value for key, value in values.items()}
    bad = not_finite(tensors)
    if bad is not None:
        raise UserError(f"{path}: not written, because {bad} has a value that is not finite")
    header = {_HEADER: json.dumps({**info, "adam": trained})}
    with replacing(path, durable=True) as temporary:
        write_tensors(temporary, tensors, header)
        if keep > 1:
            _keep_older(path)
    for older in _older(path.parent)[keep - 1 :] if keep else ():
        older.unlink()


def _keep_older(path: Path) -> None:
    """Give a checkpoint that is about to be replaced the name of its step, if it can be read."""
    with suppress(FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError):
        with safe_open(path, "pt") as file:
            step = json.loads(file.metadata()[_HEADER])["step"]
        older = path.with_name(f"{path.stem}-{step:06d}{path.suffix}")
        older.unlink(missing_ok=True)
        try:
            os.link(path, older)
        except OSError:  # a file system without hard links
            path.replace(older)


def _older(run: Path) -> list[Path]:
    """The checkpoints before the newest one, the last first."""
    found = {path: _OLDER.fullmatch(path.name) for path in run.glob("checkpoint-*.safetensors")}
    return sorted((p for p, match in found.items() if match), key=_step_of, reverse=True)


def _step_of(older: Path) -> int:
    return int(older.stem.rpartition("-")[2])


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run directory, the newest first."""
    return [path for path in [run / CHECKPOINT_FILE, *_older(run)] if path.exists()]


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and info of a checkpoint, or of the run directory that holds one.

    Of a run whose newest one is damaged the one before is read, which is said on stderr. Raises
    :class:`UserError` that names what is missing, damaged or not finite. A file without checksums,
    of an earlier version, is accepted.
    """
    return find_checkpoint(path)[1:]


def find_checkpoint(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Read as :func:`read_checkpoint`; say also which file it was."""
    files = checkpoints(path) if path.is_dir() else []
    failure: UserError | None = None
    for file in files or [path / CHECKPOINT_FILE if path.is_dir() else path]:
        try:
            tensors, info = _read(file)
        except UserError as error:
            failure = failure or error
            continue
        if failure is not None:
            print(
                f"{failure}; taking the one before, of step {info['step']}: {file}", file=sys.stderr
            )
        return file, tensors, info
    assert failure is not None
    raise failure


def go_back_to(file: Path) -> None:
    """Make an older checkpoint the newest again; those after it, all damaged, are removed."""
    if file.name == CHECKPOINT_FILE:
        return
    for other in _older(file.parent):
        if _step_of(other) > _step_of(file):
            other.unlink()
    file.replace(file.with_name(CHECKPOINT_FILE))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors, metadata = read_tensors(path)
        info = json.loads(metadata.get(_HEADER, "null"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one with `python -m train`") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error})") from None
    step = info.get("step") if isinstance(info, dict) else None
    if type(step) is not int or step < 0:
        raise UserError(f"{path}: not a checkpoint of `python -m train`")
    return tensors, info


def load_modules(modules: dict[str, nn.Module], tensors: dict[str, Tensor], source: Path) -> None:
    """Load every module's ``name.*`` tensors; :class:`UserError` if they do not fit."""
    for name, module in modules.items():
        prefix = name + "."
        state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        own = module.state_dict()
        wrong = sorted(own.keys() ^ state.keys())
        if wrong:
            raise UserError(f"{source}: {prefix}{wrong[0]} is missing on one side; another model?")
        for key, value in state.items():
            if value.shape != own[key].shape:
                raise UserError(
                    f"{source}: {prefix}{key} has shape {tuple(value.shape)}, this model's is "
                    f"{tuple(own[key].shape)}; use the same --preset and --model.* sizes"
                )
        module.load_state_dict(state)


def load_optimizers(
    optimizers: dict[str, torch.optim.Optimizer],
    tensors: dict[str, Tensor],
    info: dict[str, Any],
    source: Path,
) -> None:
    """Restore Adam moments and step counts; :class:`UserError` names what is missing of them."""
    for name, optimizer in optimizers.items():
        own, prefix = optimizer.state_dict(), f"adam.{name}."
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = _adam_state(tensors, prefix, parameters, source)
        # a file of an earlier version does not say which parameters have a state: the generator's
        unsaid = [] if state or name != "generator" else [0]
        for index in info.get("adam", {}).get(name, unsaid):
            if index not in state:
                raise UserError(f"{source}: {prefix}{index}.exp_avg is missing")
        own["state"] = state
        optimizer.load_state_dict(own)


def _adam_state(
    tensors: dict[str, Tensor], prefix: str, parameters: list[nn.Parameter], source: Path
) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith(prefix):
            continue
        number, _, field = key[len(prefix) :].partition(".")
        index = int(number) if number.isdecimal() else len(parameters)
        shape = parameters[index].shape if index < len(parameters) else None
        if shape is None or value.shape not in ((), shape):
            raise UserError(f"{source}: {key} has no parameter of its shape; another model?")
        if value.ndim:  # in the parameter's memory format: fused Adam needs that
            value = torch.empty_like(parameters[index]).copy_(value)
        state.setdefault(index, {})[field] = value
    for index, fields in state.items():
        for field in sorted(_ADAM ^ fields.keys()):
            side = "missing" if field in _ADAM else "unknown"
            raise UserError(f"{source}: {prefix}{index}.{field} is {side}")
    return state


def load_encoders(model: nn.Module, source: Path) -> None:
    """Load the three encoders of another run (the paper: one trained with concat fusion)."""
    tensors, _ = read_checkpoint(source)
    names = {f"model.{name}": getattr(model, name) for name in ENCODERS}
    load_modules(names, tensors, source)


def run_of(source: Path) -> Path:
    """The run directory of ``source``: itself, or that of a checkpoint in it."""
    return source.parent if source.is_file() else source


def load_run(
    source: Path, device: torch.device, kernels: str = "auto"
) -> tuple[TrainConfig, nn.Module]:
    """Load configuration and trained model in evaluation mode.

    ``source`` is a run directory, or a checkpoint in one, such as RUN/best.safetensors.
    """
    config = dataclasses.replace(load_config(run_of(source)), kernels=kernels)
    tensors, _ = read_checkpoint(source)
    model = build_model(config)
    name = "average" if any(key.startswith("average.") for key in tensors) else "model"
    load_modules({name: model}, tensors, source)
    return config, model.to(device).eval().requires_grad_(False)
