"""Reports of results: Markdown and one HTML file per run, the tables of README and docs.

python -m bench.report        write them all from bench/results/; README and docs/performance.md too
"""

import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.figures import all_figures, growth, last_runs, save, speedups, to_svg
from bench.results import Results, ResultsError, read_results
from polyfusion.nn.fusion import FUSED

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "<!-- bench:start -->", "<!-- bench:end -->"
OURS = ("rewritten", "compile of rewritten", "folded", "triton", "cuda")
PEERS = ("published", "compile of published", "tensorly")
#: On a GPU the rewritten form is plain PyTorch, and one more to be held against.
REWRITTEN = ("rewritten", "compile of rewritten")
#: The README's rows: group, beginning of the case, dtype.
SHORT = (
    *(("fusion", f"{form}, paper", "float32") for form in FUSED),
    ("fusion", "cp, stream", "float32"),
    ("block", "skip conv 1024", "float32"),
    ("block", "final", "float32"),
    ("block", "norm, slope", "float32"),
    ("generator", "paper", "float32"),
    ("inference", "paper, frame by frame", "float32"),
    ("training step", "paper", "float32"),
    ("training step", "paper", "bfloat16"),
)
HOW = (
    "Times are medians of synchronised calls; the variants of a comparison take turns, and a "
    "speed-up is the median over the turns. Every variant agreed with a float64 oracle first: "
    "*error* is the worst ‖difference‖ / ‖oracle‖ of its results and gradients. *published* is the "
    "equation or network as usually written, *rewritten* ours in plain PyTorch. FLOPs are those of "
    "the form computed, bytes are every operand read and every result written once, and shares "
    "are of the ceilings above."
)


def write_report(folder: Path) -> Path:
    """Write report.md and report.html beside the results; return the latter's path."""
    results = read_results(folder)
    (folder / "report.md").write_text(markdown(results))
    path = folder / "report.html"
    path.write_text(page(results))
    return path


def circumstances(results: Results) -> list[str]:
    """What the numbers were measured on."""
    machine = results.head["machine"]
    ceilings, device, label = machine["ceilings"], machine["device"], results.head["label"]
    label = device if label == device else f"{label} ({device})"
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("python", "torch", "triton", "cuda", "tensorly", "polyfusion")
        if machine.get(name)
    )
    return [
        f"Measured on {label}, {results.head['date']}.",
        f"Versions: {versions}.",
        f"Ceilings measured at the start: matrix product {ceilings['float32'] / 1e9:.0f} GFLOP/s "
        f"in fp32, {ceilings['bfloat16'] / 1e9:.0f} in bf16; copy {ceilings['copy'] / 1e9:.0f} "
        "GB/s.",
    ]


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def number(value: float | None, scale: float = 1.0, unit: str = "") -> str:
    """Three significant digits; nothing where there is no value."""
    if value is None:
        return ""
    scaled = value * scale
    return f"{scaled:.0f}{unit}" if abs(scaled) >= 100 else f"{scaled:.3g}{unit}"


def detail(row: dict[str, Any]) -> list[str]:
    """A row of a full table."""
    if not row["median"]:
        return [row["case"], row["dtype"], row["run"], row["variant"], row["failure"], *[""] * 10]
    speedup = f"{row['speedup']:.2f}×" if row["speedup"] else f"refused: {row['failure']}"
    return [
        row["case"],
        row["dtype"],
        row["run"],
        row["variant"],
        f"{number(row['median'], 1e3)} ({number(row['p20'], 1e3)}-{number(row['p80'], 1e3)})",
        speedup,
        number(row["flops"], 1e-9),
        number(row["flop_share"], 100, " %"),
        number(row["byte_share"], 100, " %"),
        number(row["peak_bytes"], 1e-6),
        number(row["launches"]),
        number(row["frames_per_second"]),
        number(row["real_time"]),
        f"{row['error']:.0e}" if row["error"] is not None else "",
        number(row["first_call"]),
    ]


DETAIL_HEADER = (
    "case",
    "dtype",
    "pass",
    "variant",
    "ms (p20-p80)",
    "speed-up",
    "GFLOP",
    "of matmul",
    "of copy",
    "peak MB",
    "launches",
    "frames/s",
    "× real time",
    "error",
    "first call, s",
)


def details(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A full table, its header first; with times in CUDA graphs where there are any."""
    lines = [list(DETAIL_HEADER), *map(detail, rows)]
    if any(row.get("captured") for row in rows):
        lines[0] += ["in a graph, ms", "speed-up in a graph"]
        for line, row in zip(lines[1:], rows, strict=True):
            line.append(number(row.get("captured"), 1e3))
            line.append(number(row.get("captured_speedup"), unit="×"))
    return lines


def sides(results: Results) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The variants that are ours on this kind of machine, and the peers."""
    if results.head["machine"]["kind"] == "cpu":
        return OURS, PEERS
    return tuple(v for v in OURS if v not in REWRITTEN), (*PEERS, *REWRITTEN)


def passes(results: Results, time: str = "median") -> dict[tuple[str, ...], dict[str, float]]:
    """By group, case, dtype and pass: the time of every variant that agreed with the oracle.

    ``time`` is "median", of calls from Python, or "captured", in a CUDA graph.
    """
    ours, peers = sides(results)
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in results.rows:
        if row["speedup"] and row["group"] != "growth" and row.get(time):
            at = row["group"], row["case"], row["dtype"], row["run"]
            found.setdefault(at, {})[row["variant"]] = row[time]
    return {
        at: times
        for at, times in found.items()
        if any(v in times for v in ours) and any(v in times for v in peers)
    }


def losses(results: Results) -> list[str]:
    """A line for every pass in which our best form is slower than the best peer."""
    lines, (ours, peers) = [], sides(results)
    for time, how in (("median", ""), ("captured", ", in a graph")):
        for (group, case, dtype, run), times in passes(results, time).items():
            best = min((v for v in ours if v in times), key=times.__getitem__)
            peer = min((v for v in peers if v in times), key=times.__getitem__)
            if times[best] > times[peer]:
                share, at = times[peer] / times[best], f"{group} {case}, {dtype}, {run}{how}"
                lines.append(f"- {at}: {best} is {share:.2f}× {peer}")
    return lines


def markdown(results: Results) -> str:
    """The whole report as Markdown."""
    lines = ["# Benchmarks", "", *(f"{line}  " for line in circumstances(results)), "", HOW, ""]
    lost = losses(results)
    lines += ["## Where we lose", "", *(lost or ["Nowhere in this run."]), ""]
    for group in dict.fromkeys(row["group"] for row in results.rows):
        header, *rows = details(results.find(group=group))
        lines += [f"## {group.capitalize()}", "", *table(rows, header), ""]
    return "\n".join(lines)


def page(results: Results) -> str:
    """The whole report as one HTML file that needs no other."""
    body = ["<h1>Benchmarks</h1>"]
    body += [f"<p>{html.escape(line)}</p>" for line in circumstances(results)]
    body.append(f"<p>{html.escape(HOW.replace('*', ''))}</p>")
    for title, figure in all_figures(results).items():
        body.append(f"<h2>{html.escape(title)}</h2>\n{to_svg(figure)}")
    lost = losses(results)
    items = "".join(f"<li>{html.escape(line.removeprefix('- '))}</li>" for line in lost)
    body.append(f"<h2>Where we lose</h2>\n<ul>{items or '<li>Nowhere in this run.</li>'}</ul>")
    for group in dict.fromkeys(row["group"] for row in results.rows):
        header, *rows = details(results.find(group=group))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        cells = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
            for row in rows
        )
        body.append(f"<h2>{html.escape(group.capitalize())}</h2>\n<table><tr>{head}</tr>{cells}")
        body.append("</table>")
    style = (
        "body{font:14px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;font-size:12px}td,th{padding:2px 8px;text-align:left;"
        "border-bottom:1px solid #ddd}svg{max-width:100%;height:auto}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>polyfusion benchmarks</title>'
        f"<style>{style}</style><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def summary(results: Results, wanted: Sequence[tuple[str, str, str]] = ()) -> list[str]:
    """A table of speed-ups over the published form; only the ``wanted`` rows, if any are named."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in last_runs(results):
        at = row["group"], row["case"], row["dtype"], row["run"]
        cases.setdefault(at, {})[row["variant"]] = row
    if wanted:
        cases = {
            at: variants
            for group, case, dtype in wanted
            for at, variants in cases.items()
            if at[0] == group and at[1].startswith(case) and at[2] == dtype
        }
    present = [v for v in (*PEERS[1:], *OURS) if any(v in variants for variants in cases.values())]
    body = []
    for (group, case, dtype, run), variants in cases.items():
        baseline = variants.get("published")
        if baseline is None or not baseline["speedup"]:
            continue
        precision = "" if dtype == "float32" else ", bf16"
        speed = [ratio(variants.get(variant)) for variant in present]
        size = " × ".join(str(baseline["size"].get(name, "")) for name in ("clips", "frames"))
        name = f"{group} {case}{precision}"
        body.append([name, size, run, number(baseline["median"], 1e3), *speed])
    return table(body, ["", "B × T", "pass", "published, ms", *present])


def ratio(row: dict[str, Any] | None) -> str:
    """A speed-up; a dash for a variant that there is none of."""
    if row is None or not row["speedup"]:
        return "–"
    return f"{row['speedup']:.2f}×" if row["speedup"] >= 0.1 else f"{row['speedup']:.1g}×"


def in_short(results: Results) -> list[str]:
    """The README's section of one machine: the table, how often we lose, speed of streaming."""
    lost, all_passes = losses(results), passes(results)
    on_cpu = results.head["machine"]["kind"] == "cpu"
    wanted = [(group, case, dtype if on_cpu else "bfloat16") for group, case, dtype in SHORT]
    shown = summary(results, list(dict.fromkeys(wanted)))
    lines = [" ".join(circumstances(results)[:2]), "", *shown, ""]
    text = (
        f"Our best form is slower than the best peer in {len(lost)} of {len(all_passes)} passes, "
        "[listed here](docs/performance.md)."
    )
    frames = [
        row
        for row in results.find(group="inference", dtype="float32" if on_cpu else "bfloat16")
        if row["case"] == "paper, frame by frame" and row["speedup"] and row["variant"] in OURS
    ]
    if frames:
        best = min(frames, key=lambda row: row["median"])
        text += (
            f" Frame by frame at the paper's size, {best['variant']} makes "
            f"{number(best['frames_per_second'])} frames/s, {number(best['real_time'])} times "
            "real time."
        )
    return [*lines, text]


def replace_between(text: str, replacement: str, path: Path) -> str:
    """The text with what lies between the two markers replaced."""
    start, end = MARKERS
    if start not in text or end not in text:
        raise ResultsError(f"{path}: no {start} … {end} to write the results between")
    before, after = text.split(start, 1)[0], text.split(end, 1)[1]
    return f"{before}{start}\n{replacement}\n{end}{after}"


def result_files(folder: Path) -> list[Path]:
    """The results of every machine in ``folder``."""
    return sorted(folder.glob("*/results.jsonl"))


def generated(folder: Path) -> tuple[str, str]:
    """The README's section and that of docs/performance.md, of every run in ``folder``."""
    runs = {path.parent.name: read_results(path.parent) for path in result_files(folder)}
    if not runs:
        raise ResultsError(f"{folder}: no results; run `python -m bench --out {folder}/NAME`")
    readme = "\n\n".join("\n".join(in_short(results)) for results in runs.values())
    parts = []
    for name, results in runs.items():
        parts += [f"## {results.head['label']}", "", " ".join(circumstances(results)), ""]
        parts += [*summary(results), "", "### Where we lose", ""]
        parts += [*(losses(results) or ["Nowhere in this run."]), ""]
        if results.find(group="growth"):
            parts += ["### Growth", "", f"![Time and memory growing](growth_{name}.svg)", ""]
        parts += [f"![Speed-ups](speedup_{name}.svg)", ""]
    return readme, "\n".join(parts).rstrip()


def write_docs(folder: Path, root: Path = ROOT) -> None:
    """Write the report of every run in ``folder``, and what README and docs/ say of it."""
    readme, performance = generated(folder)
    for path, text in ((root / "README.md", readme), (root / "docs/performance.md", performance)):
        path.write_text(replace_between(path.read_text(), text, path))
    for path in result_files(folder):
        write_report(path.parent)
        results = read_results(path.parent)
        for name, figure in (("growth", growth(results)), ("speedup", speedups(results))):
            if figure is not None:
                save(figure, root / "docs" / f"{name}_{path.parent.name}.svg")


if __name__ == "__main__":
    try:
        write_docs(ROOT / "bench" / "results")
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
