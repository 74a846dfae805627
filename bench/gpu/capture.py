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
from bench.machine import ieee_products

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
    with ieee_products():
        graph, results = captured(problem, kernels)
        for x in problem.inputs:
            x.data.mul_(0.5)
        for x in problem.module.buffers():
            x.zero_() if x.ndim == 0 else x.fill_(1.0)
        exact = problem.exact("cuda" if large else "cpu")
        graph.replay()
        first = [x.clone() for x in results]
        error = problem.error(first, exact)
        for x in problem.module.buffers():
            x.zero_() if x.ndim == 0 else x.fill_(1.0)
        graph.replay()
        same = all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
    row: dict[str, Any] = {"error": error, "tolerance": problem.tolerance, "the same twice": same}
    wrong = [f"error {error:.2g}"] * (not error < problem.tolerance)
    wrong += ["two replays differ"] * (not same and kernels != "eager")  # cuDNN may use atomics
    return [row | {"failure": ", ".join(wrong)}] if wrong else [row]


def captured(problem: Problem, kernels: str) -> tuple[Any, list[torch.Tensor]]:
    """A graph of forward and backward, and the tensors that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            problem.results(kernels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = problem.results(kernels)
    return graph, results
