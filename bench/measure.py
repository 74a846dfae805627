"""One comparison: every variant of one computation, checked against the oracle, timed in turn.

A round times each variant once, the next round begins with another one, so that a machine that
slows down slows all of them. A speed-up is the median over the rounds of baseline / variant. On a
GPU calls are timed by events, with operands that are in memory and not in the cache, as they are
made from Python, and again captured in a graph, where the host's part is gone.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import flops as _flops  # noqa: F401  (registers the formulas of our operators)
from bench.machine import alike, describe, synchronise
from bench.timing import capture, kernels_of, seconds_of

PUBLISHED = "published"
COMPILED = "compile of published"
REWRITTEN = "rewritten"
COMPILED_REWRITTEN = "compile of rewritten"
FOLDED = "folded"
#: Variants that FLOPs cannot be counted in are counted as the form they compute.
COUNTED_AS = {
    COMPILED: PUBLISHED,
    COMPILED_REWRITTEN: REWRITTEN,
    "triton": REWRITTEN,
    "cuda": REWRITTEN,
}
PASSES = ("forward", "backward", "both")
ROUNDS = (3, 60)
#: How many times slower than the baseline a variant may be to have more than two turns.
FAR = 5


#: Gives the call, and lets go of the graph at the end.
Captured = contextlib.AbstractContextManager[Callable[[], Any]]


class Subject(Protocol):
    """Something to time: ``run(name, prepare(name))``, of which ``run`` is timed."""

    def prepare(self, name: str) -> Any: ...
    def run(self, name: str, prepared: Any) -> Any: ...
    def captured(self, name: str) -> Captured | None:
        """On a GPU, the same call captured in a graph; None where that is not timed."""
        ...

    def results(self) -> dict[str, list[Tensor]]:
        """What the oracle is compared with: results by pass."""
        ...


class Operator:
    """A differentiable function. ``forward`` records the graph; ``backward`` asks all gradients.

    Only the first ``compared`` gradients are compared, where forms keep their weights differently.
    """

    def __init__(
        self,
        function: Callable[[], Tensor],
        leaves: Sequence[Tensor],
        grad: Tensor,
        compared: int | None = None,
    ):
        self.function, self.leaves, self.grad = function, list(leaves), grad
        self.compared = compared

    def prepare(self, name: str) -> Tensor | None:
        return self.function() if name == "backward" else None

    def run(self, name: str, prepared: Tensor | None) -> Any:
        if name == "forward":
            return self.function()
        result = self.function() if prepared is None else prepared
        return torch.autograd.grad(result, self.leaves, self.grad)

    def captured(self, name: str) -> Captured | None:
        if name == "backward":  # its graph would have to keep what a forward outside of it made
            return None
        return contextlib.nullcontext(capture(lambda: self.run(name, None)))

    def results(self) -> dict[str, list[Tensor]]:
        result = self.function()
        grads = list(torch.autograd.grad(result, self.leaves, self.grad))
        grads, value = grads[: self.compared], [result.detach()]
        return {"forward": value, "backward": grads, "both": value + grads}

    def compulsory_bytes(self) -> dict[str, int]:
        """Every operand read once, every result written once."""
        operands = sum(x.numel() * x.element_size() for x in self.leaves)
        result = self.grad.numel() * self.grad.element_size()
        return {
            "forward": operands + result,
            "backward": 2 * operands + result,
            "both": 3 * operands + 2 * result,
        }


class Procedure:
    """A function that is called for what it does, such as a training step, in the pass ``name``.

    ``traffic`` is the bytes that a call cannot do without reading or writing; ``record`` gives the
    same captured in a graph, if it can be.
    """

    def __init__(
        self,
        name: str,
        call: Callable[[], Any],
        results: Callable[[], list[Tensor]],
        traffic: int,
        record: Callable[[], Captured] | None = None,
    ):
        self.name, self.call, self.check, self.traffic = name, call, results, traffic
        self.record = record

    def prepare(self, name: str) -> None:
        return None

    def run(self, name: str, prepared: None) -> Any:
        return self.call()

    def captured(self, name: str) -> Captured | None:
        return self.record() if self.record else None

    def results(self) -> dict[str, list[Tensor]]:
        return {self.name: self.check()}

    def compulsory_bytes(self) -> dict[str, int]:
        return {self.name: self.traffic}


@dataclass(frozen=True)
class Comparison:
    """What to compare; ``build`` makes the subjects, the first of ``variants`` is the baseline."""

    group: str
    case: str
    variants: tuple[str, ...]
    build: Callable[[], "Workload"]
    device: torch.device
    dtype: str = "float32"
    passes: tuple[str, ...] = PASSES
    tolerance: float = 2e-4
    """Largest relative error, in the norm, of any result."""
    size: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.group} {self.case} {self.dtype}"


@dataclass
class Workload:
    """Subjects by variant, and the results (float64, by pass) that they must have."""

    subjects: dict[str, Subject]
    oracle: Callable[[], dict[str, list[Tensor]]]
    frames: int | None = None
    """Video frames a call makes, where that means something."""
    rate: float | None = None
    """Frames per second at which the video plays, for inference."""


@dataclass
class Row:
    """One variant in one pass of one comparison. Times in seconds, sizes in bytes."""

    group: str
    case: str
    dtype: str
    run: str
    variant: str
    size: dict[str, int]
    median: float = 0.0
    p20: float = 0.0
    p80: float = 0.0
    rounds: int = 0
    speedup: float | None = None
    """Of this variant over the baseline; None for a variant that disagrees with the oracle."""
    captured: float | None = None
    """Median time in a CUDA graph."""
    captured_speedup: float | None = None
    capture_failure: str | None = None
    first_call: float | None = None
    error: float | None = None
    max_error: float | None = None
    tolerance: float | None = None
    flops: int | None = None
    bytes: int | None = None
    flop_share: float | None = None
    byte_share: float | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    frames_per_second: float | None = None
    real_time: float | None = None
    """Frames per second over the video's rate, for inference."""
    failure: str | None = None
    samples: list[float] = field(default_factory=list, repr=False)

    @property
    def key(self) -> tuple[str, ...]:
        return self.group, self.case, self.dtype, self.run, self.variant

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the samples."""
        values = {k: v for k, v in asdict(self).items() if k != "samples"}
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}


def compare(comparison: Comparison, seconds: float = 1.0) -> list[Row]:
    """Check and time every variant, for about ``seconds`` in each pass.

    A variant that cannot run, or disagrees with the oracle, gets a row with a ``failure`` and no
    speed-up.
    """
    with alike():
        return _compare(comparison, seconds)


def _compare(comparison: Comparison, seconds: float) -> list[Row]:
    torch.compiler.reset()  # a function that was compiled too often runs uncompiled, silently
    workload = comparison.build()
    device = comparison.device
    expected = workload.oracle()
    errors, first_calls, failures = {}, {}, {}
    for name in comparison.variants:
        start = time.perf_counter()
        try:
            results = workload.subjects[name].results()
            synchronise(device)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        first_calls[name] = time.perf_counter() - start
        errors[name] = {run: errors_of(results[run], expected[run]) for run in expected}
        del results
    del expected
    running = [name for name in comparison.variants if name not in failures]
    counted: dict[tuple[str, str], int] = {}
    rows = []
    for run in comparison.passes:
        subjects = {name: workload.subjects[name] for name in running}
        samples = interleave(subjects, run, device, seconds) if subjects else {}
        for name in comparison.variants:
            row = Row(
                comparison.group,
                comparison.case,
                comparison.dtype,
                run,
                name,
                comparison.size,
                tolerance=comparison.tolerance,
            )
            rows.append(row)
            if name in failures:
                row.failure = failures[name]
                continue
            _fill_times(row, samples, comparison.variants[0])
            row.first_call = first_calls[name]
            row.error, row.max_error = errors[name][run]
            if not row.error <= comparison.tolerance:
                row.failure = f"error {row.error:.2g}, tolerance {comparison.tolerance:g}"
                row.speedup = None
            subject = subjects[name]
            forms = (COUNTED_AS[name], PUBLISHED) if name in COUNTED_AS else ()
            form = next((form for form in forms if form in subjects), name)
            parts = ("forward", "backward") if run == "both" else (run,)
            for part in parts:
                if (form, part) not in counted:
                    counted[form, part] = count_flops(subjects[form], part)
            row.flops = sum(counted[form, part] for part in parts)
            _fill_shares(row, subject, device)
            row.peak_bytes = peak_memory(subject, run, device)
            row.launches = count_launches(subject, run, device)
            if workload.frames:
                row.frames_per_second = workload.frames / row.median
            if workload.frames and workload.rate:
                row.real_time = workload.frames / row.median / workload.rate
    if device.type == "cuda":
        for row in rows:
            if row.failure is None:
                time_captured(row, workload.subjects[row.variant], device, seconds)
        _fill_captured_speedups(rows, comparison.variants[0])
    gc.collect()
    return rows


def time_captured(row: Row, subject: Subject, device: torch.device, seconds: float) -> None:
    """The median time of the row's call in a graph, one variant at a time: a graph keeps memory."""
    try:
        captured = subject.captured(row.run)
        if captured is None:
            return
        with captured as call:
            trial = seconds_of(call, device, launched=True)
            rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / max(1e-6, trial))))
            times = [seconds_of(call, device, launched=True) for _ in range(rounds)]
            row.captured = statistics.median(times)
    except Exception as error:
        row.capture_failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _fill_captured_speedups(rows: Sequence[Row], baseline: str) -> None:
    base = {row.run: row.captured for row in rows if row.variant == baseline}
    for row in rows:
        if row.captured and base.get(row.run):
            row.captured_speedup = base[row.run] / row.captured


def interleave(
    subjects: dict[str, Subject], run: str, device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every call by variant, in rounds over the variants.

    Each variant has ``seconds`` for its rounds: one slower than the others leaves earlier, and of
    one far slower than the first the trial that tells so is one of two turns.
    """
    names = list(subjects)

    def time_once(name: str) -> float:
        subject = subjects[name]
        prepared = subject.prepare(run)
        return seconds_of(lambda: subject.run(run, prepared), device)

    def try_out(name: str) -> float:
        first = time_once(name)
        return max(1e-6, first if first * ROUNDS[0] > seconds else min(first, time_once(name)))

    trial = {name: try_out(name) for name in names}
    rounds = {name: max(ROUNDS[0], min(ROUNDS[1], int(seconds / trial[name]))) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        if trial[name] > max(seconds / ROUNDS[0], FAR * trial[names[0]]):
            rounds[name], samples[name] = 1, [trial[name]]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(max(rounds.values())):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if turn < rounds[name]:
                    samples[name].append(time_once(name))
    finally:
        if collecting:
            gc.enable()
    return samples


def _fill_times(row: Row, samples: dict[str, list[float]], baseline: str) -> None:
    mine = samples[row.variant]
    row.samples, row.rounds = mine, len(mine)
    cuts = statistics.quantiles(mine, n=5, method="inclusive")
    row.median, row.p20, row.p80 = statistics.median(mine), cuts[0], cuts[-1]
    if baseline in samples:
        ratios = [b / m for b, m in zip(samples[baseline], mine, strict=False)]  # same round
        row.speedup = statistics.median(ratios)


def _fill_shares(row: Row, subject: Any, device: torch.device) -> None:
    ceilings = describe(device)["ceilings"]
    if row.flops:
        row.flop_share = row.flops / row.median / ceilings[row.dtype]
    row.bytes = subject.compulsory_bytes().get(row.run)
    if row.bytes:
        row.byte_share = row.bytes / row.median / ceilings["copy"]


def errors_of(results: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """The worst tensor's ‖result - expected‖ / ‖expected‖, and max |...| / max |expected|.

    The first decides: where a ReLU's argument is 0 up to rounding, single gradients may differ by
    their whole size and all be right. Infinite if a shape differs or a value is not finite.
    """
    worst = [0.0, 0.0]
    for result, right in zip(results, expected, strict=True):
        if result.shape != right.shape or not result.isfinite().all():
            return float("inf"), float("inf")
        if right.numel() == 0:
            continue
        error, right = result.double() - right.double(), right.double()
        norms = (
            (error.norm() / right.norm().clamp_min(1e-300)).item(),
            (error.abs().max() / right.abs().max().clamp_min(1e-300)).item(),
        )
        worst = [max(pair) for pair in zip(worst, norms, strict=True)]
    return worst[0], worst[1]


def count_flops(subject: Subject, run: str) -> int:
    """FLOPs of matrix products and convolutions in one call; elementwise work is not counted."""
    prepared = subject.prepare(run)
    with FlopCounterMode(display=False) as counter:
        subject.run(run, prepared)
    return counter.get_total_flops()


def peak_memory(subject: Subject, run: str, device: torch.device) -> int | None:
    """Bytes of tensors alive at the worst moment of a call, beyond those alive before it."""
    prepared = subject.prepare(run)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        subject.run(run, prepared)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        subject.run(run, prepared)
    results = profile.profiler.kineto_results  # the public tables have sums only, no course in time
    alive = peak = 0
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def count_launches(subject: Subject, run: str, device: torch.device) -> int | None:
    """Kernels launched by one call on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    prepared = subject.prepare(run)
    return sum(map(len, kernels_of(lambda: subject.run(run, prepared), device).values()))
