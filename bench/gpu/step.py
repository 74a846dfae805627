"""A whole GAN step in bf16: its losses, no wait of the host, the step recorded in a graph."""

import dataclasses
import functools
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.bench_model import build_step, random_batch, recorded, stepper
from bench.gpu.operators import check_available
from bench.gpu.stage import Case, Setting
from bench.machine import alike, pick_device, synchronise
from bench.measure import errors_of
from train.config import PRESETS
from train.trainer.gan import Trainer

TOLERANCE = 0.3
"""Of loss terms of two steps in bf16, against float64; as in ``python -m bench``."""
STEPS = 10


def cases(setting: Setting) -> list[Case]:
    kernels = ("triton", "cuda", "eager") if setting.on_gpu else ("eager",)
    made = []
    for name in kernels:
        made.append(Case(f"no wait: {name}", functools.partial(_no_wait, setting, name)))
        if setting.on_gpu:
            made.append(Case(f"recorded: {name}", functools.partial(_recorded, setting, name)))
        if not setting.tiny:
            made.append(Case(f"losses: {name}", functools.partial(_losses, setting, name)))
    return made


def make(setting: Setting, kernels: str) -> tuple[Trainer, Any]:
    """A trainer and a batch of the paper's size; on a CPU few frames of the demo's, in fp32."""
    check_available(kernels, setting.device)
    preset, clips, frames = ("paper", 16, 75) if setting.on_gpu else ("demo", 2, 6)
    config = dataclasses.replace(
        PRESETS[preset],
        precision="bf16" if setting.on_gpu else "fp32",
        batch_size=clips,
        frames=frames,
        kernels=kernels,
    )
    trainer = Trainer(config, pick_device())
    trainer.make_optimizers()
    return trainer, random_batch(config, clips, frames)


def _losses(setting: Setting, kernels: str) -> list[dict[str, Any]]:
    check_available(kernels, setting.device)
    variant = "rewritten" if kernels == "eager" else kernels
    preset = "paper" if setting.on_gpu else "demo"
    with alike():
        work = build_step(preset, (variant,), "bfloat16")
        got, exact = work.subjects[variant].results()["step"], work.oracle()["step"]
    error = errors_of(got, exact)[0]
    row = {"error": error, "tolerance": TOLERANCE}
    return [row if error < TOLERANCE else row | {"failure": f"error {error:.2g}"}]


class _Waits(TorchDispatchMode):
    """Counts operators after which the host has waited for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = str(function)
        if "_local_scalar_dense" in name or "nonzero" in name:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def _no_wait(setting: Setting, kernels: str) -> list[dict[str, Any]]:
    """``set_sync_debug_mode("error")`` around an update; on a CPU its ``item`` are counted.

    What is random is drawn and sent before, on the host.
    """
    trainer, batch = make(setting, kernels)
    step = stepper(trainer)
    for seed in (0, 1):
        step(batch, seed)
    synchronise(trainer.device)
    if setting.on_gpu:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(batch, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [{"waits": 0}]
    with _Waits() as waits:
        step(batch, 2)
    inside = sum(waits.found.values())
    return [{"waits": inside, "which": ", ".join(waits.found)}]


def _recorded(setting: Setting, kernels: str) -> list[dict[str, Any]]:
    """A recorded step and one that is not: the same losses, and ms of each."""
    ms, losses = {}, {}
    for form in ("launched", "recorded"):
        trainer, batch = make(setting, kernels)
        step = stepper(trainer)
        if form == "recorded":
            with recorded(trainer, functools.partial(step, batch, 0)):
                losses[form], ms[form] = _time(step, batch, trainer.device)
        else:
            for _ in range(4):  # as many as a recording has gone through
                step(batch, 0)
            losses[form], ms[form] = _time(step, batch, trainer.device)
        del trainer, step
        torch.cuda.empty_cache()
    pairs = [(losses["recorded"][k], v) for k, v in losses["launched"].items()]
    error = max(abs(a - b) / max(1e-3, abs(b)) for a, b in pairs)
    row = {"launched, ms": ms["launched"], "recorded, ms": ms["recorded"], "error": error}
    return [row if error < TOLERANCE else row | {"failure": f"losses differ by {error:.2g}"}]


def _time(step: Any, batch: Any, device: torch.device) -> tuple[dict[str, float], float]:
    """Losses of the next step, and the median ms of some after it."""
    terms = {name: value.item() for name, value in step(batch, 1).items()}
    times = []
    for seed in range(STEPS):
        synchronise(device)
        start = time.perf_counter()
        step(batch, seed)
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - start))
    return terms, statistics.median(times)
