"""Results on disk: DIR/results.jsonl, a line about the run and then a line for every row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS_FILE = "results.jsonl"


class ResultsError(Exception):
    """A results directory that cannot be used; the message is the line to print."""


@dataclass
class Results:
    """One run on one machine."""

    head: dict[str, Any]
    rows: list[dict[str, Any]]

    def find(self, **wanted: str) -> list[dict[str, Any]]:
        """The rows with these values."""
        return [row for row in self.rows if all(row[k] == v for k, v in wanted.items())]


def read_results(folder: Path) -> Results:
    """Read DIR/results.jsonl; a line cut short by a kill is left out."""
    path = folder / RESULTS_FILE
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from None
    values = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    if not values or "machine" not in values[0]:
        raise ResultsError(f"{path}: no results of `python -m bench`")
    return Results(values[0], values[1:])


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is about."""
    return tuple(row[name] for name in ("group", "case", "dtype", "run", "variant"))


def regressions(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], margin: float = 0.3
) -> list[str]:
    """A line for every speed-up that fell by more than the share ``margin`` from old to new.

    Ratios within a run are compared, never times: the machines may differ. A speed-up that is now
    refused, because its variant fails or disagrees with the oracle, has fallen too.
    """
    before = {key(row): row for row in old}
    found = []
    for row in new:
        earlier = before.get(key(row))
        if earlier is None or not earlier["speedup"]:
            continue
        name = f"{row['group']} {row['case']} {row['dtype']}, {row['run']}, {row['variant']}"
        if not row["speedup"]:
            found.append(f"{name}: {earlier['speedup']:.2f}× before, now {row['failure']}")
        elif row["speedup"] < earlier["speedup"] * (1 - margin):
            found.append(f"{name}: {earlier['speedup']:.2f}× before, now {row['speedup']:.2f}×")
    return found
