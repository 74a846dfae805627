"""What is counted: every operator's forward and backward at the paper's sizes, in bfloat16.

That is 16 clips of 75 frames of 96×128 pixels; speech of 256 values and identity of 128 become 384.
Memory is never touched, so maps of a gigabyte cost nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polyfusion.kernels.layout import Norm, empty_channels_last, empty_rows
from polyfusion.kernels.triton import conv, final, hadamard, norm, tucker

CLIPS, FRAMES, SPEECH, IDENTITY, OUTPUTS, NOISE, RANK = 16, 75, 256, 128, 384, 10, 128

make = partial(torch.empty, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """A launcher and its arguments; every ``step``-th program of its launches is counted.

    The maps' kernels give every program the same work but at the maps' edges: a step that meets
    all places of a map alike counts them right.
    """

    run: Callable[..., Any]
    arguments: Sequence[Any]
    step: int = 1


def _fusion() -> dict[str, Call]:
    views, noise = [make(CLIPS, FRAMES, SPEECH), make(CLIPS, IDENTITY)], make(CLIPS, FRAMES, NOISE)
    grad = empty_rows(make(0), (CLIPS, FRAMES, OUTPUTS + NOISE))  # as the first block hands it out
    out, bias = make(OUTPUTS, RANK), make(OUTPUTS)
    sizes = (SPEECH, IDENTITY)
    factors = [make(size + 1, RANK) for size in sizes]
    first, second = ([make(size, RANK) for size in sizes] for _ in range(2))
    core = make(OUTPUTS // 2, SPEECH // 2, IDENTITY // 2)
    halves, half_out = [make(size + 1, size // 2) for size in sizes], make(OUTPUTS, OUTPUTS // 2)
    forms = (
        ("cp", hadamard.cp_forward, hadamard.cp_backward, (views, factors, out)),
        ("cmf", hadamard.cmf_forward, hadamard.cmf_backward, (views, first, second, out, bias)),
        ("cmf-sr", hadamard.cmf_forward, hadamard.cmf_backward, (views, first, [], out, bias)),
        (
            "tucker", tucker.tucker_forward, tucker.tucker_backward,
            (views, core, halves, half_out),
        ),
    )
    calls = {}
    for name, forward, backward, operands in forms:
        needs = [True] * sum(1 if isinstance(x, Tensor) else len(x) for x in operands)
        calls[f"{name} forward"] = Call(forward, (*operands, noise))
        calls[f"{name} backward"] = Call(backward, (grad, *operands, needs))
    return calls


def _maps(frames: int, channels: int, height: int, width: int) -> Tensor:
    return empty_channels_last(make(0), frames, channels, height, width)


def _norm(channels: int, height: int, width: int, skip: bool, step: int) -> dict[str, Call]:
    u = _maps(CLIPS * FRAMES, channels, height, width)
    s = _maps(CLIPS, channels, height, width) if skip else None
    values = torch.ones(4, channels)
    name = f"norm {channels} {height}x{width}{' skip' * skip}"
    forward = Norm(u, s, values[0], values[1], None, None, True, 1e-5, 0.0)
    backward = Norm(u, s, *values, True, 1e-5, 0.0)
    return {
        f"{name} forward": Call(norm.norm_forward, (forward,), step),
        f"{name} backward": Call(norm.norm_backward, (torch.empty_like(u), backward), step),
    }


def _final(channels: int, height: int, width: int) -> dict[str, Call]:
    x, weight = _maps(CLIPS * FRAMES, channels, height, width), make(channels, 3, 4, 4)
    y = _maps(CLIPS * FRAMES, 3, 2 * height, 2 * width)
    return {
        "final forward": Call(final.final_forward, (x, weight), 601),  # three strips a map
        "final backward": Call(final.final_backward, (torch.empty_like(y), x, weight, y), 31),
    }


def _conv(channels: int, height: int, width: int) -> dict[str, Call]:
    x, s = (_maps(n, channels, height, width) for n in (CLIPS * FRAMES, CLIPS))
    weight = empty_channels_last(x, channels, channels, 3, 3)
    grad, name = torch.empty_like(x), f"conv {channels} {height}x{width}"
    return {
        f"{name} forward": Call(conv.conv_statistics, (x, weight, s, 1, 1, False), 9),
        f"{name} grad": Call(conv.conv_transpose, (grad, weight, 1, 1), 9),
        f"{name} weight grad": Call(conv.weight_grad, (x, grad, 3, 1, 1), 64),
    }


CALLS = {
    **_fusion(),
    **_norm(1024, 4, 3, True, 1),
    **_norm(128, 32, 24, True, 31),
    **_norm(64, 64, 48, False, 41),
    **_final(64, 64, 48),
    **_conv(1024, 4, 3),
}
"""Every call that is counted, by its name."""
