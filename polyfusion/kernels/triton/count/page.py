"""Write the table down for people: every operator, its launches, and what dominates."""

import math
from itertools import groupby
from typing import Any

MULTIPROCESSORS, BANDWIDTH, RATE = 132, 3.0e12, 798e12  # an H100: bytes and bf16 FLOPs a second
_HEAD = """# What the kernels ask of a GPU

**Counted, not timed.** No figure on this page was measured on a GPU, but two constants. Loads and
stores are counted in Triton's interpreter, at every address a device would touch, in its tiles;
registers and widths are what Triton {version} compiles for an H100. The page is made by

    python -m polyfusion.kernels.triton.count tests/library/counted_kernels.json docs/kernels.md

Sizes are the paper's in bfloat16: 16 clips of 75 frames, views of 256 and 128 values, 384 outputs
with 10 of noise, maps of 1200 frames.

- **requested** is what all programs ask the memory system for, caches included; **compulsory** is
  every operand once. Of an operator, compulsory are its operands and results, and no intermediates.
- **waves**: programs by those that {sms} multiprocessors hold at a time.
- **≥ µs** is the longest of compulsory bytes at 3.0 TB/s (a copy, measured on an H100) and FLOPs
  at 798 TFLOP/s (bf16, measured on one), and **asked µs** the same of the requested bytes, and of
  FLOPs on as many multiprocessors as have a program. FLOPs are those of the tiles, padding
  included. Caches make it less, latencies more: below a few µs neither says much, the number of
  launches does.
- **loads, stores, copies**: bytes a lane moves at once, the narrowest first; copies are
  asynchronous. 16 is the best, 2 is one bf16 value at a time.

## Which kernels a call gets

`kernels="auto"` takes PyTorch's operators on a CPU, for float64, in forward mode and under
transforms of `torch.func`; on a GPU Triton's kernels; and the CUDA extension where Triton cannot
launch (it needs a C compiler and Python's headers at run time) and the extension was built by
`python -m polyfusion.build`, which needs neither. That is what there are two backends for. That
one is faster than the other, or than PyTorch, somewhere is not known before both have been timed
(`python -m bench.gpu`), and then this rule should follow the times.

## Why not fewer launches, and no split sums

- Tucker's backward is a chain of four products, each of the result before it: the output's gradient
  with the output matrix; that with the projected views, to a matrix per clip; that with the core;
  that with the weights. The first two in one launch would have every program of the second form
  its tiles of both factors itself, 24 matrix steps that wait for each other in place of 2.
- The gradients of the weights sum over 1200 frames in 19 steps of 64. Splitting that sum would
  occupy more multiprocessors, but its parts must then be added in fixed order, for results are the
  same from run to run: one launch more, and the parts written and read, for a kernel of a few
  microseconds.
- Matrix instructions take 16 rows at the least, and 1200 frames are 75 such tiles: a fusion in one
  launch that reads every frame's operands once leaves half of {sms} multiprocessors idle. The
  forward has three tiles of outputs instead, each of which reads the frames again, from the cache.

## The host

Microseconds from the call to the launch, with a stub in the launch's place; beside it PyTorch's
operators on the smallest sizes there are, whose time is that of their calls. Measured on {host}.

| fusion | fused, without grad | eager | fused, with grad | eager |
|---|---:|---:|---:|---:|
{rows}
"""
_OPERATORS = (
    "| operator | launches | PyTorch's | compulsory MB | requested MB | ratio | ≥ µs | asked µs |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|\n"
)
_LAUNCHES = (
    "| kernel | programs | waves | requested / compulsory MB | GFLOP | registers | shared KB "
    "| warps per SM | loads | stores | copies | asked µs |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---|---|---|---:|\n"
)


def render(table: dict[str, Any]) -> str:
    """The page of a table, with what its newest Triton compiled."""
    version = max(table["compiled"], key=lambda v: [int(x) for x in v.split(".")[:2]])
    compiled = table["compiled"][version]
    pairs = list(zip(table["launches"], compiled, strict=True))
    groups = {name: list(rows) for name, rows in groupby(pairs, lambda pair: pair[0]["call"])}
    operators = {row["call"]: row for row in table["operators"]}
    host, rows = table["host"]["of"], "".join(map(_host, table["host"]["rows"]))
    head = _HEAD.format(version=version, sms=MULTIPROCESSORS, host=host, rows=rows)
    parts = [head, "## Operators\n\n", _OPERATORS]
    parts += [_operator(operators[name], [row for row, _ in rows]) for name, rows in groups.items()]
    for name, rows in groups.items():
        parts.append(f"\n## {name}\n\n{describe(operators[name], rows)}\n\n{_LAUNCHES}")
        parts += [_launch(*pair) for pair in rows]
    return "".join(parts)


def floor(compulsory: float, flops: float) -> float:
    """Microseconds that these bytes and FLOPs take at the least."""
    return 1e6 * max(compulsory / BANDWIDTH, flops / RATE)


def asked(row: dict[str, Any]) -> float:
    """Microseconds that a launch's requests take, on the multiprocessors that have a program."""
    share = min(1, math.prod(row["grid"]) / MULTIPROCESSORS)
    return 1e6 * max(row["requested"] / BANDWIDTH, row["flops"] / (RATE * share))


def describe(operator: dict[str, Any], rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """What dominates, in sentences: the costliest launch, its operand, and what is in the way."""
    row, compiled = max(rows, key=lambda pair: asked(pair[0]))
    name, (size, loaded, stored) = max(row["operands"].items(), key=lambda x: sum(x[1][1:]))
    did, moved = ("reads", loaded) if loaded > stored else ("writes", stored)
    often = "once" if round(moved / size, 2) == 1 else f"{moved / size:.3g} times"
    text = [f"`{row['kernel']}` asks for most. What it moves most is `{name}`: it {did} it {often}"]
    programs = math.prod(row["grid"])
    if programs < MULTIPROCESSORS:
        text.append(f"Its {programs} programs leave multiprocessors idle")
    narrow = [x for x in ("loads", "stores", "copies") if "2" in compiled[x]]
    if narrow:
        text.append(f"Some of its {' and '.join(narrow)} are 2 bytes wide")
    if row["masked"] >= 0.1:
        text.append(f"{row['masked']:.0%} of its lanes are masked off")
    if floor(operator["compulsory"], sum(r["flops"] for r, _ in rows)) < 5:
        count = len(rows) + len(operator["library"])
        text.append(f"At this size latency and {count} launch{'es' * (count > 1)} decide")
    return ". ".join(text) + "."


def _host(row: dict[str, Any]) -> str:
    times = (f"{x:.0f}" for pair in zip(row["fused"], row["eager"], strict=True) for x in pair)
    return f"| {row['fusion']} | {' | '.join(times)} |\n"


def _operator(row: dict[str, Any], launches: list[dict[str, Any]]) -> str:
    requested, flops = (sum(x[key] for x in launches) for key in ("requested", "flops"))
    library = ", ".join(row["library"]) or "–"
    least, most = floor(row["compulsory"], flops), sum(map(asked, launches))
    return (
        f"| {row['call']} | {len(launches)} | {library} | {_mb(row['compulsory'])} | "
        f"{_mb(requested)} | {requested / row['compulsory']:.2f} | {least:.2f} | {most:.2f} |\n"
    )


def _launch(row: dict[str, Any], compiled: dict[str, Any]) -> str:
    programs, warps = math.prod(row["grid"]), compiled["config"]["num_warps"]
    waves = programs / (MULTIPROCESSORS * compiled["per_sm"])
    moves = (_widths(compiled[kind]) for kind in ("loads", "stores", "copies"))
    return (
        f"| `{row['kernel']}` | {programs} | {waves:.2f} | "
        f"{_mb(row['requested'])} / {_mb(row['compulsory'])} | {row['flops'] / 1e9:.3g} | "
        f"{compiled['registers']} | {compiled['shared'] / 1024:.3g} | "
        f"{warps * compiled['per_sm']} of 64 | {' | '.join(moves)} | {asked(row):.2f} |\n"
    )


def _widths(found: dict[str, int]) -> str:
    return ", ".join(reversed(found)) or "–"


def _mb(size: float) -> str:
    return f"{size / 1e6:.3g}" if size < 1e9 else f"{size / 1e6:.0f}"
