"""A step without the host: what it would take to record it, shown without a GPU."""

import contextlib
import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.train.helpers import CONFIG, CPU, TINY, batch, run, trainer
from train.config import PRESETS, parse
from train.device import lay_out, to_device
from train.errors import UserError
from train.trainer import base, gan
from train.trainer.draws import Draws, choose, draw, send
from train.trainer.gan import Trainer
from train.trainer.graph import RecordedUpdate, copy_into, tensors_of, why_not_recorded, with_copies

META = torch.device("meta")
#: Answers to the host, which would wait for them; sizes that depend on values; values of the host.
ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal.default")
MAKES = ("lift_fresh", "scalar_tensor")


class Watch(TorchDispatchMode):
    """Count the operators, and note those that a recorded step must not have."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.copies: list[Tensor] = []
        self.scattered: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        tensors = given + [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.operators[name] += not function.is_view
        random = torch.Tag.nondeterministic_seeded in function.tags
        if name.startswith((*ASKS, *MAKES)) or random or len({x.device for x in tensors}) > 1:
            self.wrong.append(name)
        if name.startswith(("clone", "copy_", "contiguous")):
            self.copies.append(given[-1])
        if name.startswith(("convolution", "norm_activation")):
            maps = [x for x in given if x.ndim >= 4 and x.shape[-1] > 1]
            self.scattered += [f"{name} {tuple(x.shape)}" for x in maps if not channels_last(x)]
        return result


def channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous(memory_format=formats[x.ndim])


def drawn(config=CONFIG, seed: int = 0) -> Draws:
    rng = torch.Generator().manual_seed(seed)
    return draw(config.model, config.batch_size, config.frames, False, rng)


def as_on_a_gpu(config=CONFIG) -> tuple[Trainer, object]:
    """A trainer on the CPU whose weights, and a batch whose frames, lie as on a GPU."""
    made = Trainer(config, CPU)
    for module in made.modules.values():
        lay_out(module, META)
    made.make_optimizers()
    data = batch(config)
    for name in ("frames", "still"):
        x = getattr(data, name)
        maps = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
        setattr(data, name, maps.view(x.shape))
    return made, data


def test_an_update_takes_all_it_needs_from_tensors_that_are_there():
    """What an update asks of the host, or takes from it, would not be in its record."""
    t, data, draws = trainer(), batch(), drawn()
    with Watch() as watch:
        t.update(data, draws)
    assert watch.wrong == []


def test_an_update_is_a_function_of_its_tensors():
    """Recorded with one batch and launched with another: the same operators, other values."""
    ways, losses = [], []
    for seed in (0, 0, 1):
        t, data, draws = trainer(), batch(), drawn(seed=seed)
        torch.manual_seed(len(ways))  # would be heard by what draws for itself
        with Watch() as watch:
            terms = t.update(data, draws)
        ways.append(watch.operators)
        losses.append(torch.stack(list(terms.values())))
    assert ways[0] == ways[1] == ways[2]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_channels_are_last_from_the_frames_to_the_last_discriminator():
    t, data = as_on_a_gpu()
    draws = drawn()
    t.update(data, draws)
    with Watch() as watch:
        t.update(data, draws)
    assert watch.scattered == []
    stacked = data.frames[:, : CONFIG.model.snippet_frames].numel()
    windows = CONFIG.batch_size * CONFIG.frames * CONFIG.model.window
    # Snippets, their frames stacked as channels; windows of speech, which overlap.
    assert {x.numel() for x in watch.copies if x.numel() >= stacked} <= {stacked, windows}


def test_the_layout_changes_no_loss():
    t, data = as_on_a_gpu()
    terms = t.update(data, drawn())
    expected = trainer().update(batch(), drawn())
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)
