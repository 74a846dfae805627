"""Checkpoints: one safetensors file with everything a run needs to go on, replaced atomically."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.talking_face import ENCODERS
from train.config import TrainConfig, load_config
from train.errors import UserError
from train.files import replacing
from train.trainer.base import build_model

CHECKPOINT_FILE = "checkpoint.safetensors"


def save_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    info: dict[str, Any],
) -> None:
    """Write weights, Adam moments and ``info`` (JSON values); the old file stays until the end."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{name}.{index}.{key}": value for key, value in state.items()}
    tensors = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
    with replacing(path, durable=True) as temporary:
        save_file(tensors, temporary, metadata={"polyfusion": json.dumps(info)})


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and info of a checkpoint, or of the run directory that holds one."""
    if path.is_dir():
        path = path / CHECKPOINT_FILE
    try:
        with safe_open(path, "pt") as file:
            info = json.loads((file.metadata() or {}).get("polyfusion", "null"))
            if info is None:
                raise UserError(f"{path}: not a checkpoint of `python -m train`")
            return {key: file.get_tensor(key) for key in file.keys()}, info  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one with `python -m train`") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error})") from None


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
    optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Restore Adam moments and step counts."""
    for name, optimizer in optimizers.items():
        own, prefix = optimizer.state_dict(), f"adam.{name}."
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        own["state"] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, field = key[len(prefix) :].split(".")
                if value.ndim:  # in the parameter's memory format: fused Adam needs that
                    value = torch.empty_like(parameters[int(index)]).copy_(value)
                own["state"].setdefault(int(index), {})[field] = value
        optimizer.load_state_dict(own)


def load_encoders(model: nn.Module, source: Path) -> None:
    """Load the three encoders of another run (the paper: one trained with concat fusion)."""
    tensors, _ = read_checkpoint(source)
    names = {f"model.{name}": getattr(model, name) for name in ENCODERS}
    load_modules(names, tensors, source)


def load_run(
    run: Path, device: torch.device, kernels: str = "auto"
) -> tuple[TrainConfig, nn.Module]:
    """Load the configuration and the trained model of a run directory, in evaluation mode."""
    config = dataclasses.replace(load_config(run), kernels=kernels)
    tensors, _ = read_checkpoint(run)
    model = build_model(config)
    name = "average" if any(key.startswith("average.") for key in tensors) else "model"
    load_modules({name: model}, tensors, run)
    return config, model.to(device).eval().requires_grad_(False)
