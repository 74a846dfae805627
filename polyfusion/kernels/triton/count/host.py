"""How long the host is busy with a fusion before its kernels are launched, in microseconds.

Of the fused call everything is timed but the launch itself, which a stub stands in for: Triton's
own launcher comes on top. Beside it stands plain PyTorch on the smallest sizes there are, whose
time is that of its calls; a GPU's launches come on top of these as well. Measured on one core.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polyfusion.kernels.triton import common
from polyfusion.kernels.triton.count import calls
from polyfusion.ops import cmf_fusion, cp_fusion, tucker_fusion

ROUNDS = 5


def measure(repetitions: int = 200) -> list[dict[str, Any]]:
    """A row for each form: microseconds without and with gradients, fused and eager.

    Each is the least of many, in several rounds, because other processes disturb.
    """
    torch.set_num_threads(1)
    rounds = [_round(repetitions // ROUNDS) for _ in range(ROUNDS)]
    rows = []
    for same in zip(*rounds, strict=True):
        row = {"fusion": same[0]["fusion"]}
        for kind in ("fused", "eager"):
            row[kind] = [min(times) for times in zip(*(x[kind] for x in same), strict=True)]
        rows.append(row)
    return rows


def _round(repetitions: int) -> list[dict[str, Any]]:
    rows = []
    paper = (calls.CLIPS, calls.FRAMES, calls.SPEECH, calls.IDENTITY, calls.OUTPUTS, calls.RANK)
    for (name, fused), (_, eager) in zip(_forms(*paper), _forms(1, 1, 2, 2, 2, 1), strict=True):
        with common.pretend(90), common.dry():
            left = _times(partial(fused, kernels="triton"), fused.keywords["weights"], repetitions)
        right = _times(partial(eager, kernels="eager"), eager.keywords["weights"], repetitions)
        rows.append({"fusion": name, "fused": left, "eager": right})
    return rows


def _forms(
    clips: int, frames: int, speech: int, identity: int, outputs: int, rank: int
) -> Iterator[tuple[str, Any]]:
    """Calls of the public functions that take ``kernels``; ``weights`` are what has gradients."""
    make = partial(torch.empty, dtype=torch.bfloat16)
    views, noise = [make(clips, frames, speech), make(clips, identity)], make(clips, frames, 10)
    inputs = (speech, identity)
    plain, affine = ([make(n + extra, rank) for n in inputs] for extra in (0, 1))
    second, out, bias = [make(n, rank) for n in inputs], make(outputs, rank), make(outputs)
    halves = [make(n + 1, n // 2) for n in inputs]
    core, half_out = make(outputs // 2, speech // 2, identity // 2), make(outputs, outputs // 2)

    def call(
        function: Callable[..., Tensor], arguments: tuple[Any, ...], weights: Any, kernels: str
    ) -> Tensor:
        return function(views, *arguments, noise=noise, kernels=kernels)

    for name, function, arguments in (
        ("cp", cp_fusion, (affine, out)),
        ("cmf", cmf_fusion, (plain, second, out, bias)),
        ("cmf-sr", cmf_fusion, (plain, None, out, bias)),
        ("tucker", tucker_fusion, (core, halves, half_out)),
    ):
        weights = [x for item in arguments if item is not None for x in _tensors(item)]
        yield name, partial(call, function, arguments, weights=weights)


def _tensors(item: Any) -> list[Tensor]:
    return [item] if isinstance(item, Tensor) else item


def _times(
    call: Callable[[], Tensor], weights: list[Tensor], repetitions: int
) -> list[float]:
    """The forward without gradients, and with."""
    for x in weights:
        x.requires_grad_()
    with torch.no_grad():
        alone = _least(call, repetitions)
    times = [alone, _least(call, repetitions)]
    for x in weights:
        x.requires_grad_(False)
    return times


def _least(call: Callable[[], Any], repetitions: int, number: int = 20) -> float:
    least = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(number):
            call()
        least = min(least, time.perf_counter() - start)
    return round(1e6 * least / number, 1)

