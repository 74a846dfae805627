"""Where 20 steps go: the breakdown of ``python -m train --profile``, on a batch of noise."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from bench.bench_model import stepper
from bench.gpu.stage import Case, Setting
from bench.gpu.step import make
from train.run.profile import Profile

STEPS, LONGEST = 20, 25


def cases(setting: Setting) -> list[Case]:
    return [Case("step", lambda: _profile(setting), seconds=80)]


def _profile(setting: Setting) -> list[dict[str, Any]]:
    """Rows of the parts of a step, and of the kernels that take longest; the trace is kept."""
    trainer, batch = make(setting, "triton" if setting.on_gpu else "eager")
    folder, steps = setting.out / "profile", 6 if setting.tiny else STEPS
    folder.mkdir(exist_ok=True)
    profile, step = Profile(trainer, folder, steps), stepper(trainer)
    for seed in range(steps):
        with profile.step():
            step(batch, seed)
    result = profile.result()
    times = result["seconds_per_step"]
    rows = [{"part": "a step, steady", "ms": 1e3 * times["steady"]}]
    rows += [
        {"part": part, "ms": 1e3 * share * times["timed"], "share": share}
        for part, share in result["shares"].items()
        if share
    ]
    return rows + _kernels(folder / "trace.json.gz")


def _kernels(trace: Path) -> list[dict[str, Any]]:
    """The kernels of the traced step that take longest, all their launches together."""
    if not torch.cuda.is_available():
        return []
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    taken: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "kernel":
            taken[event["name"]].append(event["dur"] / 1e3)
    total = sum(map(sum, taken.values()))
    longest = sorted(taken.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return [
        {"part": f"{name[:60]}, {len(ms)} launches", "ms": sum(ms), "share": sum(ms) / total}
        for name, ms in longest
    ]
