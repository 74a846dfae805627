"""Comparisons with the peers of ``python -m bench``, bf16 first, as many as there is time for."""

import functools
from typing import Any

from bench.__main__ import SECONDS, selection
from bench.gpu.stage import Case, Setting
from bench.measure import Comparison, compare

#: What decides between Triton, CUDA and PyTorch, the most telling first.
FIRST = (
    "training step paper bfloat16",
    "generator paper bfloat16",
    "fusion cp, paper bfloat16",
    "block norm of u + s, 256, 16×12 bfloat16",
    "block final 64 → 3, 64×48 bfloat16",
    "block skip conv 1024, 4×3 bfloat16",
    "fusion tucker, paper bfloat16",
    "fusion cmf, paper bfloat16",
    "block norm, slope 0.2, 256, 16×12 bfloat16",
    "block skip conv 128, 32×24 bfloat16",
    "inference paper, frame by frame bfloat16",
)


def cases(setting: Setting) -> list[Case]:
    chosen = {c.name: c for c in selection(setting.on_gpu) if c.group != "growth"}
    names = [name for name in FIRST if name in chosen]
    names += [name for name in chosen if name not in FIRST]
    if setting.tiny:
        names = ["fusion cp, stream float32"]
    return [Case(name, functools.partial(_rows, chosen[name]), seconds=100) for name in names]


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each pass and variant; one that disagrees with the oracle is wrong."""
    rows = []
    for row in compare(comparison, SECONDS[comparison.group]):
        rows.append(
            {
                "pass": row.run,
                "variant": row.variant,
                "ms": 1e3 * row.median if row.median else None,
                "speed-up": row.speedup,
                "in a graph, ms": 1e3 * row.captured if row.captured else None,
                "speed-up in a graph": row.captured_speedup,
                "launches": row.launches,
                "error": row.error,
                "not captured": row.capture_failure,
            }
            | ({"failure": f"{row.run}, {row.variant}: {row.failure}"} if row.failure else {})
        )
    return rows
