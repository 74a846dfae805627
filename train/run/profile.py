"""Where the time of a training step goes: python -m train … --profile.

The first step is timed alone, then some run freely (steady state), some with every part timed (the
breakdown), and one is traced. RUN/profile.json and RUN/profile.md hold the result, and
RUN/trace.json.gz opens in chrome://tracing or Perfetto. Training then goes on as usual.
"""

import contextlib
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.errors import UserError
from train.files import write_atomically, write_json
from train.trainer.base import BaseTrainer

WARM, MOST, LEAST = 2, 8, 5
"""Steps that are not counted, the most steps of a phase, and the fewest of a profiled run."""
SECTIONS = (
    "data wait",
    "host to device",
    "generator forward",
    "generator backward",
    "frame discriminator",
    "sequence discriminator",
    "sync discriminator",
    "other losses",
    "optimiser",
    "logging",
    "rest",
)
#: A larger share of the step than this spent waiting for data gets a warning.
LONG_WAIT = 0.10


class Profile:
    """Phases of a profiled run; use :meth:`step` around a step and :meth:`section` in it."""

    def __init__(self, trainer: BaseTrainer, run: Path, steps: int):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the tracer's start and stop
        self.trainer, self.run = trainer, run
        self.count = min(MOST, (steps - 1 - min(WARM, steps - 4)) // 2)
        self.warm = min(WARM, steps - 2 - 2 * self.count)
        self.done = 0
        self.first = 0.0
        self.free: list[float] = []
        self.split: list[float] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.fused = 0.0
        self._hooks: list[Any] = []
        trainer.section = self.section  # type: ignore[method-assign, assignment]

    @property
    def phase(self) -> str:
        """first, warm, free, split, trace, or over."""
        lengths = {"first": 1, "warm": self.warm, "free": self.count, "split": self.count}
        position = self.done
        for name, length in (lengths | {"trace": 1}).items():
            if position < length:
                return name
            position -= length
        return "over"

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around everything that a step does, waiting for its data and logging included."""
        phase = self.phase
        if phase == "over":
            yield
            return
        if phase == "split" and not self._hooks:
            self._watch_fused_parts()
        self._wait()
        start = time.perf_counter()
        if phase == "trace":
            with torch.profiler.profile() as trace:
                yield
                self._wait()
            trace.export_chrome_trace(str(self.run / "trace.json.gz"))
        else:
            yield
            self._wait()
        seconds = time.perf_counter() - start
        if phase == "first":
            self.first = seconds
        elif phase == "free":
            self.free.append(seconds)
        elif phase == "split":
            self.split.append(seconds)
        self.done += 1
        if self.phase == "trace":
            for hook in self._hooks:
                hook.remove()
        elif self.phase == "over":
            self._write()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Around a part of a step, one after the other, never nested."""
        phase = self.phase
        if phase == "trace":
            with torch.profiler.record_function(name):
                yield
            return
        if phase != "split":
            yield
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.trainer.device.type == "cuda" and self.phase != "free":
            torch.cuda.synchronize(self.trainer.device)

    def _watch_fused_parts(self) -> None:
        """Time the forward and the backward of every outermost module of polyfusion.nn."""
        starts: dict[tuple[int, str], list[float]] = defaultdict(list)

        def begin(kind: str) -> Any:
            def hook(module: nn.Module, *_: Any) -> None:
                self._wait()
                starts[id(module), kind].append(time.perf_counter())

            return hook

        def end(kind: str) -> Any:
            def hook(module: nn.Module, *_: Any) -> None:
                self._wait()
                if starts[id(module), kind]:
                    self.fused += time.perf_counter() - starts[id(module), kind].pop()

            return hook

        for module in self.trainer.modules.values():
            for part in fused_parts(module):
                self._hooks += [
                    part.register_forward_pre_hook(begin("forward")),
                    part.register_forward_hook(end("forward")),
                    part.register_full_backward_pre_hook(begin("backward")),
                    part.register_full_backward_hook(end("backward")),
                ]

    def result(self) -> dict[str, Any]:
        """Shares of the timed steps, which sum to 1, and what the free ones reached."""
        config, total = self.trainer.config, sum(self.split)
        seconds = dict(self.seconds)
        seconds["rest"] = total - sum(seconds.values())
        steady = sum(self.free) / len(self.free)
        fused = min(self.fused / total, 1.0)
        return {
            "shares": {name: seconds.get(name, 0.0) / total for name in SECTIONS},
            "seconds_per_step": {
                "steady": steady,
                "timed": total / len(self.split),
                "first": self.first,
            },
            "clips_per_s": config.batch_size / steady,
            "frames_per_s": config.batch_size * config.frames / steady,
            "peak_bytes": peak_bytes(self.trainer.device),
            "fused_share": fused,
            "amdahl_limit": 1 / max(1 - fused, 1e-9),
            "steps": {"warm": self.warm, "free": len(self.free), "timed": len(self.split)},
        }

    def _write(self) -> None:
        result = self.result()
        write_json(self.run / "profile.json", result)
        write_atomically(self.run / "profile.md", describe(result) + "\n")
        print(f"\n\n{describe(result)}\n\nsaved in {self.run}: profile.md, trace.json.gz")


def check_steps(steps: int) -> None:
    """Raise :class:`UserError` if a run of so many steps is too short to be profiled."""
    if steps < LEAST:
        raise UserError(f"--profile of {steps} steps: needs {LEAST}; pass a larger --steps")


def fused_parts(module: nn.Module) -> list[nn.Module]:
    """The outermost modules of polyfusion.nn in ``module``."""
    if type(module).__module__.startswith("polyfusion.nn"):
        return [module]
    return [part for child in module.children() for part in fused_parts(child)]


def peak_bytes(device: torch.device) -> int | None:
    """The most memory so far: of tensors on a GPU, of the process on a CPU where that is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    times = result["seconds_per_step"]
    timed = times["timed"]
    lines = ["| part of a step | share | ms |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {100 * share:.1f} % | {1e3 * share * timed:.1f} |"
        for name, share in result["shares"].items()
    ]
    lines += [
        f"| sum | {100 * sum(result['shares'].values()):.1f} % | {1e3 * timed:.1f} |",
        "",
        f"Steady state: {result['frames_per_s']:.1f} frames/s, {result['clips_per_s']:.2f} clips/s "
        f"({1e3 * times['steady']:.0f} ms a step). First step: {times['first']:.2f} s.",
    ]
    if result["peak_bytes"]:
        lines.append(f"Peak memory: {result['peak_bytes'] / 2**20:.0f} MiB.")
    lines.append(
        f"Fused operators: {100 * result['fused_share']:.1f} % of the step; if they took no time, "
        f"it would be {result['amdahl_limit']:.2f}× as fast (Amdahl)."
    )
    wait = result["shares"]["data wait"]
    if wait > LONG_WAIT:
        lines.append(
            f"warning: {100 * wait:.0f} % of the step waits for data; raise --workers, or put the "
            "prepared set on a faster disk"
        )
    return "\n".join(lines)
