"""A step's update as a CUDA graph: recorded once, then launched as a whole.

A GAN step is some thousand launches, which the host hands over more slowly than a GPU works
through them. What is recorded reads and writes the same memory each time it is launched: a batch
is copied to where the recorded one was, and learning rates and Adam's counts lie on the device.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig
from train.device import Batch
from train.errors import UserError
from train.trainer.draws import Draws

Update = Callable[[Batch, Draws], dict[str, Tensor]]
WARM = 3
"""Steps before the recording, in which libraries choose their algorithms and kernels are tuned."""


def why_not_recorded(config: TrainConfig, device: torch.device) -> str | None:
    """Why the steps of this run are not recorded, or None if they are.

    Raises :class:`UserError` if ``--graph on`` asks for what is not possible.
    """
    if config.graph == "off":
        return "--graph off"
    reason = None
    if device.type != "cuda":
        reason = f"the device is {device}, and graphs are CUDA's"
    elif config.system != "polyfusion":
        reason = f"--system {config.system} changes what a step trains on the way"
    elif config.profile:
        reason = "--profile times the parts of a step one by one"
    if reason and config.graph == "on":
        raise UserError(f"--graph on: {reason}; leave --graph out, or pass --graph off")
    return reason


class RecordedUpdate:
    """Call ``update`` as it is for :data:`WARM` steps, then record it and replay the record.

    Results are copies, and stay what they are in the next step. If the recording fails, ``update``
    is called as before and the reason goes to stderr; with ``must`` it raises :class:`UserError`.
    """

    def __init__(self, update: Update, device: torch.device, must: bool = False):
        self.update, self.device, self.must = update, device, must
        self.warm: float = WARM
        self.graph: Any = None
        self.stream = torch.cuda.Stream(device)  # of the warm steps too: autograd remembers it
        self.inputs: list[Tensor] = []
        self.names: list[str] = []
        self.terms = torch.empty(0)

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        if self.warm > 0:
            self.warm -= 1
            return self._beside(batch, draws)
        if self.graph is None:
            here = torch.cuda.current_stream(self.device)
            try:
                self._record(batch, draws)
            except RuntimeError as error:
                torch.cuda.set_stream(here)  # which a failed recording does not do
                self._give_up(error)
                return self._beside(batch, draws)
        copy_into(self.inputs, [*tensors_of(batch), *tensors_of(draws)])
        self.graph.replay()
        return dict(zip(self.names, self.terms.clone().unbind(), strict=True))

    def _beside(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The update on the stream of the recording, in its place among the work of this one."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            terms = self.update(batch, draws)
        here.wait_stream(self.stream)
        return terms

    def _record(self, batch: Batch, draws: Draws) -> None:
        """Record an update of copies of these inputs; nothing is computed yet."""
        batch, draws = with_copies(batch), with_copies(draws)
        self.inputs = [*tensors_of(batch), *tensors_of(draws)]
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the loader's thread pins memory meanwhile, which others must not mind.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            terms = self.update(batch, draws)
            self.names, self.terms = list(terms), torch.stack(list(terms.values()))
        self.graph = graph

    def _give_up(self, error: RuntimeError) -> None:
        """Say why, by what failed rather than by the recording that it spoiled."""
        reason = str(error.__context__ or error).splitlines()[0]
        if self.must:
            raise UserError(
                f"--graph on: the step could not be recorded ({reason}); pass --graph off"
            ) from error
        said = f"the step is not recorded in a CUDA graph, because that failed: {reason}"
        print(said, file=sys.stderr, flush=True)
        self.warm, self.inputs = float("inf"), []


def tensors_of(values: Batch | Draws) -> list[Tensor]:
    """The tensors among the fields, in their order."""
    return [value for value in vars(values).values() if isinstance(value, Tensor)]


def with_copies(values: Any) -> Any:
    """The same with copies of its tensors, in their memory format."""
    copies = {k: v.clone() for k, v in vars(values).items() if isinstance(v, Tensor)}
    return dataclasses.replace(values, **copies)


def copy_into(kept: list[Tensor], values: list[Tensor]) -> None:
    """Copy values to where the first ones lie; ``ValueError`` for another number or shape."""
    shapes, expected = ([tuple(x.shape) for x in xs] for xs in (values, kept))
    if shapes != expected:
        raise ValueError(f"a batch of shapes {shapes}: expected those recorded, {expected}")
    torch._foreach_copy_(kept, values, non_blocking=True)
