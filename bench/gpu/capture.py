"""Operators captured in a CUDA graph: replayed on other inputs, right and the same twice.

A launch on the wrong stream, a copy from the host or a wait for the device ends a capture.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.operators import check_available
from bench.gpu.problems import Problem, problems
from bench.gpu.stage import Case, Setting
from bench.machine import alike
from bench.timing import capture

KERNELS = ("triton", "cuda", "eager")


def cases(setting: Setting) -> list[Case]:
    return [
        Case(f"{kernels}: {name}", functools.partial(check, make, kernels, size == "paper"))
        for size in ("odd", "paper")
        for kernels in KERNELS
        for name, make in problems(size, setting.device, ("bfloat16",)).items()
    ]


def check(make: Callable[[], Problem], kernels: str, large: bool) -> list[dict[str, Any]]:
    """One row: the error of a replay, against float64."""
    check_available(kernels, "cuda")
    problem = make()
    with alike():
        replay = capture(lambda: problem.results(kernels))
        for x in problem.inputs:
            x.data.mul_(0.5)
        _reset(problem)
        exact = problem.exact("cuda" if large else "cpu")
        first = [x.clone() for x in replay()]
        error = problem.error(first, exact)
        _reset(problem)
        same = all(torch.equal(a, b) for a, b in zip(first, replay(), strict=True))
    row: dict[str, Any] = {"error": error, "tolerance": problem.tolerance, "the same twice": same}
    wrong = [f"error {error:.2g}"] * (not error < problem.tolerance)
    wrong += ["two replays differ"] * (not same and kernels != "eager")  # cuDNN may use atomics
    return [row | {"failure": ", ".join(wrong)}] if wrong else [row]


def _reset(problem: Problem) -> None:
    """Statistics that a module keeps begin alike before every replay."""
    for x in problem.module.buffers():
        x.fill_(1)
