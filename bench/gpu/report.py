"""A table of what the stages wrote, for people: DIR/report.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.stage import Stage
from bench.report import table


def report(stages: Sequence[Stage], folder: Path) -> tuple[int, Path]:
    """Write report.md; return how many rows are wrong, and its path."""
    results = {stage.name: _read(folder / f"{stage.name}.json") for stage in stages}
    lines = ["# The first minutes on this machine", ""]
    for stage in stages:
        lines.append(f"- {_short(stage, results[stage.name])}")
    wrong = [
        (stage.title, row)
        for stage in stages
        for row in (results[stage.name] or {"rows": []})["rows"]
        if row.get("failure")
    ]
    lines += ["", f"## {len(wrong)} wrong", ""]
    lines += [f"- {title}: {row['case']}: {row['failure']}" for title, row in wrong]
    for stage in stages:
        result = results[stage.name]
        if result and result["rows"]:
            lines += ["", f"## {stage.title}", "", *_rows(result["rows"])]
        if result and result["not_begun"]:
            lines += ["", f"Not begun: {', '.join(result['not_begun'])}."]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return len(wrong), path


def short(result: dict[str, Any]) -> str:
    """A result in a line."""
    wrong = sum(bool(row.get("failure")) for row in result["rows"])
    text = f"{result['title']}: {len(result['rows'])} rows, {wrong} wrong"
    text += f", {result['seconds']:.0f} s"
    return f"{text}; not done: {result['reason']}" if result["reason"] else text


def _short(stage: Stage, result: dict[str, Any] | None) -> str:
    if result:
        return short(result)
    why = "the time was over" if stage.on_cpu else "it needs a GPU, or the time was over"
    return f"{stage.title}: not begun, {why}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return result


def _rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = list(dict.fromkeys(key for row in rows for key in row))
    return table([[_cell(row.get(key)) for key in header] for row in rows], header)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")
