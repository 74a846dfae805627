"""One row of the table: from a run, from videos, and what is refused."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.helpers import CPU, TINY, measure
from train import evaluate as evaluation
from train.config import PRESETS, TrainConfig, parse
from train.data.media import read_media, write_video
from train.device import clip_to_device
from train.errors import UserError
from train.evaluate import EvaluateConfig, animate, clip_pairs, evaluate, whole_clips
from train.loop import train
from train.metrics.quality import psnr
from train.metrics.score import MetricError, Score
from train.metrics.syncnet import OURS, OurSyncNet
from train.metrics.table import COLUMNS, Meters, Pair, from_json, median_score, to_json
from train.metrics.weights import save_network
from train.prepare import prepare_synthetic
from train.run.checkpoint import load_run
from train.run.directory import METRICS_FILE, stalled

#: The size of the clips that these tests measure.
SIZE = ["--model.height", "64", "--model.width", "48", "--model.depth", "4", "--steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("set") / "synthetic"
    return prepare_synthetic(out, clips=12, speakers=6, seconds=1.0, size=(64, 48), workers=1)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "cp"
    return train(parse([*TINY, *SIZE, "--data", str(data), "--out", str(out)]))


@pytest.fixture
def syncnet(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "syncnet.safetensors"
    save_network(path, OURS, OurSyncNet(), {})
    return path


def command(args: list, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, args)])
    try:
        return evaluation.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)


def test_a_run_is_measured_on_unseen_speakers(run, data, syncnet, capsys):
    row = evaluate(EvaluateConfig(run, syncnet=syncnet, clips=3))
    assert row.keys() == {column.key for column in COLUMNS}
    config, model = load_run(run, CPU)
    clips = whole_clips(config, data, "test", 3)
    entries = json.loads((data / "manifest.json").read_text())["clips"]
    seen = {entry["speaker"] for entry in entries if entry["split"] == "train"}
    assert seen.isdisjoint(clips.speakers)
    expected: dict[str, list] = {}
    for index in range(len(clips)):
        item = clips[index]
        batch = clip_to_device(item, CPU)
        value = psnr(animate(model, batch, index)[None], item["frames"][None])
        expected.setdefault(clips.clips[index]["speaker"], []).append(float(value))
    mean = np.mean([np.mean(values) for values in expected.values()])  # over people, not clips
    assert [len(values) for values in expected.values()] == [2, 1]
    assert row["psnr"].value == pytest.approx(mean, abs=1e-9)
    assert 0 <= row["cpbd"].value <= 1
    assert "train.embedder" in row["acd"].reason
    record = json.loads((run / "evaluation.json").read_text())
    assert from_json(record["row"]) == row
    assert record["networks"]["av"] == OURS
    assert record["fusion_norm"] > 0
    assert record["baselines"].keys() == {"still", "speaker mean", "real video"}
    still = from_json(record["baselines"]["still"])
    assert still["psnr"].value > row["psnr"].value
    assert (still["acd"].reason, still["av_distance"].value > 0) == (row["acd"].reason, True)
    printed = capsys.readouterr().out
    assert "AV conf." in printed
    assert OURS in printed


def test_the_real_clips_have_a_row_of_their_own(run, syncnet):
    row = evaluate(EvaluateConfig(run, syncnet=syncnet, clips=2, ground_truth=True))
    assert row["psnr"].value is None
    assert "real video itself" in row["psnr"].reason
    assert row["blinks_per_s"].value is not None
    assert (run / "ground-truth.json").exists()


def test_the_same_seed_gives_the_same_video_and_another_seed_another(run, data):
    config, model = load_run(run, CPU)
    model.generator.final.weight.data.mul_(1000)  # two steps leave an almost grey picture
    clips = whole_clips(config, data, "test", 1)
    once, again, other = (next(clip_pairs(model, clips, CPU, seed)).made for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def make_videos(folder: Path, frames: int = 30, fps: float = 25.0, silent: bool = False) -> Path:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)
    sound = np.zeros(int(16000 * frames / fps), np.float32)
    sound += 0 if silent else rng.normal(0, 0.1, len(sound)).astype(np.float32)
    folder.mkdir(exist_ok=True)
    write_video(folder / "a.mp4", pictures, fps, sound, 16000)
    return folder


def test_folders_of_videos_are_compared_by_name(tmp_path, monkeypatch, capsys):
    made, real = make_videos(tmp_path / "made"), make_videos(tmp_path / "real")
    assert command([made, "--real", real, "--out", tmp_path / "row.json"], monkeypatch) == 0
    row = from_json(json.loads((tmp_path / "row.json").read_text())["row"])
    assert row["ssim"].value == pytest.approx(1)
    assert "identical" in row["psnr"].reason
    assert row["blinks_per_s"].value is None
    assert re.search("no face found|pip install", row["blinks_per_s"].reason)
    assert "1 video of" in capsys.readouterr().out


def test_videos_of_other_systems(tmp_path, syncnet, monkeypatch, capsys):
    made, real = make_videos(tmp_path / "made"), make_videos(tmp_path / "real")
    (real / "a.mp4").rename(real / "a.mpg")
    short = make_videos(tmp_path / "short", frames=29) / "a.mp4"
    short.rename(made / "short.mp4")
    for name in ("short.mp4", "mute.mov", "broken.avi", "unused.mp4"):
        shutil.copy(real / "a.mpg", real / name)
    write_video(made / "mute.MP4", read_media(real / "a.mpg", 16000)[0], 25)
    (made / "broken.mp4").write_text("no video")
    shutil.copy(made / "a.mp4", made / "unpaired.mp4")
    args = [made, "--real", real, "--out", tmp_path / "row.json", "--syncnet", syncnet]
    assert command(args, monkeypatch) == 0
    said = capsys.readouterr().err
    assert f"no real video in {real} of: unpaired.mp4\n" in said
    assert f"no generated video in {made} of: unused\n" in said
    assert "left out: " + str(made / "broken.mp4") in said
    assert "29 frames and the real one 30" in said
    row = from_json(json.loads((tmp_path / "row.json").read_text())["row"])
    assert row["ssim"].value > 0.9
    assert row["ssim"].reason.startswith("3 of 5 clips left out")
    assert row["av_offset"].value is not None
    assert row["av_offset"].reason.startswith("4 of 5 clips left out")

    alone = [made / "short.mp4", "--real", real / "a.mpg"]
    assert command(alone, monkeypatch) == 2
    capsys.readouterr()
    assert command([*alone, "--allow-shorter"], monkeypatch) == 0
    assert "short.mp4: one frame fewer, 29 are compared" in capsys.readouterr().err
    mute = [made / "mute.MP4", "--real", real / "a.mpg", "--syncnet", syncnet]
    assert command(mute, monkeypatch) == 0
    assert "the video has no sound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("made", "real", "says"),
    [
        ({"frames": 30}, {"frames": 28}, "30 frames and the real one 28"),
        ({"fps": 25.0}, {"fps": 30.0}, "25, 30 fps: expected one rate"),
        ({"frames": 1}, {"frames": 1}, "a single frame is no video"),
        ({"silent": True}, {}, "every clip is silent"),
    ],
)
def test_videos_that_cannot_be_compared(made, real, says, tmp_path, syncnet, monkeypatch, capsys):
    args = [
        make_videos(tmp_path / "made", **made),
        "--real",
        make_videos(tmp_path / "real", **real),
    ]
    assert command([*args, "--syncnet", syncnet], monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error


def test_what_is_no_run_is_refused_in_one_line(run, data, tmp_path, syncnet, monkeypatch, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.json", bare)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    config["model"]["rank"] = 5
    (other / "config.json").write_text(json.dumps(config))
    for args, says in (
        ([bare], "no such checkpoint"),
        ([tmp_path / "nothing"], "no config.json there"),
        ([other], "has shape"),
        ([run, "--syncnet", run / "checkpoint.safetensors"], "expected weights of our SyncNet"),
        ([run, "--embedder", syncnet], "expected weights of our identity embedder"),
        ([run, "--data", tmp_path / "nothing"], "does not exist"),
        ([run, "--clips", "0"], "--clips 0: expected a positive number"),
        ([run, "--syncnet", syncnet, "--published-syncnet", syncnet], "give one of them"),
        ([tmp_path / "a.mp4"], "--real REAL"),
        ([run, "--real", run / "config.json"], "expected two files or two folders"),
        ([bare, "--real", bare], "no videos there"),
    ):
        assert command(args, monkeypatch) == 2, args
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: "), error
        assert says in error


def test_means_medians_and_the_reasons_of_what_was_left_out():
    row = {"a": Score(1.5), "b": Score(None, "why")}
    assert from_json(json.loads(json.dumps(to_json(row)))) == row
    scores = [Score(3.0), Score(-1.0), Score(None, "silent audio"), Score(-1.0)]
    median = median_score(scores)
    assert median.value == -1
    assert median.reason == "1 of 4 clips left out: silent audio"
    assert median_score([Score(None, "why")]) == Score(None, "why")
    with pytest.raises(MetricError, match="no clips"):
        measure([], Meters())


def test_the_clip_that_cannot_be_measured_is_named():
    frames = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    pair = Pair(frames, frames.clone(), np.ones(640, np.float32), 25.0, 16000, "s1/one")
    with pytest.raises(MetricError, match="s1/one: a single frame"):
        measure([pair], Meters())


def test_a_training_stops_at_a_plateau(tmp_path):
    def log(*values: float) -> None:
        lines = [{"step": 1, "loss/l1": 0.1}]
        lines += [{"step": i, "val/psnr": v} for i, v in enumerate(values)]
        (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))

    log(20, 21, 20.5, 20.9)
    assert stalled(tmp_path, 2, 9)
    assert not stalled(tmp_path, 3, 9)
    assert not stalled(tmp_path, 0, 9)
    assert not stalled(tmp_path, 2, 2)  # what came after the checkpoint was lost
    log(20, 21, 20.5, 21.1)
    assert not stalled(tmp_path, 2, 9)
    log(20)
    assert not stalled(tmp_path, 1, 9)


def test_a_stalled_run_ends_early_with_its_checkpoint_and_is_not_resumed(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("train.loop.validate", lambda *_: {"val/psnr": 10.0})
    out = tmp_path / "run"
    args = [*TINY, *SIZE, "--data", str(data), "--out", str(out), "--validate-every", "1"]
    train(parse([*args, "--steps", "9", "--patience", "2"]))
    assert "step 3 of 9" in capsys.readouterr().out
    assert (out / "samples" / "step_000003.mp4").exists()
    with pytest.raises(UserError, match="--patience 0"):
        train(parse(["--resume", str(out)]))
    with pytest.raises(UserError, match="--patience -1"):
        TrainConfig(patience=-1)
    assert PRESETS["paper"].patience == 0
