"""pytest-benchmark entries from comparisons whose variants are timed in turn.

pytest-benchmark times one callable after another, a comparison times its variants in rounds. So a
comparison is measured once, and its entries replay the recorded times on a clock of their own.
"""

from collections.abc import Callable, Iterator

import pytest

from bench.machine import describe, nothing_compiled
from bench.measure import Comparison, Row, compare

_OURS = ("rewritten", "folded", "triton", "cuda")


class RecordedClock:
    """A timer for pytest-benchmark that advances by the next recorded time at every call."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: list[float] = []

    def __call__(self) -> float:
        return self.now

    def replay(self) -> None:
        self.now += self.samples.pop(0) if self.samples else 0.0


_clock = RecordedClock()
_measured: dict[str, dict[tuple[str, str], Row]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One entry for every comparison, pass and variant of a module's ``comparisons()``."""
    if "comparison" in metafunc.fixturenames:
        entries = [
            pytest.param(c, run, variant, id=f"{c.case}-{c.dtype}-{run}-{variant}")
            for c in metafunc.module.comparisons()
            for run in c.passes
            for variant in c.variants
        ]
        metafunc.parametrize(("comparison", "run", "variant"), entries)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The recorded clock times every entry."""
    for item in items:
        if "replay" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_clock, disable_gc=False))


@pytest.fixture(scope="session", autouse=True)
def _compile_afresh() -> Iterator[None]:
    with nothing_compiled():
        yield


@pytest.fixture
def replay(benchmark) -> Callable[..., None]:
    """``replay(comparison, run, variant, seconds)``: measure if need be, and enter the result."""

    def enter(comparison: Comparison, run: str, variant: str, seconds: float) -> None:
        if comparison.name not in _measured:
            rows = compare(comparison, seconds)
            _measured[comparison.name] = {(row.run, row.variant): row for row in rows}
        row = _measured[comparison.name][run, variant]
        if row.failure and row.error is None and variant not in _OURS:
            pytest.skip(f"{variant} does not run here: {row.failure}")
        if row.failure:
            pytest.fail(f"no speed-up of {comparison.name}, {variant}: {row.failure}")
        benchmark.group = f"{comparison.name}: {run}"
        benchmark.extra_info |= row.to_dict() | {"machine": describe(comparison.device)}
        _clock.samples = list(row.samples)
        benchmark.pedantic(_clock.replay, rounds=len(row.samples))

    return enter
