"""What every trainer has: a model, optimisers, learning rates and precision."""

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from model import Speech2Vid, TalkingFace
from train.config import TrainConfig
from train.device import Batch, lay_out


def build_model(config: TrainConfig) -> nn.Module:
    """Build the model that a configuration names, untrained and on the CPU.

    It is called as ``model(still (B, 3, H, W), audio (B, N), rng)`` → frames (B, T, 3, H, W).
    """
    if config.system == "speech2vid":
        return Speech2Vid(config.model, config.kernels)
    return TalkingFace(config.model, config.fusion, config.kernels)


class BaseTrainer:
    """A model with its optimisers; a subclass adds the update rule."""

    #: ``section(name)`` is entered around every part of a step; :mod:`train.run.profile` sets it.
    section: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.model: Any = build_model(config).to(device)
        lay_out(self.model, device)
        self.bf16 = config.precision == "bf16" or (
            config.precision == "auto" and device.type == "cuda"
        )
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)
        #: What a checkpoint holds, by name.
        self.modules: dict[str, nn.Module] = {"model": self.model}
        #: The model that is shown, measured and kept for use: its running average, if asked for.
        self.average: Any = self.model
        if config.average:
            self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
            self.modules["average"] = self.average
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def rates(self) -> dict[str, tuple[nn.Module, float]]:
        """What every optimiser trains and its learning rate, by the optimiser's name."""
        raise NotImplementedError

    def code_parameters(self) -> list[nn.Parameter]:
        """Those whose learning rate is ``code_rate`` times their optimiser's."""
        return []

    def make_optimizers(self) -> None:
        """Create the optimisers, over what is trainable now (after freezing, before loading)."""
        code = {p for p in self.code_parameters() if self.config.code_rate != 1}
        on_gpu = self.device.type == "cuda"
        self.optimizers = {}
        for name, (module, lr) in self.rates().items():
            trainable = [p for p in module.parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [
                {"params": [p for p in trainable if p not in code], "initial_lr": lr},
                {
                    "params": [p for p in trainable if p in code],
                    "initial_lr": self.config.code_rate * lr,
                },
            ]
            groups = [group for group in groups if group["params"]]
            for group in groups:
                group["lr"] = group["initial_lr"]
                if on_gpu:  # where a recorded step reads it
                    group["lr"] = torch.tensor(group["lr"], device=self.device)
            self.optimizers[name] = torch.optim.Adam(
                groups, betas=self.config.betas, fused=True, capturable=on_gpu
            )

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Move the running average towards the model after step ``step``, counted from 1.

        In the first steps the average is over what there is so far.
        """
        if self.average is self.model:
            return
        share = max(1 - self.config.average, 1 / (step + 1))
        average, current = self.average.state_dict(), self.model.state_dict()
        means = [name for name, value in average.items() if value.is_floating_point()]
        counts = average.keys() - set(means)
        torch._foreach_lerp_([average[k] for k in means], [current[k] for k in means], share)
        torch._foreach_copy_([average[k] for k in counts], [current[k] for k in counts])

    def anneal(self, progress: float) -> None:
        """Set the learning rates for a run that is ``progress`` (0 to 1) done."""
        share = self.config.anneal
        factor = min(1.0, (1 - progress) / share) if share else 1.0
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                rate = group["initial_lr"] * factor
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def record(self, must: bool = False) -> None:
        """Record what the steps compute in a CUDA graph; a failure is an error with ``must``."""
        raise NotImplementedError

    def step(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Update the parameters once; return every loss term, "loss/…" (0-d tensors)."""
        raise NotImplementedError
