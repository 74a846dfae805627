"""Table 1 as text and as a page: what the finished rows of OUT say so far."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from train.baselines import SPEAKER_MEAN, STILL
from train.data.media import write_video
from train.device import clip_to_device
from train.errors import UserError
from train.evaluate import EVALUATION_FILE, animate, whole_clips
from train.fields import kind_of
from train.files import write_atomically, write_json
from train.metrics.table import COLUMNS, Column, Row, from_json
from train.pictures import write_picture
from train.run.checkpoint import load_run
from train.run.directory import read_metrics
from train.table1.rows import PAPER_GRID, ROWS

SETTINGS_FILE = "settings.json"
PRETRAIN = "pretrain"  # the pretraining run
TRUTH = "truth"  # .json: the real clips' row
SHOWN_CLIPS = 3
SCALE = 2  # of the pictures and videos
LABEL = 16  # rows above a face
_VALUE = kind_of(float | None)


@dataclass
class Line:
    """A line of the table: a title, a key, and one measured row per seed."""

    title: str
    key: str
    rows: list[Row] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    networks: dict[str, str | None] = field(default_factory=dict)
    of: str = ""
    runs: list[Path] = field(default_factory=list)

    def values(self, column: Column) -> list[float]:
        """What the seeds measured."""
        scores = [row[column.key].value for row in self.rows]
        return [value for value in scores if value is not None]

    def reason(self, column: Column) -> str:
        """Why there is no value, or how many clips were left out."""
        return next((row[column.key].reason for row in self.rows if row[column.key].reason), "")

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        measured = {
            column.key: {"values": self.values(column), "reason": self.reason(column)}
            for column in COLUMNS
        }
        return {**measured, "norms": self.norms, "steps": self.steps}

    def mean(self, column: Column) -> float | None:
        """Mean over the seeds."""
        values = self.values(column)
        return math.fsum(values) / len(values) if values else None


def read_lines(out: Path) -> list[Line]:
    """Every line with a finished run: the real video, stills, the rows, the pretraining run."""
    lines = []
    settings = json.loads((out / SETTINGS_FILE).read_text())
    keys = [key for key in ROWS if key in settings["rows"]]
    sources = [("real video", TRUTH, [out / f"{TRUTH}.json"])]
    for key in keys:
        sources.append((ROWS[key].title, key, sorted(out.glob(f"{key}-[0-9]*/{EVALUATION_FILE}"))))
    sources.append(("concat [2], pretraining run", PRETRAIN, [out / PRETRAIN / EVALUATION_FILE]))
    beside = (STILL, SPEAKER_MEAN)  # measured with the real video
    sources[1:1] = [(title, title, [out / f"{TRUTH}.json"]) for title in beside]
    for title, key, files in sources:
        line = Line(title, key)
        for file in files:
            if not file.exists():
                continue
            try:
                record = json.loads(file.read_text())
                row = record.get("baselines", {}).get(key) if key in beside else record["row"]
                if row is None:
                    continue
                known = from_json(row)
                measured = {column.key: known[column.key] for column in COLUMNS}
                wrong = [s.value for s in measured.values() if not _VALUE.fits(s.value)]
                if wrong:
                    raise ValueError(f"{wrong[0]!r}, expected {_VALUE.words}")
                networks, of = record["networks"], record["of"]
                norm = record.get("fusion_norm")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{file}: not a row of this version ({type(error).__name__}: {error}); "
                    "delete it, and the same command measures it again"
                ) from None
            line.rows.append(measured)
            line.runs.append(file.parent)
            line.networks, line.of = networks, of
            line.norms += [] if norm is None else [norm]
            logged = read_metrics(file.parent) if file.name == EVALUATION_FILE else []
            line.steps += [logged[-1]["step"]] if logged else []
        if line.rows:
            lines.append(line)
    return lines


def cell(line: Line, column: Column) -> str:
    """Mean ± sample deviation over the seeds, or a dash; an offset is not averaged but listed."""
    values = line.values(column)
    if not values:
        return "–"
    if column.key == "av_offset":
        found = sorted(set(values)) if len(set(values)) == 1 else values
        return ", ".join(format(value, column.form) for value in found)
    text = format(math.fsum(values) / len(values), column.form)
    if len(values) > 1:
        text += f" ± {format(float(np.std(values, ddof=1)), column.form)}"
    return text


def best(lines: list[Line], column: Column) -> float | None:
    """The best mean of the rows of a column that has a better end."""
    means = [line.mean(column) for line in lines if line.key in ROWS]
    found = [value for value in means if value is not None]
    if not found or not column.better:
        return None
    return max(found) if column.better == "max" else min(found)


def table_rows(lines: list[Line]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, cells and notes of the table; the paper's numbers in a line under each row."""
    header = ["method", *(column.title for column in COLUMNS), "Σ‖P‖_F", "steps"]
    notes: list[str] = []
    cells = []
    for line in lines:
        row = [line.title]
        for column in COLUMNS:
            text = cell(line, column)
            if line.mean(column) is not None and line.mean(column) == best(lines, column):
                text = f"**{text}**" if line.key in ROWS else text
            if reason := line.reason(column):
                if reason not in notes:
                    notes.append(reason)
                text += f" [{notes.index(reason) + 1}]"
            row.append(text)
        row.append(f"{np.mean(line.norms):.1f}" if line.norms else "–")
        steps = sorted({*line.steps[:1], *line.steps})
        row.append("–".join(map(str, steps[:1] + steps[1:][-1:])) or "–")
        cells.append(row)
        if line.key in PAPER_GRID:
            told = PAPER_GRID[line.key]
            row = [f"*paper, GRID: {line.title}*"]
            for column in COLUMNS:
                value = told.get(column.key)
                form = ".2e" if column.key == "acd" else column.form
                row.append("" if value is None else f"*{format(value, form)}*")
            cells.append([*row, "", ""])
    return header, cells, notes


def remarks(out: Path, lines: list[Line], notes: list[str]) -> list[str]:
    """What to know for reading the table."""
    settings = json.loads((out / SETTINGS_FILE).read_text())
    of = next((line.of for line in lines if line.of), "")
    seeds = sorted({len(line.rows) for line in lines if line.key in ROWS})
    networks = next((line.networks for line in lines if line.networks), {})
    spread = "one seed; "
    if seeds[-1:] > [1]:
        counts = "–".join(map(str, sorted({seeds[0], seeds[-1]})))
        spread = f"mean ± deviation over {counts} seeds; "
    named = ", ".join(f"{key}: {value}" for key, value in networks.items() if value)
    return [
        f"Measured on {of}. {settings['preset']} preset, {settings['steps']} steps of "
        f"{settings['batch_size']} clips × {settings['frames']} frames a row (pretraining "
        f"{settings['pretrain_steps']}); {spread}bold: best row.",
        f"Measured by: {named or 'no networks'}. ACD and AV confidence depend on these networks "
        "and cannot be compared with the paper's, whose ACD is in an unknown normalisation.",
        *(f"[{number}] {note}" for number, note in enumerate(notes, 1)),
    ]


def write_table(out: Path) -> str:
    """Write OUT/table.md and OUT/table.json; return the former."""
    lines = read_lines(out)
    header, cells, notes = table_rows(lines)
    text = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *cells)]
    text += ["", *(f"{remark}  " for remark in remarks(out, lines, notes))]
    record = {line.key: line.record() for line in lines}
    table = "\n".join(text) + "\n"
    write_atomically(out / "table.md", table)
    write_json(out / "table.json", record, indent=1)
    return table


def write_samples(out: Path, root: Path, lines: list[Line]) -> list[Path]:
    """Write a picture, and videos of a few test clips: real and every row's first seed abreast.

    Returns the picture (OUT/samples/rows.jpg) and the videos.
    """
    device = torch.device("cpu")
    folder = out / "samples"
    folder.mkdir(exist_ok=True)
    runs = [(line, line.runs[0]) for line in lines if line.key in ROWS]
    models = [
        (line.title if line.title.isascii() else line.key, *load_run(run, device))
        for line, run in runs
    ]
    data = whole_clips(models[0][1], root, "test", SHOWN_CLIPS)
    pictures, videos = [], []
    for index in range(len(data)):
        item = data[index]
        batch = clip_to_device(item, device)
        made = [("still", item["frames"][:1].expand_as(item["frames"])), ("real", item["frames"])]
        made += [(title, animate(model, batch, index)) for title, _, model in models]
        length = min(len(frames) for _, frames in made)
        panels = [label(frames[:length], title) for title, frames in made]
        clip = data.clips[index]
        path = folder / f"{clip['speaker']}-{clip['name']}.mp4"
        audio = item["audio"].numpy()[: length * data.window_stride]
        write_video(path, np.concatenate(panels, axis=2), data.fps, audio, data.sample_rate)
        videos.append(path)
        times = np.linspace(0, length - 1, 8).round().astype(int)
        strips = [np.concatenate(list(panel[times]), axis=1) for panel in panels[1:]]
        pictures.append(np.concatenate(strips, axis=0))
    picture = folder / "rows.jpg"
    write_picture(picture, np.concatenate(pictures[:2], axis=1))
    return [picture, *videos]


def label(frames: Tensor, title: str) -> np.ndarray:
    """(T, 2H + 16, 2W, 3) uint8: frames (T, 3, H, W) enlarged under their title."""
    panels = []
    for frame in frames.permute(0, 2, 3, 1).cpu().numpy():
        large = cv2.resize(frame, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_CUBIC)
        panel = np.pad(large, ((LABEL, 0), (0, 2), (0, 0)), constant_values=255)
        panel = np.ascontiguousarray(panel)
        font, black = cv2.FONT_HERSHEY_SIMPLEX, (0, 0, 0)
        cv2.putText(panel, title, (2, LABEL - 4), font, 0.32, black, 1, cv2.LINE_AA)
        panels.append(panel)
    return np.stack(panels)


def curves(out: Path, lines: list[Line]) -> bytes:
    """PNG: validation PSNR over the steps, one line per row, seeds averaged."""
    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for line in lines:
        if line.key not in ROWS:
            continue
        by_step: dict[int, list[float]] = {}
        for run in sorted(out.glob(f"{line.key}-[0-9]*")):
            for entry in read_metrics(run):
                if "val/psnr" in entry:
                    by_step.setdefault(entry["step"], []).append(entry["val/psnr"])
        steps = sorted(by_step)
        axis.plot(steps, [np.mean(by_step[step]) for step in steps], label=line.title)
    axis.set_xlabel("step")
    axis.set_ylabel("validation PSNR, dB")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def write_report(out: Path, root: Path) -> Path:
    """Write OUT/report.html, one file with table, curves, pictures and videos."""
    lines = read_lines(out)
    header, cells, notes = table_rows(lines)

    def embed(content: bytes, kind: str) -> str:
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_inline(c)}</{tag}>" for c in cells) + "</tr>"

    body = ["<h1>Table 1</h1>", "<div class=wide><table>", row(header, "th")]
    body += [row(cell, "td") for cell in cells]
    body += ["</table></div>"]
    body += [f"<p>{html.escape(text)}</p>" for text in remarks(out, lines, notes)]
    body += ["<h2>Validation</h2>", f'<img src="{embed(curves(out, lines), "image/png")}">']
    if any(line.key in ROWS for line in lines):
        picture, *videos = write_samples(out, root, lines)
        body += ["<h2>Unseen speakers</h2>"]
        sources = [embed(video.read_bytes(), "video/mp4") for video in videos]
        body += [f'<video controls loop src="{source}"></video>' for source in sources]
        body += [f'<img src="{embed(picture.read_bytes(), "image/jpeg")}">']
    path = out / "report.html"
    page = f"<!doctype html><meta charset=utf-8><title>Table 1</title><style>{STYLE}</style>"
    write_atomically(path, page + "\n".join(body) + "\n")
    return path


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right }
th, td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td i { color: #777 } .wide { overflow-x: auto } img, video { max-width: 100%; display: block }
"""


def _inline(text: str) -> str:
    """A Markdown cell as HTML: bold and italics."""
    text = html.escape(text)
    for mark, tag in (("**", "b"), ("*", "i")):
        if text.startswith(mark):
            head, _, tail = text.removeprefix(mark).rpartition(mark)
            return f"<{tag}>{head}</{tag}>{tail}"
    return text
