"""Figures of a run: speed-ups against peers, roofline, memory, growth."""

import io
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.results import Results

COLOURS = {
    "published": "#8a8a8a", "compile of published": "#c4a35a", "rewritten": "#2b6cb0",
    "compile of rewritten": "#76b5d9", "tensorly": "#b05a7a", "triton": "#2f855a",
    "cuda": "#8a5ac4", "folded": "#d97706",
}  # fmt: skip
AXES = {
    "frames": "frames T", "clips": "clips B", "rank": "rank k", "views": "views V",
}  # fmt: skip


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
    with plt.rc_context({"svg.hashsalt": "polyfusion"}):
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
    variants = [v for v in COLOURS if any(v in case for case in cases.values())]
    variants = [v for v in variants if v != "published"]
    figure, axis = plt.subplots(figsize=(9, 0.7 + 0.34 * len(cases)), layout="constrained")
    height = 0.8 / max(len(variants), 1)
    for i, variant in enumerate(variants):
        points = [(y, case[variant]) for y, case in enumerate(cases.values()) if variant in case]
        axis.barh(
            [y - 0.4 + (i + 0.5) * height for y, _ in points], [s - 1 for _, s in points], height,
            left=1, color=COLOURS[variant], label=variant,
        )  # fmt: skip
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(cases)), cases, fontsize=7)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_xlabel("times as fast as the published form in the same run")
    axis.legend(fontsize=7, frameon=False)
    axis.grid(axis="x", alpha=0.3)
    return figure


def roofline(results: Results) -> Figure | None:
    """Achieved FLOP/s over arithmetic intensity, under the measured ceilings."""
    rows = [row for row in last_runs(results) if row["flops"] and row["bytes"]]
    if not rows:
        return None
    ceilings = results.head["machine"]["ceilings"]
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    xs = [low * (high / low) ** (i / 99) for i in range(100)]
    for dtype, style in (("float32", "-"), ("bfloat16", "--")):
        if any(row["dtype"] == dtype for row in rows):
            roof = [min(x * ceilings["copy"], ceilings[dtype]) / 1e9 for x in xs]
            axis.plot(xs, roof, style, color="black", linewidth=1, label=f"ceiling, {dtype}")
    for variant, colour in COLOURS.items():
        points = [
            (row["flops"] / row["bytes"], row["flops"] / row["median"] / 1e9)
            for row in rows
            if row["variant"] == variant and row["median"]
        ]
        if points:
            axis.scatter(*zip(*points, strict=True), s=14, color=colour, label=variant)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per compulsory byte")
    axis.set_ylabel("GFLOP/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False)
    return figure


def memory(results: Results) -> Figure | None:
    """Peak memory of every variant relative to the published form."""
    cases: dict[str, dict[str, float]] = defaultdict(dict)
    for row in last_runs(results):
        if row["peak_bytes"]:
            cases[f"{row['group']}: {row['case']} {row['dtype']}"][row["variant"]] = row[
                "peak_bytes"
            ]
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
    axis.legend(fontsize=7, frameon=False)
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
    figure, axes = plt.subplots(
        2, len(panels), figsize=(2.5 * len(panels), 5), layout="constrained", squeeze=False
    )
    for column, (title, lines) in enumerate(panels.items()):
        name = next(iter(lines[0]["size"]))
        for row_index, (quantity, scale, label) in enumerate(
            (("median", 1e3, "ms, forward and backward"), ("peak_bytes", 1e-6, "peak MB"))
        ):
            axis = axes[row_index][column]
            for variant in COLOURS:
                points = sorted(
                    (line["size"][name], line[quantity] * scale)
                    for line in lines
                    if line["variant"] == variant and line[quantity]
                )
                if points:
                    axis.plot(
                        *zip(*points, strict=True), "o-", markersize=3, linewidth=1.2,
                        color=COLOURS[variant], label=variant,
                    )  # fmt: skip
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=7)
            axis.set_xlabel(AXES[name], fontsize=8)
            if column == 0:
                axis.set_ylabel(label, fontsize=8)
            if row_index == 0:
                axis.set_title(title.split(" over ")[0], fontsize=9)
    axes[0][0].legend(fontsize=7, frameon=False)
    return figure
