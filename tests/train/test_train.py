"""The training command: configuration, checkpoints, logs, resumption and a user's mistakes."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tests.train.helpers import TINY, run
from train import config as configuration
from train.config import TrainConfig, parse
from train.data.batches import StepSampler
from train.data.media import read_media
from train.errors import UserError
from train.run.checkpoint import read_checkpoint
from train.run.directory import MetricsLog, read_metrics
from train.trainer.gan import Trainer


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "train", *args]


def test_a_run_leaves_checkpoint_logs_pictures_and_a_video_with_sound(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert run([*TINY, "--data", str(data), "--out", str(out), "--steps", "4"], monkeypatch) == 0
    lines = read_metrics(out)
    trained = [line for line in lines if "loss/l1" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    assert {"loss/d_frame", "loss/omega", "speed/clips_per_s"} <= trained[0].keys()
    assert "val/psnr" in lines[-1]
    tensors, info = read_checkpoint(out)
    assert info["step"] == 4
    assert any(name.startswith("adam.generator.") for name in tensors)
    frames, fps, audio = read_media(out / "samples" / "step_000004.mp4", 16000)
    assert fps == 25
    assert frames.shape[0] == 2 * 15
    assert np.abs(audio).max() > 0.05
    assert (out / "samples" / "step_000004.png").stat().st_size > 1000
    assert (out / "curves.png").stat().st_size > 1000
    assert list((out / "tensorboard").iterdir())
    assert json.loads((out / "environment.json").read_text())["torch"] == torch.__version__
    assert configuration.load_config(out).steps == 4


@pytest.mark.parametrize("encoder", ["raw", "mel"])
def test_a_resumed_run_equals_an_uninterrupted_one(encoder, data, tmp_path, monkeypatch):
    """In what the networks draw themselves too, as the mel encoder does."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [*TINY, "--data", str(data), "--model.audio-encoder", encoder]
    assert run([*common, "--out", str(whole), "--steps", "4"], monkeypatch) == 0
    assert run([*common, "--out", str(parts), "--steps", "2"], monkeypatch) == 0
    assert run(["--resume", str(parts), "--steps", "4"], monkeypatch) == 0
    a, _ = read_checkpoint(whole)
    b, info = read_checkpoint(parts)
    assert info["step"] == 4
    for name, value in a.items():
        # not to the bit: Adam's first steps are ±lr, whatever rounding says
        if name.startswith("model.") and value.is_floating_point():
            assert (b[name] - value).norm() <= 1e-3 * value.norm() + 1e-6, name
    lines = [[x for x in read_metrics(out) if "loss/l1" in x] for out in (whole, parts)]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    for one, other in zip(*lines, strict=True):
        assert other["loss/l1"] == pytest.approx(one["loss/l1"], rel=1e-3)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(data, tmp_path):
    out = tmp_path / "run"
    args = command(*TINY, "--data", str(data), "--out", str(out), "--steps", "100000")
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while len(read_metrics(out)) < 6:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99999, "loss')  # a line the kill cut short
    _, info = read_checkpoint(out)
    step = info["step"] + 3
    args = command("--resume", str(out), "--steps", str(step))
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = [line["step"] for line in read_metrics(out) if "loss/l1" in line]
    assert steps == list(range(1, step + 1))
    assert read_checkpoint(out)[1]["step"] == step


def test_frozen_encoders_come_from_another_run(data, tmp_path, monkeypatch):
    first, second = tmp_path / "concat", tmp_path / "cp"
    common = [*TINY, "--data", str(data), "--steps", "2"]
    assert run([*common, "--fusion", "concat", "--out", str(first)], monkeypatch) == 0
    args = [*common, "--fusion", "cp", "--encoders", str(first), "--out", str(second)]
    assert run(args, monkeypatch) == 0
    a, _ = read_checkpoint(first)
    b, _ = read_checkpoint(second)
    encoders = ("model.identity.", "model.audio.", "model.noise.")
    names = [name for name in a if name.startswith(encoders)]
    assert len(names) > 30
    assert all(torch.equal(a[name], b[name]) for name in names)
    assert not torch.equal(a["model.generator.final.weight"], b["model.generator.final.weight"])


def test_encoders_of_another_size_are_refused(data, tmp_path, monkeypatch, capsys):
    first = tmp_path / "first"
    common = [*TINY, "--data", str(data), "--steps", "1"]
    assert run([*common, "--out", str(first)], monkeypatch) == 0
    args = [*common, "--encoders", str(first), "--model.identity-dim", "9"]
    assert run([*args, "--out", str(tmp_path / "x")], monkeypatch) == 2
    assert "shape" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_not_a_number_stops_the_run_and_keeps_the_checkpoint(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    common = [*TINY, "--data", str(data), "--out", str(out), "--steps", "2"]
    assert run(common, monkeypatch) == 0
    good = (out / "checkpoint.safetensors").read_bytes()
    step = Trainer.step
    broken = lambda *a: {k: v * float("nan") for k, v in step(*a).items()}  # noqa: E731
    monkeypatch.setattr(Trainer, "step", broken)
    assert run(["--resume", str(out), "--steps", "9"], monkeypatch) == 2
    error = capsys.readouterr().err
    assert "not finite" in error
    assert "step 2 stays" in error
    assert (out / "checkpoint.safetensors").read_bytes() == good


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "nowhere"], "does not exist"),
        (["--steps", "0"], "--steps 0"),
        (["--balance", "1.5"], "--balance 1.5: expected a share from 0 to 1"),
        (["--average", "1"], "--average 1.0: expected a share from 0 to below 1"),
        (["--frames", "3"], "--frames 3"),
        (["--model.height", "100"], "multiples of"),
        (["--loss.l1", "-1"], "loss.l1"),
        (["--kernels", "cuda"], "kernels='cuda'"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--resume", "nowhere"], "nowhere"),
    ],
)
def test_a_users_mistake_is_named_with_code_2(args, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = run(["--preset", "demo", *args] if "--resume" not in args else args, monkeypatch)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.strip(" -─│╭╮╰╯")]) <= 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("args", [["--fusion", "sum"], ["--preset", "huge"], ["--stepz", "3"]])
def test_usage_errors_exit_with_code_2(args, monkeypatch, capsys):
    assert run(args, monkeypatch) == 2
    assert args[-1].lstrip("-") in capsys.readouterr().err


def test_an_occupied_directory_is_not_overwritten(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    args = [*TINY, "--data", str(data), "--out", str(tmp_path), "--steps", "1"]
    assert run(args, monkeypatch) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_resuming_with_another_configuration_is_refused(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert run([*TINY, "--data", str(data), "--out", str(out), "--steps", "1"], monkeypatch) == 0
    assert run(["--resume", str(out), "--fusion", "tucker", "--steps", "2"], monkeypatch) == 2
    assert "--fusion tucker (the run has cp)" in capsys.readouterr().err
    assert run(["--resume", str(out), "--model.rank", "9", "--steps", "2"], monkeypatch) == 2
    assert "--model.rank 9" in capsys.readouterr().err
    assert run(["--resume", str(out)], monkeypatch) == 2
    assert "already at step 1" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert run([*TINY, "--data", str(data), "--out", str(out), "--steps", "1"], monkeypatch) == 0
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert run(["--resume", str(out), "--steps", "2"], monkeypatch) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_clip_is_named(data, tmp_path, monkeypatch, capsys, workers):
    damaged = tmp_path / "set"
    shutil.copytree(data, damaged)
    for path in (damaged / "clips").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    args = [*TINY, "--data", str(damaged), "--out", str(tmp_path / "run"), "--workers", workers]
    assert run([*args, "--steps", "1"], monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "not a readable clip file" in error
    assert multiprocessing.active_children() == []  # this process would wait for them at its end


def test_presets_differ_and_flags_override_them():
    paper = parse(["--preset", "paper"])
    assert paper == TrainConfig()
    assert (paper.loss.l1, paper.loss.omega, paper.lr_sequence) == (600, 100, 1e-5)
    demo = parse(["--preset", "demo", "--fusion", "cmf-sr", "--loss.l1", "7"])
    assert demo.model.height == 64
    assert (demo.fusion, demo.loss.l1, demo.loss.frame) == ("cmf-sr", 7, 1)


def test_configuration_survives_json():
    config = parse(["--preset", "demo", "--out", "somewhere"])
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_foreign_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a run configuration"):
        configuration.load_config(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("steps",), "300", 'steps is "300", expected a whole number'),
        (("workers",), True, "workers is true, expected a whole number"),
        (("lr_frame",), None, "lr_frame is null, expected a finite number"),
        (("lr_frame",), float("inf"), "lr_frame is Infinity, expected a finite number"),
        (("betas",), [0.5], r"betas is \[0\.5\], expected a list of 2"),
        (("limit",), "all", 'limit is "all", expected a whole number or null'),
        (("fusion",), "sum", 'fusion is "sum", expected one of cp, '),
        (("data",), 3, "data is 3, expected a text"),
        (("loss",), None, "loss is null, expected an object"),
        (("loss", "l1"), "much", r'loss\.l1 is "much", expected a finite number'),
        (("model", "eyes"), 1, r"model\.eyes is 1, expected true or false"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, path, value, message):
    record = parse(["--preset", "demo"]).to_dict()
    (record if len(path) == 1 else record[path[0]])[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        configuration.load_config(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", 'it is "{", expected an object'),
        ("7", "it is 7, expected an object"),
        ("\x00" * 9, "it is .*, expected an object"),
        ('{"loss/l1": 1}', "step is missing"),
        ('{"step": 1.5}', "step is 1.5, expected a whole number of at least 0"),
        ('{"step": 2, "val/psnr": "high"}', 'val/psnr is "high", expected a finite number'),
        ('{"step": 2, "loss/l1": NaN}', "loss/l1 is NaN, expected a finite number"),
    ],
)
def test_a_damaged_line_of_the_log_is_named(tmp_path, line, message):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2: {message}; delete this line"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}')  # cut short by a kill
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_validation_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr("train.loop.validate", lambda _: {"val/psnr": float("nan")})
    args = [*TINY, "--data", str(data), "--out", str(out), "--steps", "2"]
    assert run(args, monkeypatch) == 2
    assert "error: val/psnr is not finite at step 2" in capsys.readouterr().err
    assert all("val/psnr" not in line for line in read_metrics(out))


def test_batches_follow_from_the_step_alone():
    whole = list(StepSampler("abcde", 3, 0, 0, 10))
    assert list(StepSampler("abcde", 3, 0, 4, 10)) == whole[4:]
    flat = [i for batch in whole for i in batch]
    assert sorted(flat[:5]) == [0, 1, 2, 3, 4]
    assert sorted(flat[5:10]) == [5, 6, 7, 8, 9]  # the second epoch
    assert whole != list(StepSampler("abcde", 3, 1, 0, 10))


def test_logs_drop_what_lies_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(step, {"loss/l1": 1 / step})
    log.close()
    MetricsLog(tmp_path, start=3).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.slow
def test_the_default_command_trains_with_the_interpreter(data, tmp_path):
    """``--kernels triton`` on a machine without a GPU, said once in one line."""
    out = tmp_path / "run"
    tiny = [arg if arg != "eager" else "triton" for arg in TINY]
    args = command(*tiny, "--data", str(data), "--out", str(out), "--steps", "2")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(args, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("interpreter") == 1
