"""The benchmarks: what they refuse, how they take turns, what they write."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import bench_fusion, bench_growth
from bench.__main__ import main, selection
from bench.bench_block import block_comparison
from bench.bench_fusion import build_fusion, fusion_comparison
from bench.bench_model import losses
from bench.machine import describe
from bench.measure import (
    PUBLISHED,
    REWRITTEN,
    Comparison,
    Operator,
    Procedure,
    Workload,
    compare,
    count_flops,
    errors_of,
    interleave,
    peak_memory,
)
from bench.plain_trainer import PlainTrainer
from bench.report import ROOT, SHORT, generated, markdown, page, replace_between, write_docs
from bench.results import ResultsError, read_results, regressions
from bench.straightforward import published_fusion
from polyfusion.kernels.eager import views
from polyfusion.nn import make_fusion
from polyfusion.ops import reference
from tests.train.helpers import CONFIG, batch
from train.device import Batch
from train.trainer.gan import Trainer

CPU = torch.device("cpu")
RESULTS = ROOT / "bench" / "results"


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    """Ceilings of a made-up machine: measuring real ones takes a second."""
    made_up = {"float32": 1e11, "bfloat16": 2e11, "copy": 1e10}
    monkeypatch.setattr("bench.machine.ceilings", lambda device: made_up)
    describe.cache_clear()
    yield
    describe.cache_clear()


class Square(Operator):
    """x², with a mistake or a crash on request."""

    def __init__(self, log: list[str], name: str, factor: float = 1.0, crash: bool = False):
        x = torch.linspace(1, 2, 64).requires_grad_()

        def function():
            log.append(name)
            if crash:
                raise RuntimeError("no such kernel\nand a long story")
            return factor * x * x

        super().__init__(function, [x], torch.ones(64))


def squares(log: list[str] | None = None) -> Comparison:
    log = [] if log is None else log
    subjects = {
        PUBLISHED: Square(log, PUBLISHED),
        REWRITTEN: Square(log, REWRITTEN),
        "triton": Square(log, "triton", factor=1.01),
        "cuda": Square(log, "cuda", crash=True),
    }

    def build() -> Workload:
        return Workload(subjects, Square([], "oracle").results)

    return Comparison("toy", "square", tuple(subjects), build, CPU)


def test_a_wrong_or_broken_variant_gets_no_speed_up():
    rows = {(row.run, row.variant): row for row in compare(squares(), 0.001)}
    assert len(rows) == 12
    for run in ("forward", "backward", "both"):
        assert rows[run, PUBLISHED].speedup == pytest.approx(1)
        assert rows[run, REWRITTEN].speedup > 0
        assert rows[run, "triton"].speedup is None
        assert "error 0.01, tolerance" in rows[run, "triton"].failure
        assert rows[run, "cuda"].failure == "RuntimeError: no such kernel"


def test_variants_take_turns_and_every_round_begins_with_another():
    log: list[str] = []
    subjects = {name: Square(log, name) for name in "abc"}
    samples = interleave(subjects, "forward", CPU, 0.0)
    assert log[3:] == [*"abc", *"bca", *"cab"]  # after one warm call each
    assert all(len(times) == 3 for times in samples.values())


class Wait(Procedure):
    """Sleeps for so many seconds."""

    def __init__(self, log: list[str], name: str, seconds: float):
        def call():
            log.append(name)
            time.sleep(seconds)

        super().__init__("step", call, list, traffic=8)


def test_a_far_slower_variant_has_two_turns():
    log: list[str] = []
    subjects = {"a": Wait(log, "a", 0.002), "slow": Wait(log, "slow", 0.1)}
    samples = interleave(subjects, "step", CPU, 0.02)
    assert log.count("slow") == len(samples["slow"]) == 2
    assert len(samples["a"]) >= 3


def test_errors_see_values_shapes_and_nan():
    right = torch.tensor([3.0, 4.0])
    assert errors_of([right], [right]) == (0, 0)
    assert errors_of([right + torch.tensor([0, 0.5])], [right]) == pytest.approx((0.1, 0.125))
    assert errors_of([right[:1]], [right]) == (float("inf"), float("inf"))
    assert errors_of([right * float("nan")], [right])[0] == float("inf")


def test_flops_and_memory_are_those_of_the_form(monkeypatch):
    monkeypatch.setattr(views, "_FEW", 0)  # as at larger sizes
    b, t, a, d, m, k = 2, 6, 16, 8, 12, 4
    size = {"clips": b, "frames": t, "dims": (a, d), "outputs": m, "rank": k}
    work = build_fusion("cp", (PUBLISHED, REWRITTEN), **size)
    per_frame, once = 2 * b * t * k * (a + m), 2 * b * k * d
    published = 2 * b * t * k * (a + 1 + d + 1 + m)
    assert count_flops(work.subjects[REWRITTEN], "forward") == per_frame + once
    assert count_flops(work.subjects[PUBLISHED], "forward") == published
    assert count_flops(work.subjects[PUBLISHED], "backward") == 2 * published
    repeated = 4 * b * t * (d + 1)  # one of the copies that the published form makes
    ours, theirs = (peak_memory(work.subjects[x], "forward", CPU) for x in (REWRITTEN, PUBLISHED))
    assert theirs > ours + repeated
    assert ours >= 4 * b * t * m


@pytest.mark.parametrize("form", ["cp", "tucker", "cmf", "cmf-sr"])
def test_the_oracle_of_the_benchmarks_is_the_dense_tensor(form):
    torch.manual_seed(0)
    layer = make_fusion(form, (5, 4), 6, rank=3).double()
    views = [torch.randn(2, 3, 5).double(), torch.randn(2, 4).double()]
    if form == "cp":
        weight = reference.cp_tensor(list(layer.factors), layer.out)
    elif form == "tucker":
        weight = reference.tucker_tensor(layer.core, list(layer.factors), layer.out)
    else:
        second = None if layer.second is None else list(layer.second)
        weight = reference.cmf_tensor(list(layer.first), second, layer.out, layer.bias)
    dense = reference.dense_fusion_reference(views, weight)
    torch.testing.assert_close(published_fusion(layer, views, None), dense)


def test_the_straightforward_step_is_ours():
    """Loss terms of two steps, so that the first update counts, against float64."""
    config = dataclasses.replace(CONFIG, batch_size=2, frames=6)
    ours = Trainer(config, CPU)
    ours.make_optimizers()
    exact = PlainTrainer(config, ours.model, ours.discriminators).to(torch.float64)
    exact.make_optimizers()
    data = batch(config)
    doubled = Batch(data.frames.double(), data.audio.double())
    got = losses(lambda b, seed: ours.step(b, torch.Generator().manual_seed(seed)), data)
    assert errors_of(got, losses(exact.step, doubled))[0] < 1e-3


def test_every_comparison_of_a_run_has_another_name_and_time_to_be_measured():
    names = [c.name for c in selection(on_gpu=False)]
    assert len(names) == len(set(names))
    for axis, values in (("frames", bench_growth.FRAMES), ("views", bench_growth.VIEWS)):
        assert all(f"growth cp over {axis}, {value} float32" in names for value in values)
    assert all(f"fusion {f}, paper float32" in names for f in bench_fusion.FORMS)
    for group, case, dtype in SHORT:
        assert any(n.startswith(f"{group} {case}") and n.endswith(dtype) for n in names), case


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A run of the command on two cheap comparisons."""
    growth = [c for c in bench_growth.comparisons() if c.name == "growth cp over frames, 3 float32"]
    monkeypatch.setattr("bench.__main__.selection", lambda on_gpu: [squares(), *growth])
    monkeypatch.setattr("bench.__main__.SECONDS", {"toy": 0.001, "growth": 0.001})
    assert main(["--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def test_the_command_writes_results_and_reports(results, capsys):
    found = read_results(results)
    assert found.head["machine"]["ceilings"]["copy"] == 1e10
    assert len(found.rows) == 14
    text = (results / "report.md").read_text()
    assert "refused: error 0.01" in text
    assert "growth" in text.lower()
    html = (results / "report.html").read_text()
    assert html.count("<svg") >= 2
    for outside in ('src="http', 'href="http', "<script", "<link"):
        assert outside not in html
    assert markdown(found) == text
    assert page(found)


def test_a_cut_off_line_is_left_out(results):
    path = results / "results.jsonl"
    path.write_text(path.read_text()[:-30])
    assert len(read_results(results).rows) == 13


def test_a_users_mistakes_end_with_one_line(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--only", "nonsense"]) == 2
    assert main(["--out", str(tmp_path), "--compare", str(tmp_path / "none")]) == 2
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file"), "--only", "concat"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)


def row(speedup: float | None, variant: str = REWRITTEN) -> dict:
    return {
        "group": "g",
        "case": "c",
        "dtype": "float32",
        "run": "both",
        "variant": variant,
        "speedup": speedup,
        "failure": None if speedup else "error 1",
    }


def test_fallen_speed_ups_are_found():
    assert regressions([row(2.0)], [row(1.5)], margin=0.3) == []
    assert len(regressions([row(2.0)], [row(1.3)], margin=0.3)) == 1
    assert "now error 1" in regressions([row(2.0)], [row(None)])[0]
    assert regressions([row(None)], [row(1.0)]) == []
    assert regressions([row(2.0)], [row(1.0, "triton")]) == []


def test_docs_are_written_between_their_markers(results, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.report.SHORT", (("toy", "squ", "float32"),))
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    template = "before\n<!-- bench:start -->\nold\n<!-- bench:end -->\nafter\n"
    for name in ("README.md", "docs/performance.md"):
        (root / name).write_text(template)
    (results / "report.html").unlink()
    write_docs(results.parent, root)
    assert (results / "report.html").exists()
    text = (root / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| toy square |" in text
    assert "slower than the best peer in" in text
    assert "| toy square |" in (root / "docs/performance.md").read_text()
    assert (root / "docs" / "growth_run.svg").exists()
    with pytest.raises(ResultsError, match="bench:start"):
        replace_between("no markers", "x", root / "README.md")


def test_readme_and_docs_are_what_the_results_say():
    if not list((RESULTS).glob("*/results.jsonl")):
        pytest.skip("no results are committed")
    texts = generated(RESULTS)
    for name, text in zip(("README.md", "docs/performance.md"), texts, strict=True):
        written = (ROOT / name).read_text()
        assert replace_between(written, text, ROOT / name) == written, "run python -m bench.report"


CHEAP = (
    # comparison, least speed-up: a third of what is usual, for busy machines
    (
        fusion_comparison("tucker", "paper", bench_fusion.SIZES["paper"]),
        4.0,
    ),  # 11 times fewer FLOPs
    (fusion_comparison("dense", "short", bench_fusion.SHORT), 1.0),
    (block_comparison("first 394 → 1024·4·3"), 0.7),
)


def test_cheap_ratios_have_not_fallen():
    """The comparison mode against the committed results of CPUs, margins generous; what the one
    processor gains most by another gains less."""
    committed = [read_results(p.parent) for p in RESULTS.glob("*/results.jsonl")]
    machines = [run.rows for run in committed if run.head["machine"]["kind"] == "cpu"] or [[]]
    for comparison, least in CHEAP:
        comparison = dataclasses.replace(
            comparison, variants=(PUBLISHED, REWRITTEN), passes=("both",)
        )
        rows = [row.to_dict() for row in compare(comparison, 0.2)]
        assert rows[1]["failure"] is None
        assert rows[1]["speedup"] > least, comparison.name
        assert [] in [regressions(old, rows, margin=0.7) for old in machines]


@pytest.mark.slow
def test_pytest_benchmark_entries_carry_everything(tmp_path):
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "-k",
        "concat or demo-float32-step",
        "--benchmark-only",
        f"--benchmark-json={out}",
        "-p",
        "no:cacheprovider",
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # not xdist's
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout
    entries = json.loads(out.read_text())["benchmarks"]
    assert len(entries) == 8
    for entry in entries:
        info = entry["extra_info"]
        assert entry["stats"]["rounds"] == info["rounds"] >= 2  # a disturbed one may look too slow
        assert entry["stats"]["median"] == pytest.approx(info["median"], rel=1e-3)
        assert info["speedup"] > 0
        for name in ("bytes", "byte_share", "peak_bytes"):
            assert info[name] > 0, name
        assert 0 <= info["max_error"] < 0.1
        assert {"flops", "flop_share", "launches"} <= set(info)
        assert {"device", "torch", "ceilings"} <= set(info["machine"])
