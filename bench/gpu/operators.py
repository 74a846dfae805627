"""Every operator, forward and backward, in every dtype against float64.

Fresh memory is filled with NaN, so that what a kernel leaves unwritten shows. At odd sizes also on
views that begin between two 16-byte boundaries, on views with gaps, and on a second stream whose
inputs arrive late: a launch on another stream reads NaN.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.problems import DTYPES, Problem, problems
from bench.gpu.stage import Case, Setting, Unavailable
from bench.machine import alike
from polyfusion import extension
from polyfusion.dispatch import triton_problem

LATE = 20_000_000
"""Clock cycles by which a second stream's inputs are late: about 10 ms."""


_emulated = contextlib.ExitStack()  # for as long as the process of a stage lives


def cases(setting: Setting, kernels: str) -> list[Case]:
    if kernels == "cuda" and not setting.on_gpu:
        _emulated.enter_context(extension.emulation())
    check_available(kernels, setting.device)
    sizes = ("odd", "paper") if setting.on_gpu else ("odd",)
    dtypes = [x for x in DTYPES if kernels != "cuda" or getattr(torch, x) in extension.DTYPES]
    return [
        Case(name, functools.partial(check, make, kernels, "paper" in name, setting.on_gpu))
        for size in sizes
        for name, make in problems(size, setting.device, dtypes).items()
        if not setting.tiny or name in ("cp, odd, float32", "norm, slope 0.2, odd, bfloat16")
    ]


def check_available(kernels: str, device: str) -> None:
    """Raise :class:`Unavailable` unless these kernels run on the device."""
    problem = None
    if kernels == "triton":
        problem = triton_problem()
    elif kernels == "cuda":
        problem = extension.problem([torch.zeros(1, device=device)])
    if problem:
        raise Unavailable(problem)


def check(
    make: Callable[[], Problem], kernels: str, large: bool, on_gpu: bool
) -> list[dict[str, Any]]:
    """One row: the worst relative error of a result, of a gradient or of a statistic, by kind."""
    problem = make()
    tolerance = problem.tolerance
    with alike():
        exact = problem.exact(problem.grad.device.type if large else "cpu")
        kinds: dict[str, Callable[[], list[Tensor]]] = {
            "plain": lambda: poisoned(problem.copy(), kernels),
        }
        if not large:
            kinds["misaligned"] = lambda: poisoned(moved(problem, misaligned), kernels)
            kinds["gaps"] = lambda: poisoned(moved(problem, with_gaps), kernels)
            if on_gpu:
                kinds["second stream"] = lambda: late_on_another_stream(problem.copy(), kernels)
        errors = {kind: problem.error(run(), exact) for kind, run in kinds.items()}
    row: dict[str, Any] = {**errors, "tolerance": tolerance}
    wrong = [
        f"{kind}: error {error:.2g}" for kind, error in errors.items() if not error < tolerance
    ]
    return [row | {"failure": ", ".join(wrong)}] if wrong else [row]


def poisoned(problem: Problem, kernels: str) -> list[Tensor]:
    """The results in memory that was NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what of PyTorch's own is not deterministic
            return problem.results(kernels)
    finally:
        torch.use_deterministic_algorithms(False)


def moved(problem: Problem, move: Callable[[Tensor], Tensor]) -> Problem:
    """The problem with every operand of its elsewhere in memory."""
    problem = problem.copy()
    for x in problem.tensors():
        x.data = move(x.data)
    return problem


def misaligned(x: Tensor) -> Tensor:
    """The values one element behind the beginning of an allocation."""
    fresh = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return fresh.as_strided(x.shape, x.stride(), 1).copy_(x)


def with_gaps(x: Tensor) -> Tensor:
    """The values with an element between each and the next."""
    fresh = torch.full((2 * x.numel(),), float("nan"), dtype=x.dtype, device=x.device)
    return fresh.as_strided(x.shape, [2 * stride for stride in x.stride()]).copy_(x)


def late_on_another_stream(problem: Problem, kernels: str) -> list[Tensor]:
    """The results on a stream whose operands are NaN until it has waited a while."""
    values = [x.detach().clone() for x in problem.tensors()]
    statistics = [(x, x.clone()) for x in problem.module.buffers()]
    problem.results(kernels)  # compiled and loaded, which would take longer than the wait
    for x, value in statistics:
        x.copy_(value)
    for x in problem.tensors():
        x.data.fill_(float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LATE)
        for x, value in zip(problem.tensors(), values, strict=True):
            x.data.copy_(value)
        results = problem.results(kernels)
    torch.cuda.synchronize()
    return results
