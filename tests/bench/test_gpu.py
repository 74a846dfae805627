"""The command for the first minutes on a GPU: its stages' code on the CPU, and what it survives."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import operators, problems
from bench.gpu.__main__ import STAGES, main, run
from bench.gpu.report import report
from bench.gpu.stage import Setting, Stage, work

CPU_STAGES = ("operators-eager", "operators-triton", "kernels", "machine")


@pytest.mark.parametrize("name", CPU_STAGES)
def test_a_stage_runs_on_a_cpu(name, tmp_path):
    """In this process, so that PyTorch is imported once."""
    setting = Setting("cpu", True, tmp_path)
    stage = next(stage for stage in STAGES if stage.name == name)
    file = tmp_path / f"{name}.0.jsonl"
    file.write_text("")
    assert work(stage, setting, 0, 1) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for line in lines for row in line.get("rows", [])]
    assert rows
    assert not [row for row in rows if "failure" in row]


@pytest.mark.parametrize("kind", ["plain", "unwritten", "address", "stride"])
def test_a_wrong_operator_is_found(kind, monkeypatch):
    """Faults of the kinds that each check is there for, planted into the results."""
    right = problems.Problem.results

    def wrong(problem, kernels):
        results = right(problem, kernels)
        x = problem.inputs[0]
        bad = {
            "plain": True,
            "unwritten": torch.empty(1).isnan().item(),  # an element that nothing wrote
            "address": x.storage_offset() != 0,
            "stride": not x.is_contiguous(),
        }[kind]
        if bad and problem.dtype != "float64":
            results[0].view(-1)[-1] = torch.nan if kind == "unwritten" else 1e3
        return results

    monkeypatch.setattr(problems.Problem, "results", wrong)
    make = problems.problems("odd", "cpu", ["float32"])["cp, odd, float32"]
    (row,) = operators.check(make, "eager", large=False, on_gpu=False)
    assert ("misaligned" if kind == "address" else "gaps" if kind == "stride" else "plain") in row[
        "failure"
    ]


def test_a_case_that_dies_or_hangs_costs_itself_alone(tmp_path, monkeypatch):
    """In processes without PyTorch, which are quick to start."""
    script = tmp_path / "lane.py"
    script.write_text(
        "import sys, types; sys.modules['torch'] = types.ModuleType('torch')\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from bench.gpu.stage import Setting, Stage, work, Case, Unavailable\n"
        "from pathlib import Path\n"
        "import os, time\n"
        "def missing(): raise Unavailable('no such tool')\n"
        "def cases(setting):\n"
        "    return [Case('right', lambda: [{'error': 0.0}]), Case('dies', lambda: os._exit(7)),\n"
        "            Case('raises', lambda: [][0]), Case('missing', missing),\n"
        "            Case('hangs', lambda: time.sleep(60), seconds=0.2),\n"
        "            Case('last', lambda: [{'error': 1.0}])]\n"
        "sys.modules['toy'] = types.SimpleNamespace(cases=cases)\n"
        "out = Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "sys.exit(work(Stage('toy', 'Toy', 'toy', 9), Setting('cpu', True, out), 0, 1))\n"
    )
    monkeypatch.setattr("bench.gpu.stage.COMMAND", [sys.executable, str(script)])
    stage = Stage("toy", "Toy", "toy", 20)
    run([stage], Setting("cpu", True, tmp_path), 30)
    result = json.loads((tmp_path / "toy.json").read_text())
    rows = {row["case"]: row for row in result["rows"]}
    assert rows["right"] == {"case": "right", "error": 0.0}
    assert "ended with 7" in rows["dies"]["failure"]
    assert rows["raises"]["failure"].startswith("IndexError")
    assert rows["missing"] == {"case": "missing", "not done": "no such tool"}
    assert "took too long" in rows["hangs"]["failure"]
    assert rows["last"]["error"] == 1.0
    wrong, path = report([stage], tmp_path)
    assert wrong == 3
    assert "no such tool" in path.read_text()


def test_what_has_no_time_is_said(tmp_path):
    assert main(["--out", str(tmp_path), "--seconds", "1", "--only", "kernels"]) == 0
    assert "not begun, the time was over" in (tmp_path / "report.md").read_text()
