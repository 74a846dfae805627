"""python -m train --profile: where a step's time goes."""

import contextlib
import dataclasses
import gzip
import json

import pytest
import torch

from tests.train.helpers import CONFIG, TINY, batch, run, trainer
from train.run.profile import Profile, describe, fused_parts
from train.trainer.gan import Trainer

SHORT = dataclasses.replace(CONFIG, batch_size=2, frames=6)
STEPS = 5


def losses(trained: Trainer, profile: Profile | None = None) -> list[float]:
    """The generator's loss in every step, of a profile if there is one."""
    found = []
    for i in range(STEPS + 1):
        with profile.step() if profile else contextlib.nullcontext():
            with trained.section("data wait"):
                item = batch(SHORT)
            terms = trained.step(item, torch.Generator().manual_seed(i))
        found.append(terms["loss/generator"].item())
    return found


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[Profile, list[float]]:
    watched = trainer(SHORT)
    profile = Profile(watched, tmp_path_factory.mktemp("run"), STEPS)
    return profile, losses(watched, profile)


def test_a_breakdown_sums_to_one_and_finds_every_part(profiled):
    profile, _ = profiled
    result = profile.result()
    shares = result["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in shares.values())
    for name in ("generator forward", "generator backward", "optimiser", "data wait"):
        assert shares[name] > 0
    for name in ("frame", "sequence", "sync"):
        assert shares[f"{name} discriminator"] > 0
    assert shares["rest"] < 0.5
    assert 0 < result["fused_share"] < 1
    assert result["amdahl_limit"] == pytest.approx(1 / (1 - result["fused_share"]))
    steady = result["seconds_per_step"]["steady"]
    assert result["frames_per_s"] == pytest.approx(SHORT.batch_size * SHORT.frames / steady)
    assert result["steps"] == {"warm": 1, "free": 1, "timed": 1}
    assert "| sum | 100.0 % |" in (profile.run / "profile.md").read_text()
    saved = json.loads((profile.run / "profile.json").read_text())
    assert saved["shares"] == shares


def test_the_trace_names_the_parts(profiled):
    profile, _ = profiled
    trace = json.loads(gzip.decompress((profile.run / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"generator forward", "sync discriminator"} <= names


def test_a_long_wait_for_data_gets_a_warning(profiled):
    result = profiled[0].result()
    result["shares"]["data wait"] = 0.02
    assert "warning" not in describe(result)
    result["shares"]["data wait"] = 0.2
    assert "20 % of the step waits for data" in describe(result)


def test_a_profiled_step_computes_what_any_step_does(profiled):
    assert profiled[1] == pytest.approx(losses(trainer(SHORT)), rel=1e-3)


def test_the_fused_parts_are_the_outermost_ones():
    model = trainer(SHORT).model
    names = {type(part).__name__ for part in fused_parts(model)}
    assert {"CPFusion", "FirstBlock", "SkipConvBlock", "UpConvBlock", "FinalBlock"} <= names
    inside = model.generator.first.norm
    assert all(part is not inside for part in fused_parts(model))


def test_the_command_writes_the_profile_and_goes_on(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    args = [*TINY, "--data", str(data), "--out", str(out), "--profile"]
    assert run([*args, "--steps", "5"], monkeypatch) == 0
    assert "Amdahl" in capsys.readouterr().out
    assert (out / "profile.md").read_text().startswith("| part of a step")
    assert (out / "checkpoint.safetensors").exists()


def test_too_few_steps_are_refused_before_anything_is_written(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    args = [*TINY, "--data", str(data), "--out", str(out), "--profile"]
    assert run([*args, "--steps", "4"], monkeypatch) == 2
    assert "--profile of 4 steps: needs 5" in capsys.readouterr().err
    assert not out.exists()
