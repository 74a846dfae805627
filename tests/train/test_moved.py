"""A run goes on wherever its data, its encoders' run and the working directory have gone."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.train.helpers import TINY, run
from train.config import load_config
from train.prepare import prepare_synthetic
from train.run.checkpoint import read_checkpoint

STEPS = [*TINY, "--device", "cpu", "--steps", "2"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a folder in it to go to."""
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_data_that_has_moved(elsewhere, data, monkeypatch, capsys):
    shutil.copytree(data, "set")
    assert run([*STEPS, "--data", "set", "--out", "run"], monkeypatch) == 0
    assert load_config(Path("run")).data == str(elsewhere / "set")
    monkeypatch.chdir("below")
    again = ["--resume", "../run", "--steps"]
    assert run([*again, "3"], monkeypatch) == 0

    (elsewhere / "set").rename(elsewhere / "moved")
    capsys.readouterr()
    assert run([*again, "4"], monkeypatch) == 2
    assert capsys.readouterr().err == (
        f"error: prepared set {elsewhere / 'set'} does not exist; "
        "if the data of ../run has moved, say where it is: --data DIRECTORY\n"
    )
    assert run([*again, "4", "--data", "../moved", "--device", "auto"], monkeypatch) == 0
    assert run([*again, "5"], monkeypatch) == 0  # now it is known

    other = prepare_synthetic("other", clips=8, speakers=8, seconds=0.6, size=(32, 24), workers=1)
    assert run([*again, "6", "--data", str(other)], monkeypatch) == 2
    assert "other: not the set that ../run was trained on" in capsys.readouterr().err
    assert read_checkpoint(elsewhere / "run")[1]["step"] == 5


def test_encoders_that_have_moved(elsewhere, data, monkeypatch):
    common = [*STEPS, "--data", str(data)]
    assert run([*common, "--fusion", "concat", "--out", "encoders"], monkeypatch) == 0
    assert run([*common, "--encoders", "encoders", "--out", "run"], monkeypatch) == 0
    before = read_checkpoint(Path("run"))[0]
    Path("encoders").rename("moved")
    assert run(["--resume", "run", "--steps", "3"], monkeypatch) == 0
    after = read_checkpoint(Path("run"))[0]
    frozen = [name for name in after if name.startswith("model.identity.")]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
