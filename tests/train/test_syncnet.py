"""``python -m train.syncnet``: learns to find known shifts; hostile arguments and data."""

import sys

import numpy as np
import pytest
import torch

from train import syncnet
from train.metrics.sync import sync_scores
from train.metrics.syncnet import OurSyncNet, load_ours, mfcc_windows
from train.prepare import prepare_synthetic
from train.syncnet import SyncNetConfig, draw_windows, matching_loss, shifted, spread, train_syncnet


def command(monkeypatch, capsys, *args):
    """Run ``python -m train.syncnet ARGS`` in this process; exit code and last error."""
    monkeypatch.setattr(sys, "argv", ["syncnet", *map(str, args)])
    try:
        code = syncnet.main()
    except SystemExit as stop:  # tyro's own usage errors
        code = stop.code
    return code, capsys.readouterr().err.strip().splitlines()[-1:]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A built-in set of 9 clips of 9 speakers, 2 s."""
    root = tmp_path_factory.mktemp("few") / "set"
    return prepare_synthetic(root, clips=9, speakers=9, seconds=2.0, workers=1)


def test_trains_and_writes_what_the_metric_reads(few, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "sync.safetensors"
    code, _ = command(
        monkeypatch, capsys, "--data", few, "--out", out, "--steps", 2, "--windows", 20
    )
    assert code == 0
    network = load_ours(out)
    clip = torch.zeros(30, 3, 64, 48, dtype=torch.uint8)
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, 30 * 640)
    scores = sync_scores(network, clip, sound, fps=25, sample_rate=16000)
    assert scores["av_offset"].value is not None


def test_the_same_seed_gives_the_same_network(few, tmp_path):
    weights = []
    for name in ("a", "b"):
        out = tmp_path / name
        train_syncnet(SyncNetConfig(out, str(few), steps=2, batch_size=2, windows=16))
        weights.append(load_ours(out).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.fixture
def one_thread():
    """Threads of small networks mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_finds_the_shifts_of_held_out_clips(tmp_path):
    root = prepare_synthetic(
        tmp_path / "set", clips=48, speakers=48, size=(64, 48), seed=5, workers=2
    )
    result = train_syncnet(SyncNetConfig(tmp_path / "sync", str(root), steps=120, batch_size=6))
    assert result["clips"] >= 20  # speakers that it was not trained on
    assert result["found"] >= 0.9


def test_shifted_sound_is_early():
    frames = torch.arange(75)
    audio = np.arange(75).repeat(640)
    for shift in (-10, 0, 3):
        inner, sound = shifted(frames, audio, shift)
        assert len(inner) * 640 == len(sound)
        heard = sound[::640]
        # what is heard now is shown `shift` frames later
        assert (heard - inner.numpy() == shift).all()


def test_windows_belong_together():
    rng = np.random.default_rng(0)
    mouths = torch.arange(75.0)[:, None, None].expand(75, 32, 48).half()
    sounds = mfcc_windows(torch.arange(299.0)[:, None].expand(299, 13))
    pictures, cepstra = draw_windows([(mouths, sounds)] * 3, 20, rng)
    assert pictures.shape == (3, 20, 5, 32, 48)
    assert cepstra.shape == (3, 20, 13, 20)
    assert torch.equal(4 * pictures[:, :, 0, 0, 0], cepstra[:, :, 0, 0])


def test_loss_is_that_of_guessing_for_constant_input():
    loss = matching_loss(
        OurSyncNet().eval(), torch.zeros(2, 16, 5, 32, 48), torch.zeros(2, 16, 13, 20)
    )
    assert loss.item() == pytest.approx(np.log(16), abs=1e-4)


def test_spread():
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(101, 3) == [0, 50, 100]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0"], "--steps 0: expected a positive number"),
        (["--windows", "3"], "--windows 3: expected at least 15"),
        (["--learning-rate", "nan"], "--learning-rate nan: expected a positive number"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--data", "nowhere"], "prepared set nowhere does not exist"),
        (["--device", "cuda:77"], "--device cuda:77: not usable here"),
        (["--windows", "60"], "no training clip of 65 frames"),
    ],
)
def test_mistakes_are_one_line(few, tmp_path, monkeypatch, capsys, args, message):
    args = args if "--data" in args else ["--data", few, *args]
    code, error = command(monkeypatch, capsys, "--out", tmp_path / "x", *args)
    assert code == 2
    assert message in error[0]
    assert not (tmp_path / "x").exists()


def test_a_batch_may_be_larger_than_the_set(few, tmp_path):
    config = SyncNetConfig(
        tmp_path / "x", data=str(few), steps=1, windows=15, batch_size=40, held_out=1
    )
    assert train_syncnet(config)["clips"] == 1


def test_the_built_in_set_has_unseen_speakers(monkeypatch):
    asked = []
    monkeypatch.setattr(syncnet, "find_data", asked.append)
    syncnet.data_root("synthetic")
    assert asked[0].synthetic_speakers >= 100


def test_unsuitable_sets_are_one_line(tmp_path, monkeypatch, capsys):
    root = prepare_synthetic(
        tmp_path / "wide", clips=3, speakers=3, seconds=1.0, sample_rate=8000, workers=1
    )
    code, error = command(monkeypatch, capsys, "--out", tmp_path / "x", "--data", root)
    assert code == 2
    assert "25 fps and 8000 Hz, SyncNet needs 25 and 16000" in error[0]
    root = prepare_synthetic(tmp_path / "short", clips=3, speakers=3, seconds=1.0, workers=1)
    code, error = command(monkeypatch, capsys, "--out", tmp_path / "x", "--data", root)
    assert code == 2
    assert "no clip of 41 frames outside the training split" in error[0]
    code, error = command(monkeypatch, capsys, "--out", tmp_path, "--data", root)
    assert code == 2
    assert "it is a directory" in error[0]
