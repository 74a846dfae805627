"""Figures of a run: speed-ups against peers, roofline, memory, growth."""

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bench.results import Results

COLOURS = {
    "published": "#8a8a8a",
    "compile of published": "#c4a35a",
    "rewritten": "#2b6cb0",
    "compile of rewritten": "#76b5d9",
    "tensorly": "#b05a7a",
    "triton": "#2f855a",
    "cuda": "#8a5ac4",
    "folded": "#d97706",
}
AXES = {"frames": "frames T", "clips": "clips B", "rank": "rank k", "views": "views V"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
#: Speed-ups below this are written, not drawn.
SLOWEST = 0.1


def all_figures(results: Results) -> dict[str, Figure]:
    """By title; only those that have data."""
    figures = {
        "Speed-up over the published form": speedups(results),
        "Roofline": roofline(results),
        "Peak memory": memory(results),
        "Growth": growth(results),
    }
    return {title: figure for title, figure in figures.items() if figure is not None}


def to_svg(figure: Figure) -> str:
    """As an SVG element, without metadata that changes from run to run."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "polyfusion", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def save(figure: Figure, path: Path) -> Path:
    """As an SVG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + to_svg(figure))
    return path


def last_runs(results: Results) -> list[dict]:
    """The rows of each comparison's most complete pass, growth aside."""
    last = {}
    for row in results.rows:
        if row["group"] != "growth":
            last[row["group"], row["case"], row["dtype"]] = row["run"]
    return [
        row
        for row in results.rows
        if last.get((row["group"], row["case"], row["dtype"])) == row["run"]
    ]


def speedups(results: Results) -> Figure | None:
    """Bars of every variant's speed-up, on a logarithmic axis: left of 1 we lose."""
    cases: dict[str, dict[str, float]] = defaultdict(dict)
    for row in last_runs(results):
        if row["speedup"]:
            short = "" if row["dtype"] == "float32" else " bf16"
            name = f"{row['group']}: {row['case']}{short}, {row['run']}"
            cases[name][row["variant"]] = row["speedup"]
    if not cases:
        return None
    figure, axis = plt.subplots(figsize=(9, 0.7 + 0.34 * len(cases)), layout="constrained")
    drawn = {}
    for y, case in enumerate(cases.values()):
        shown = [v for v in COLOURS if v in case and v != "published"]
        height = 0.8 / max(len(shown), 3)
        for i, variant in enumerate(shown):
            middle, speedup = y + (i - (len(shown) - 1) / 2) * height, case[variant]
            drawn[variant] = axis.barh(
                middle, max(speedup, SLOWEST) - 1, height, left=1, color=COLOURS[variant]
            )
            if speedup < SLOWEST:
                axis.text(
                    SLOWEST * 1.05,
                    middle,
                    f"{speedup:.1g}×",
                    va="center",
                    fontsize=6,
                    color="white",
                )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlim(left=SLOWEST)
    plain_ticks(axis.xaxis, (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50), axis.get_xlim())
    axis.set_yticks(range(len(cases)), cases, fontsize=7)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_xlabel("times as fast as the published form in the same run")
    names = [v for v in COLOURS if v in drawn]
    figure.legend(
        [drawn[v] for v in names],
        names,
        fontsize=7,
        frameon=False,
        ncols=len(names),
        loc="outside upper center",
    )
    axis.grid(axis="x", alpha=0.3)
    return figure


def plain_ticks(axis: Axis, values: Sequence[float], limits: tuple[float, float]) -> None:
    """Ticks of a logarithmic axis at the ``values`` within the limits, written plainly."""
    shown = [v for v in values if limits[0] <= v <= limits[1]]
    axis.set_ticks(shown, [f"{v:g}" for v in shown])
    axis.set_minor_locator(NullLocator())


def roofline(results: Results) -> Figure | None:
    """Achieved FLOP/s over arithmetic intensity, under the measured ceilings."""
    rows = [row for row in last_runs(results) if row["flops"] and row["bytes"]]
    if not rows:
        return None
    ceilings = results.head["machine"]["ceilings"]
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    xs = [low * (high / low) ** (i / 99) for i in range(100)]
    for dtype, style in (("float32", "-"), ("bfloat16", "--")):
        if any(row["dtype"] == dtype for row in rows):
            roof = [min(x * ceilings["copy"], ceilings[dtype]) / 1e9 for x in xs]
            axis.plot(
                xs, roof, style, color="black", linewidth=1, label=f"ceiling, {DTYPES[dtype]}"
            )
    for variant, colour in COLOURS.items():
        for dtype, fill in (("float32", colour), ("bfloat16", "none")):
            points = [
                (row["flops"] / row["bytes"], row["flops"] / row["median"] / 1e9)
                for row in rows
                if row["variant"] == variant and row["median"] and row["dtype"] == dtype
            ]
            label = variant if dtype == "float32" else f"{variant}, bf16"
            if points:
                axis.scatter(
                    *zip(*points, strict=True),
                    s=14,
                    edgecolors=colour,
                    facecolors=fill,
                    label=label,
                )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per compulsory byte")
    axis.set_ylabel("GFLOP/s")
    axis.grid(alpha=0.3)
    figure.legend(fontsize=7, frameon=False, loc="outside right upper")
    return figure


def memory(results: Results) -> Figure | None:
    """Peak memory of every variant relative to the published form."""
    cases: dict[str, dict[str, float]] = defaultdict(dict)
    for row in last_runs(results):
        if row["peak_bytes"]:
            short = "" if row["dtype"] == "float32" else " bf16"
            cases[f"{row['group']}: {row['case']}{short}"][row["variant"]] = row["peak_bytes"]
    cases = {k: v for k, v in cases.items() if v.get("published") and v.get("rewritten")}
    if not cases:
        return None
    figure, axis = plt.subplots(figsize=(9, 0.7 + 0.2 * len(cases)), layout="constrained")
    for variant, colour in COLOURS.items():
        points = [
            (case[variant] / case["published"], y)
            for y, case in enumerate(cases.values())
            if variant in case
        ]
        if points:
            axis.scatter(*zip(*points, strict=True), s=18, color=colour, label=variant)
    axis.set_xscale("log")
    axis.set_yticks(range(len(cases)), cases, fontsize=7)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_xlabel("peak memory of a call, published form = 1")
    figure.legend(fontsize=7, frameon=False, ncols=len(COLOURS), loc="outside upper center")
    axis.grid(alpha=0.3)
    return figure


def growth(results: Results) -> Figure | None:
    """Time and memory of forward and backward over T, B, rank and views."""
    rows = results.find(group="growth")
    panels: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        panels[row["case"].rsplit(",", 1)[0]].append(row)
    if not panels:
        return None
    columns = min(4, len(panels))
    blocks = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        2 * blocks,
        columns,
        figsize=(2.6 * columns, 4.6 * blocks),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.set_visible(False)
    drawn = {}
    for place, (title, lines) in enumerate(panels.items()):
        block, column = divmod(place, columns)
        form, name = title.split(" over ")[0], next(iter(lines[0]["size"]))
        for below, (quantity, scale, label) in enumerate(
            (("median", 1e3, "ms, forward and backward"), ("peak_bytes", 1e-6, "peak MB"))
        ):
            axis = axes[2 * block + below][column]
            axis.set_visible(True)
            ticks: set[float] = set()
            for variant in COLOURS:
                points = sorted(
                    (line["size"][name], line[quantity] * scale)
                    for line in lines
                    if line["variant"] == variant and line[quantity]
                )
                if points:
                    [drawn[variant]] = axis.plot(
                        *zip(*points, strict=True),
                        "o-",
                        markersize=3,
                        linewidth=1.2,
                        color=COLOURS[variant],
                    )
                    ticks |= {x for x, _ in points}
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.tick_params(labelsize=7)
            plain_ticks(axis.xaxis, sorted(ticks), axis.get_xlim())
            low, high = axis.get_ylim()
            steps = (1, 2, 5) if high > 8 * low else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)
            decades = [step * 10.0**e for e in range(-4, 6) for step in steps]
            plain_ticks(axis.yaxis, decades, (low, high))
            axis.grid(alpha=0.3)
            axis.set_xlabel(AXES[name], fontsize=8)
            if column == 0:
                axis.set_ylabel(label, fontsize=8)
            if below == 0:
                axis.set_title(form, fontsize=9)
    figure.legend(
        drawn.values(),
        drawn,
        fontsize=8,
        frameon=False,
        ncols=len(drawn),
        loc="outside upper center",
    )
    return figure
