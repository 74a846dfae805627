"""Device time of every operator at the paper's sizes in bf16, against its floor.

The floor is the longer of compulsory bytes (operands read and results written once in each pass) at
the speed of a copy and of FLOPs at that of a matrix product, both measured here. A graph holds
calls on as many sets of operands as do not fit the cache together, and is replayed; the kernels'
own times are the profiler's.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.operators import check_available
from bench.gpu.problems import Problem, choose, problems
from bench.gpu.stage import Case, Setting
from bench.machine import alike, ceilings
from bench.measure import Operator, count_flops
from bench.timing import capture, kernels_of, seconds_of

MOST_SETS, ROUNDS = 32, 9
NAME = 48
"""Characters of a kernel's name that are shown."""


def cases(setting: Setting) -> list[Case]:
    size = "odd" if setting.tiny else "paper"
    device = torch.device(setting.device)
    return [
        Case(f"{name}: {kernels}", functools.partial(measure, make, kernels, device))
        for name, make in problems(size, setting.device, ("bfloat16",)).items()
        for kernels in (("triton", "cuda", "eager") if setting.on_gpu else ("eager",))
        if not setting.tiny or name.startswith("cp,")
    ]


def measure(
    make: Callable[[], Problem], kernels: str, device: torch.device
) -> list[dict[str, Any]]:
    """A row for the forward and one for forward and backward."""
    check_available(kernels, device.type)
    problem = make()
    operator = operator_of(problem, kernels)
    moved, sets = operator.compulsory_bytes(), [operator]
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        while len(sets) < MOST_SETS and len(sets) * moved["forward"] < 2 * cache:
            sets.append(operator_of(problem.copy(), kernels))
    counted = operator_of(problem.copy(), "eager")
    flops = {name: count_flops(counted, name) for name in ("forward", "backward")}
    flops["both"] = flops["forward"] + flops["backward"]
    rates = _ceilings(device)
    rows = []
    for name in ("forward", "both"):
        calls = [functools.partial(one.run, name, None) for one in sets]
        call = functools.partial(_each, calls)
        call = capture(call) if device.type == "cuda" else call
        times = [seconds_of(call, device, launched=True) for _ in range(ROUNDS)]
        us = 1e6 * statistics.median(times) / len(sets)
        floor = 1e6 * max(moved[name] / rates["copy"], flops[name] / rates["bfloat16"])
        launched = kernels_of(calls[0], device)
        longest = sorted(launched.items(), key=lambda item: -sum(item[1]))
        rows.append(
            {
                "pass": name,
                "µs": us,
                "floor µs": floor,
                "× floor": us / floor,
                "MB": moved[name] / 1e6,
                "GFLOP": flops[name] / 1e9,
                "sets": len(sets),
                "launches": sum(map(len, launched.values())),
                "kernels, µs": "; ".join(f"{k[:NAME]} {sum(v):.1f}" for k, v in longest),
            }
        )
    return rows


def operator_of(problem: Problem, kernels: str) -> Operator:
    """The problem as what the benchmarks time."""
    choose(problem.module, kernels)
    leaves = [*problem.inputs, *problem.module.parameters()]
    return Operator(problem.value, leaves, problem.grad)


def _each(calls: list[Callable[[], Any]]) -> list[Any]:
    return [call() for call in calls]


@functools.cache
def _ceilings(device: torch.device) -> dict[str, float]:
    with alike():
        return ceilings(device)
