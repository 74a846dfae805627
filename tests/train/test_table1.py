"""The table: its plan, its jobs, killed and resumed, and what it says."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.simple_jobs import fail, write_text
from train.config import PRESETS
from train.errors import UserError
from train.evaluate import EVALUATION_FILE
from train.jobs import JobFailed
from train.metrics.score import Score
from train.metrics.table import COLUMNS, to_json
from train.prepare import prepare_synthetic
from train.table1 import __main__ as command
from train.table1.__main__ import claim
from train.table1.config import TABLES, parse
from train.table1.report import Line, cell, read_lines, table_rows, write_report, write_table
from train.table1.rows import PAPER_GRID, PAPER_ROWS, ROWS
from train.table1.tasks import Task, plan, run_tasks


def test_jobs_wait_for_what_they_need_and_leave_out_what_is_done(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    jobs = [
        Task("b", write_text, (str(second), "b"), ("a",)),
        Task("a", write_text, (str(first), "a")),
        Task("c", fail, (), done=lambda: True),
    ]
    order = []
    assert run_tasks(jobs, tmp_path, 2, lambda job: order.append(job.name)) == []
    assert order == ["a", "b"]
    assert second.read_text() == "b"


def test_a_failed_job_stops_only_what_needs_it(tmp_path):
    jobs = [Task("bad", fail, ()), Task("good", write_text, (str(tmp_path / "good"), "x"))]
    assert run_tasks(jobs, tmp_path, 2) == ["bad"]
    assert (tmp_path / "good").exists()
    assert "error: --this is not possible" in (tmp_path / "bad.log").read_text()
    jobs.append(Task("after", write_text, (str(tmp_path / "after"), "x"), ("bad",)))
    with pytest.raises(JobFailed, match="bad failed: --this is not possible"):
        run_tasks(jobs, tmp_path, 1)
    assert not (tmp_path / "after").exists()
    jobs = [Task("loner", fail, ()), Task("needed", fail, ()), *jobs[-1:]]
    jobs[-1] = dataclasses.replace(jobs[-1], needs=("needed",))
    with pytest.raises(JobFailed, match=r"^needed failed: .*needed\.log"):
        run_tasks(jobs, tmp_path, 1)


def test_the_plan_is_the_papers_protocol(tmp_path):
    config = dataclasses.replace(TABLES["demo"], out=tmp_path, jobs=2)
    jobs = {job.name: job for job in plan(config, tmp_path / "data")}
    assert len(jobs) == 3 + len(PAPER_ROWS) * config.seeds
    pretraining, _ = jobs["pretrain"].arguments
    assert pretraining.fusion == "concat"
    assert pretraining.encoders == "joint"
    trainings = {name: jobs[name].arguments[0] for name in jobs if name[-1].isdigit()}
    for name, training in trainings.items():
        key, seed = name.rsplit("-", 1)
        budget = (config.steps, config.batch_size, config.frames)
        assert (training.steps, training.batch_size, training.frames) == budget
        assert training.seed == int(seed)
        frozen = key != "speech2vid"
        assert training.encoders == (str(tmp_path / "pretrain") if frozen else "joint")
        assert ("pretrain" in jobs[name].needs) == frozen
        assert training.model.fused_dim == training.model.audio_dim + training.model.identity_dim
    assert trainings["cmf-sr-1"].fusion == "cmf-sr"
    assert trainings["speech2vid-0"].system == "speech2vid"


def test_every_row_has_a_valid_configuration():
    for row in ROWS.values():
        for preset in PRESETS.values():
            row.configure(preset)
    assert ROWS["cp-sumsq"].configure(PRESETS["paper"]).loss.penalty == "sumsq"
    assert ROWS["cp-patch"].configure(PRESETS["demo"]).model.sequence_disc == "patch"


def fake_row(**values: float) -> dict:
    row = {column.key: Score(None, "not measured here") for column in COLUMNS}
    return to_json(row | {key: Score(value) for key, value in values.items()})


def fake_table(out: Path) -> None:
    claim(dataclasses.replace(TABLES["demo"], out=out))
    for name, psnr in (("cp-0", 27.0), ("cp-1", 28.0), ("concat-0", 26.0)):
        (out / name).mkdir()
        record = {
            "row": fake_row(psnr=psnr, av_offset=1.0),
            "networks": {"av": "our SyncNet"},
            "of": "4 test clips",
            "fusion_norm": 2.0,
        }
        (out / name / EVALUATION_FILE).write_text(json.dumps(record))
        (out / name / "metrics.jsonl").write_text('{"step": 7, "val/psnr": 20.0}\n')


def test_the_table_has_means_deviations_reasons_and_the_papers_numbers(tmp_path):
    fake_table(tmp_path)
    text = write_table(tmp_path)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "**27.500 ± 0.707**" in rows["PF-CP"]
    assert "26.000" in rows["concat [2]"]
    assert "**26.000" not in rows["concat [2]"]
    assert "– [1]" in rows["PF-CP"]
    assert "[1] not measured here" in text
    assert "*27.619*" in rows["*paper, GRID: PF-CP*"]
    assert "PF-CMF" not in rows  # not measured yet
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["cp"]["psnr"]["values"] == [27.0, 28.0]
    header, cells, _ = table_rows(read_lines(tmp_path))
    assert all(len(row) == len(header) for row in cells)


def test_stills_stand_in_the_table_below_the_real_video(tmp_path):
    fake_table(tmp_path)
    record = {
        "row": fake_row(acd=0.2),
        "baselines": {"still": fake_row(psnr=29.5), "speaker mean": fake_row(psnr=27.0)},
        "networks": {"acd": "dlib's face-recognition network"},
        "of": "4 test clips",
    }
    (tmp_path / "truth.json").write_text(json.dumps(record))
    lines = read_lines(tmp_path)
    assert [line.title for line in lines[:4]] == ["real video", "still", "speaker mean", "PF-CP"]
    text = write_table(tmp_path)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "29.500" in rows["still"]
    assert "**27.500" in rows["PF-CP"]  # the best of the methods; a still is none


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"row": {"psnr": 3}}', "text", "lost"])
def test_a_damaged_row_is_named(tmp_path, content):
    fake_table(tmp_path)
    path = next(tmp_path.glob("*/evaluation.json"))
    record = json.loads(path.read_text())
    if content == "text":
        record["row"]["psnr"]["value"] = "high"
    elif content == "lost":
        del record["row"]["psnr"]
    path.write_text(json.dumps(record) if content in ("text", "lost") else content)
    with pytest.raises(UserError, match=r"evaluation\.json: not a row of this version") as caught:
        read_lines(tmp_path)
    assert str(path) in str(caught.value)


def test_the_papers_numbers_cover_its_rows():
    assert PAPER_GRID.keys() == PAPER_ROWS.keys()
    assert PAPER_GRID["cmf"]["av_confidence"] == 7.4


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--rows", "cp", "foo"], "--rows foo: expected some of tucker"),
        (["--seeds", "0"], "--seeds 0: expected a positive number"),
        (["--jobs", "-1"], "--jobs -1"),
        (["--rows", "cp", "cp"], "--rows cp cp: expected each row once"),
        (["--frames", "3", "--out", "OUT"], "--frames 3"),
        (["--data", "nowhere", "--out", "OUT"], "does not exist"),
        (["--data", "nowhere", "--out", "FULL"], "not empty and no table"),
        (["--steps", "7", "--out", "TABLE"], "holds a table with --steps"),
    ],
)
def test_mistakes_are_one_line(args, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    claim(dataclasses.replace(TABLES["demo"], out=tmp_path / "table"))
    places = {"OUT": "out", "FULL": "full", "TABLE": "table"}
    args = [str(tmp_path / places[a]) if a in places else a for a in args]
    monkeypatch.setattr(sys, "argv", ["table1", "--preset", "demo", *args])
    try:
        code = command.main()
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()  # a mistake claims nothing


def test_offsets_are_listed_and_labels_can_be_drawn(tmp_path):
    line = Line("PF-CP, Ω norm", "cp-norm")
    line.rows = [{"av_offset": Score(value)} for value in (0.0, 0.0, -14.0)]
    offset = next(column for column in COLUMNS if column.key == "av_offset")
    assert cell(line, offset) == "0, 0, -14"
    line.rows = line.rows[:2]
    assert cell(line, offset) == "0"


def test_the_report_shows_whichever_seed_finished(tmp_path):
    fake_table(tmp_path)
    lines = {line.key: line for line in read_lines(tmp_path)}
    assert lines["cp"].runs == [tmp_path / "cp-0", tmp_path / "cp-1"]
    (tmp_path / "cp-0" / EVALUATION_FILE).unlink()
    lines = {line.key: line for line in read_lines(tmp_path)}
    assert lines["cp"].runs == [tmp_path / "cp-1"]
    assert "one seed" in write_table(tmp_path)


@pytest.mark.slow
def test_a_killed_table_goes_on_where_it_was(tmp_path):
    data = prepare_synthetic(
        tmp_path / "set", clips=18, speakers=6, seconds=2.0, size=(64, 48), workers=1
    )
    out = tmp_path / "table"
    flags = (
        f"--preset demo --data {data} --out {out} --rows cp --seeds 1 --jobs 2 "
        "--pretrain-steps 4 --steps 15 --batch-size 2 --frames 6 --clips 2 --patience 0"
    ).split()
    claim(parse(flags))
    # the measuring networks take minutes: a step of each will do here
    quick = (
        "from train.syncnet import *; from train.embedder import *; import sys; from pathlib "
        "import Path; out, data = Path(sys.argv[1]), sys.argv[2];"
        "train_syncnet(SyncNetConfig(out / 'syncnet.safetensors', data=data, steps=1, windows=15,"
        " batch_size=2, held_out=1));"
        "train_embedder(EmbedderConfig(out / 'embedder.safetensors', data=data, steps=1))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    networks = [sys.executable, "-c", quick, out, data]
    subprocess.run(networks, check=True, env=environment, capture_output=True)
    args = [sys.executable, "-m", "train.table1", *flags]
    process = subprocess.Popen(
        args, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint = out / "cp-0" / "checkpoint.safetensors"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    pretrained = (out / "pretrain" / "checkpoint.safetensors").stat().st_mtime
    time.sleep(2.5)  # the runs end with their parent
    stopped = (out / "cp-0" / "metrics.jsonl").read_text()
    time.sleep(1.0)
    assert (out / "cp-0" / "metrics.jsonl").read_text() == stopped

    done = subprocess.run(args, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "pretrain" / "checkpoint.safetensors").stat().st_mtime == pretrained
    table = (out / "table.md").read_text()
    assert "| PF-CP |" in table
    assert "| real video |" in table
    cells = table_rows(read_lines(out))[1]
    assert all(cell for row in cells if not row[0].startswith("*") for cell in row)
    assert "<video" in (out / "report.html").read_text()
    assert write_report(out, data).exists()
