"""Speech2Vid: training in two stages, and the command."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from torch.nn import functional as F

from model import Speech2Vid
from tests.model.helpers import inputs
from tests.train.helpers import CONFIG as GAN_CONFIG
from tests.train.helpers import CPU, TINY, batch, run
from train import loop
from train.config import TrainConfig, load_config, parse
from train.run.checkpoint import load_modules, read_checkpoint
from train.run.directory import read_metrics
from train.trainer import gan, make_trainer, speech2vid
from train.trainer.base import build_model

CONFIG = dataclasses.replace(GAN_CONFIG, system="speech2vid")


def new_trainer(config: TrainConfig = CONFIG) -> speech2vid.Trainer:
    trainer = make_trainer(config, CPU)
    assert isinstance(trainer, speech2vid.Trainer)
    trainer.make_optimizers()
    return trainer


def smooth():
    """A toy batch: large squares whose brightness follows the loudness of the sound."""
    item = batch(CONFIG)
    squares = F.interpolate(item.frames[:, 0, :, ::8, ::8], scale_factor=8)
    loud = torch.linspace(0.2, 1, CONFIG.frames)
    item.frames[:] = squares[:, None] * loud[None, :, None, None, None]
    item.speech *= loud.repeat_interleave(CONFIG.model.samples_per_frame)
    return item


def step(trainer, item, progress: float) -> dict[str, float]:
    trainer.anneal(progress)
    terms = trainer.step(item, torch.Generator())
    return {name: value.item() for name, value in terms.items()}


def test_both_stages_reduce_l1_and_the_second_leaves_the_first_alone():
    trainer, item = new_trainer(dataclasses.replace(CONFIG, lr_generator=3e-3)), smooth()
    first = step(trainer, item, 0.0)
    assert first["loss/generator"] == pytest.approx(
        (first["loss/l1"] + first["loss/l1_top"]) / 2, rel=1e-4
    )
    untouched = {k: v.clone() for k, v in trainer.model.deblur.state_dict().items()}
    for _ in range(40):
        last = step(trainer, item, 0.5)
    assert last["loss/generator"] < 0.6 * first["loss/generator"]
    assert all(torch.equal(v, untouched[k]) for k, v in trainer.model.deblur.state_dict().items())

    kept = {k: v.clone() for k, v in trainer.model.generator.state_dict().items()}
    first = step(trainer, item, 0.75)
    trainer.model.train()  # as after a validation
    for _ in range(25):
        last = step(trainer, item, 0.8)
    assert last["loss/generator"] < 0.97 * first["loss/generator"]
    assert all(torch.equal(v, kept[k]) for k, v in trainer.model.generator.state_dict().items())
    assert all(not torch.equal(v, untouched[k]) for k, v in trainer.model.deblur.named_parameters())
    trainer.model.eval()
    with torch.no_grad():
        shown = (trainer.model(item.still, item.audio) - item.frames).abs().mean().item()
    trained = step(trainer, item, 0.8)["loss/generator"]
    assert 0.95 * trained < shown <= trained + 1e-6  # clamped to [-1, 1], else what is trained


def test_going_back_to_the_first_stage_trains_its_statistics_again():
    trainer, item = new_trainer(), smooth()
    step(trainer, item, 0.9)
    before = trainer.model.generator.identity.conv1[1].running_mean.clone()
    step(trainer, item, 0.1)
    assert not torch.equal(trainer.model.generator.identity.conv1[1].running_mean, before)


def test_the_learning_rate_falls_in_each_stage():
    trainer = new_trainer(dataclasses.replace(CONFIG, anneal=0.5, deblur_share=0.5))
    rates = []
    for progress in (0.0, 0.25, 0.375, 0.5, 0.75, 0.875):
        trainer.anneal(progress)
        rates.append(trainer.optimizers["deblur"].param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 1e-3, 1e-3, 5e-4])


def test_without_a_share_there_is_no_second_stage():
    trainer = new_trainer(dataclasses.replace(CONFIG, deblur_share=0.0, anneal=0.5))
    trainer.anneal(0.99)
    assert trainer.stage == 1


def test_bf16_autocast_trains():
    trainer, item = new_trainer(dataclasses.replace(CONFIG, precision="bf16")), smooth()
    for progress in (0.0, 0.9):
        assert all(math.isfinite(v) for v in step(trainer, item, progress).values())


def test_the_factory_follows_the_configuration():
    assert isinstance(build_model(CONFIG), Speech2Vid)
    trainer = make_trainer(GAN_CONFIG, CPU)
    assert isinstance(trainer, gan.Trainer)
    assert set(trainer.modules) == {"model", "discriminators"}


COMMAND = [*TINY, "--system", "speech2vid"]


def test_a_run_trains_both_stages_and_leaves_what_any_run_does(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    args = [*COMMAND, "--data", str(data), "--out", str(out), "--steps", "4"]
    assert run([*args, "--deblur-share", "0.5"], monkeypatch) == 0
    assert "Speech2Vid" in capsys.readouterr().out
    lines = read_metrics(out)
    assert [line["step"] for line in lines if "loss/l1" in line] == [1, 2, 3, 4]
    assert "val/psnr" in lines[-1]
    assert (out / "samples" / "step_000004.mp4").stat().st_size > 1000
    config = load_config(out)
    assert config.system == "speech2vid"
    tensors, _ = read_checkpoint(out)
    assert {name.split(".")[1] for name in tensors if name.startswith("adam.")} == {
        "generator",
        "deblur",
    }
    model = build_model(config)
    load_modules({"model": model}, tensors, out)
    still, audio = inputs(config.model)
    assert model.eval()(still, audio).shape[1] == 7


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_resumed_in_either_stage_equals_an_uninterrupted_one(
    data, tmp_path, monkeypatch, stop
):
    common = [*COMMAND, "--data", str(data), "--deblur-share", "0.5", "--steps", "4"]
    common += ["--checkpoint-every", "1"]
    out, copy = tmp_path / "whole", tmp_path / "copy"
    save = loop.save

    def keep(trainer, run_, at):
        save(trainer, run_, at)
        if run_ == out and at == stop:
            shutil.copytree(run_, copy)

    monkeypatch.setattr(loop, "save", keep)
    assert run([*common, "--out", str(out)], monkeypatch) == 0
    assert read_checkpoint(copy)[1]["step"] == stop
    assert run(["--resume", str(copy)], monkeypatch) == 0
    a, b = read_checkpoint(out)[0], read_checkpoint(copy)[0]
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name.startswith("model.") and value.is_floating_point():
            assert (b[name] - value).norm() <= 1e-3 * value.norm() + 1e-6, name


def test_a_speech2vid_run_stays_one(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    args = [*COMMAND, "--data", str(data), "--out", str(out), "--steps", "1"]
    assert run(args, monkeypatch) == 0
    capsys.readouterr()
    again = ["--resume", str(out), "--steps", "2"]
    assert run([*again, "--system", "polyfusion"], monkeypatch) == 2
    assert "--system polyfusion (the run has speech2vid)" in capsys.readouterr().err
    args = [*TINY, "--data", str(data), "--encoders", str(out), "--steps", "1"]
    assert run([*args, "--out", str(tmp_path / "x")], monkeypatch) == 2
    assert "another model" in capsys.readouterr().err


def test_the_profile_covers_its_step(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    args = [*COMMAND, "--data", str(data), "--out", str(out), "--steps", "6", "--profile"]
    assert run(args, monkeypatch) == 0
    shares = json.loads((out / "profile.json").read_text())["shares"]
    assert shares["generator backward"] > 0
    assert shares["frame discriminator"] == 0
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--fusion", "tucker"], "--fusion tucker with --system speech2vid"),
        (["--encoders", "runs/concat-1"], "--encoders runs/concat-1 with --system speech2vid"),
        (["--loss.l1", "7"], "--loss.* with --system speech2vid"),
        (["--lr-sequence", "0.5"], "--lr-sequence with --system speech2vid"),
        (["--deblur-share", "1"], "--deblur-share 1"),
        (["--deblur-share", "-0.1"], "--deblur-share -0.1"),
        (["--model.sample-rate", "4000"], "--model.sample-rate 4000 with --system speech2vid"),
        (["--system", "wav2lip"], "wav2lip"),
    ],
)
def test_a_users_mistake_is_named_with_code_2(args, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = ["--preset", "demo", "--system", "speech2vid", *args]
    assert run(args, monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_the_system_and_its_sizes_are_flags(capsys):
    config = parse(["--preset", "demo", "--system", "speech2vid", "--model.base-channels", "8"])
    assert (config.system, config.model.base_channels) == ("speech2vid", 8)
    assert parse(["--model.height=32", "--system=speech2vid"]).model.height == 32
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert "--system {polyfusion,speech2vid}" in text
    assert "--model.height INT" in text
