"""Files of the measuring networks that this project trains: safetensors that say what they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from train.files import replacing
from train.metrics.score import MetricError
from train.tensors import read_tensors, write_tensors

_HEADER = "polyfusion-metric"


def claim_file(path: Path) -> None:
    """Make the folder of a file to be written later; MetricError if that cannot work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MetricError(f"cannot write {path}: {error.strerror}") from None
    if path.is_dir():
        raise MetricError(f"cannot write {path}: it is a directory; give the name of a file")
    if not os.access(path.parent, os.W_OK):
        raise MetricError(f"cannot write {path}: no permission to write in {path.parent}")


def save_network(path: Path, kind: str, module: nn.Module, info: dict[str, Any]) -> None:
    """Write the weights of ``module`` with its ``kind`` and ``info`` (JSON values), atomically."""
    header = {_HEADER: json.dumps({"kind": kind, **info})}
    try:
        with replacing(path) as temporary:
            write_tensors(temporary, module.state_dict(), header)
    except (OSError, SafetensorError) as error:
        raise MetricError(f"cannot write {path}: {error}") from None


def load_network(path: Path, kind: str, module: nn.Module, made_by: str) -> dict[str, Any]:
    """Load a file of ``save_network`` into ``module`` and return its info.

    MetricError if the file is missing, damaged or of another kind; ``made_by`` is the command that
    makes the right one.
    """
    hint = f"make one with: {made_by}"
    try:
        state, metadata = read_tensors(path)
        info = json.loads(metadata.get(_HEADER, "{}"))
    except FileNotFoundError:
        raise MetricError(f"{path}: no such file; {hint}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise MetricError(f"{path}: not a readable safetensors file ({error}); {hint}") from None
    if not isinstance(info, dict) or info.get("kind") != kind:
        found = info.get("kind", "another kind of file") if isinstance(info, dict) else info
        raise MetricError(f"{path}: expected weights of {kind}, found {found}; {hint}")
    load_state(module, state, path, kind)
    return info


def load_state(module: nn.Module, state: dict[str, Tensor], path: Path, kind: str) -> None:
    """``module.load_state_dict`` whose refusal is one line: the first tensor that does not fit."""
    own = module.state_dict()
    for key in [*own, *state]:
        if key not in own or key not in state:
            where = "unexpected" if key in state else "missing"
            raise MetricError(f"{path}: not the weights of {kind}: {key} is {where}")
        if not isinstance(state[key], Tensor) or state[key].shape != own[key].shape:
            shape = tuple(getattr(state[key], "shape", ()))
            raise MetricError(
                f"{path}: not the weights of {kind}: {key} has shape {shape}, "
                f"expected {tuple(own[key].shape)}"
            )
    module.load_state_dict(state)


def freeze(module: nn.Module, device: torch.device | str) -> None:
    """Evaluation mode, no gradients, on ``device``."""
    module.to(device).eval().requires_grad_(False)
