"""Benchmark this machine: a fixed selection, results as they come, then a report.

python -m bench --out DIR                    write results.jsonl, report.md and report.html in DIR
python -m bench --out DIR --compare OLD      exit with 1 if a speed-up of OLD has fallen
python -m bench --out DIR --only "fusion cp" measure only what has these words in its name
python -m bench.report                       write README and docs from bench/results/
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path

from bench import bench_block, bench_fusion, bench_growth, bench_model
from bench.machine import describe, nothing_compiled, pick_device
from bench.measure import Comparison, compare
from bench.report import write_report
from bench.results import RESULTS_FILE, ResultsError, read_results, regressions

#: Seconds after which nothing new is begun, and seconds of timing for a pass, by group.
BUDGET = {"cpu": 440, "cuda": 420}
SECONDS = {
    "fusion": 0.15,
    "block": 0.2,
    "generator": 0.6,
    "inference": 0.6,
    "training step": 1.0,
    "growth": 0.05,
}


def selection(on_gpu: bool) -> list[Comparison]:
    """What a run measures, the most telling first: a slow machine leaves out the end."""
    fusion, block = bench_fusion.comparisons(), bench_block.comparisons()
    model, growth = bench_model.comparisons(), bench_growth.comparisons()

    def rank(c: Comparison) -> int:
        first = c.dtype == "float32" and (c.group == "training step" or "paper" in c.case)
        if c.group == "growth":
            return 1
        if c.group == "fusion" and c.case.endswith(("large", "small rank")):
            return 4
        return 0 if first else 1 if c.dtype == "float32" else 2

    return sorted([*fusion, *model, *block, *growth], key=rank)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory to write results.jsonl and the reports to",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD",
        help="directory of earlier results to compare the speed-ups with",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.3,
        help="share by which a speed-up may fall below the earlier one (default: 0.3)",
    )
    parser.add_argument(
        "--only",
        default="",
        help="words that the names of the comparisons to measure contain (default: all)",
    )
    parser.add_argument(
        "--label", help="name of this machine in the reports (default: its processor's or GPU's)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds after which no comparison is begun (default: 440 on a CPU, 420 on a GPU)",
    )
    args = parser.parse_args(arguments)
    try:
        old = read_results(args.compare).rows if args.compare else []
        device = pick_device()
        chosen = [c for c in selection(device.type == "cuda") if args.only in c.name]
        if not chosen:
            raise ResultsError(f"--only {args.only!r}: no comparison has that in its name")
        measure(chosen, args.out, args.label, args.budget)
        report = write_report(args.out)
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {report}")
    fallen = regressions(old, read_results(args.out).rows, args.margin)
    for line in fallen:
        print(f"slower: {line}", file=sys.stderr)
    return 1 if fallen else 0


def measure(
    chosen: list[Comparison], out: Path, label: str | None = None, budget: float | None = None
) -> None:
    """Measure and append every row to DIR/results.jsonl; earlier results there are replaced."""
    began = time.perf_counter()
    machine = describe(pick_device())
    budget = BUDGET[machine["kind"]] if budget is None else budget
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / RESULTS_FILE).open("w", buffering=1)
    except OSError as error:
        raise ResultsError(f"--out {out}: cannot be written ({error.strerror})") from None
    head = {
        "label": label or machine["device"],
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    left_out = []
    with file, nothing_compiled():
        file.write(json.dumps(head, ensure_ascii=False) + "\n")
        for number, comparison in enumerate(chosen, 1):
            elapsed = time.perf_counter() - began
            if elapsed > budget:
                left_out.append(comparison.name)
                continue
            print(f"[{elapsed:4.0f} s, {number}/{len(chosen)}] {comparison.name}", flush=True)
            for row in compare(comparison, SECONDS[comparison.group]):
                file.write(json.dumps(row.to_dict(), ensure_ascii=False) + "\n")
                if row.run == comparison.passes[-1]:
                    note = f"{row.speedup:5.2f}×" if row.speedup else row.failure
                    print(f"    {row.variant:22s} {1e3 * row.median:9.3f} ms  {note}", flush=True)
    for name in left_out:
        print(f"left out, {budget:g} s are over: {name}")


if __name__ == "__main__":
    sys.exit(main())
