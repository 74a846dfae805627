"""What few people to learn from need: balance, changed pictures, any still, averaged weights."""

import dataclasses
from collections import Counter

import cv2
import numpy as np
import pytest
import torch

from tests.train.helpers import CONFIG, batch, trainer
from train.config import TrainConfig
from train.data.augment import PictureChange
from train.data.batches import StepSampler
from train.data.prepared import Clip, DataError, PreparedSet, write_clip
from train.device import to_device
from train.export import ExportConfig, export
from train.files import write_json
from train.run.checkpoint import load_run, save_checkpoint
from train.trainer.losses import eyes_box, eyes_loss, mouth_box


@pytest.fixture
def clips(tmp_path):
    """A set of one clip: frame t is grey level 10 t, sample n is n / 2^15, shut eyes in frame 3."""
    frames = np.broadcast_to(10 * np.arange(8, dtype=np.uint8)[:, None, None, None], (8, 3, 32, 24))
    audio = np.arange(8 * 640, dtype=np.float32) / 2**15
    openness = np.ones(8, np.float32)
    openness[3] = 0
    truth = {"eye_openness": openness, "lips": np.repeat(np.arange(8.0)[:, None], 3, 1)}
    clip = Clip(frames, audio, 25.0, 16000, "s1", "a", truth)
    write_clip(tmp_path / "a.safetensors", clip)
    entry = {"name": "a", "speaker": "s1", "split": "train", "file": "a.safetensors"}
    entry |= {"frames": 8, "samples": 8 * 640}
    manifest = {"version": 1, "source": "grid", "fps": 25.0, "sample_rate": 16000}
    write_json(tmp_path / "manifest.json", manifest | {"size": [32, 24], "clips": [entry]})
    return tmp_path


def test_sound_around_the_crop_and_any_still(clips):
    data = PreparedSet(
        clips, frames=4, random_crop=True, any_still=True, context=2, eyes=True, lips=True, seed=1
    )
    shown = set()
    for epoch in range(40):
        item = data[epoch]
        start = int(item["frames"][0, 0, 0, 0]) // 10
        shown.add(int(item["still"][0, 0, 0]) // 10)
        at = np.arange((start - 2) * 640, (start + 6) * 640)
        expected = np.where((at >= 0) & (at < 8 * 640), at, 0) / 2**15
        np.testing.assert_array_equal(item["audio"].numpy(), expected.astype(np.float32))
        assert item["eyes"].tolist() == [float(start + t == 3) for t in range(4)]
        assert item["lips"].tolist() == [[start + t] * 3 for t in range(4)]
        ready = to_device(
            {k: v[None] for k, v in item.items() if k != "index"}, torch.device("cpu"), 2
        )
        torch.testing.assert_close(ready.audio[0], item["audio"][2 * 640 : -2 * 640])
    assert shown == set(range(8))
    assert int(PreparedSet(clips, frames=4)[0]["still"].max()) == 0  # the first frame, unasked


@pytest.mark.parametrize("option", ["eyes", "lips"])
def test_a_set_that_does_not_know_the_eyes_or_lips_is_named(clips, option):
    write_clip(
        clips / "a.safetensors",
        Clip(np.zeros((8, 3, 32, 24), np.uint8), np.zeros(5120), 25.0, 16000, "s1", "a"),
    )
    with pytest.raises(DataError, match=f"does not say how its {option} are.*--model.{option}"):
        PreparedSet(clips, **{option: True})[0]


def test_the_sound_learns_to_foretell_the_lips():
    """A step moves the foretelling towards the lips it was given, and they are not its input."""
    config = dataclasses.replace(
        CONFIG,
        lr_generator=1e-2,
        loss=dataclasses.replace(CONFIG.loss, frame=0, sequence=0, sync=0),
        model=dataclasses.replace(CONFIG.model, lips=True, sample_rate=16000),
    )
    learner = trainer(config)
    seen = batch(config)
    seen.lips = torch.full((*seen.frames.shape[:2], 3), 0.2)
    losses = [
        learner.step(seen, torch.Generator().manual_seed(0))["loss/lips"].item() for _ in range(40)
    ]
    assert losses[-1] < 0.2 * losses[0]
    assert losses[0] == pytest.approx((0.2 / 0.06) ** 2, rel=0.5)


def test_pictures_change_as_a_whole():
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 256, (1, 3, 32, 24), np.uint8), 3, axis=0)
    changed = PictureChange.draw(rng, (32, 24))(frames)
    assert changed.shape == frames.shape
    assert (changed == changed[:1]).all()  # the same for all frames
    assert (changed != frames).mean() > 0.5


def test_a_change_is_the_transform_and_the_curve_that_it_holds():
    rng = np.random.default_rng(4)
    picture = np.zeros((1, 3, 64, 48), np.uint8)
    picture[..., 30:34, 20:24] = 200
    change = PictureChange.draw(rng, (64, 48))
    bright = change(picture)[0].astype(float) - change(np.zeros_like(picture))[0]
    y, x = np.mean(np.nonzero(bright.sum(0) > 0.5 * bright.sum(0).max()), axis=1)
    back = change.matrix @ [x, y, 1]
    np.testing.assert_allclose(back, [21.5, 31.5], atol=0.6)
    level = cv2.LUT(np.full((1, 1), 200, np.uint8), change.curves[0])[0, 0]
    assert change(picture)[0, 0].max() == level


def test_speakers_are_balanced():
    speakers = ["a"] * 90 + ["b"] * 9 + ["c"]

    def seen(balance: float) -> Counter:
        batches = StepSampler(speakers, 10, 0, 0, 500, balance)
        return Counter(speakers[i % 100] for found in batches for i in found)

    even = seen(1.0)
    assert all(even[s] == pytest.approx(5000 / 3, rel=0.1) for s in "abc")
    half = seen(0.5)
    assert half["a"] / half["b"] == pytest.approx(90**0.5 / 9**0.5, rel=0.15)
    whole = list(StepSampler(speakers, 10, 0, 0, 20, 0.7))
    assert list(StepSampler(speakers, 10, 0, 7, 20, 0.7)) == whole[7:]


def test_the_average_follows_the_weights():
    config = dataclasses.replace(CONFIG, average=0.9)
    t = trainer(config)
    name, weight = next(iter(t.model.named_parameters()))
    expected = dict(t.average.named_parameters())[name].clone()
    for step in range(1, 4):
        t.step(batch(config), torch.Generator().manual_seed(step))
        t.update_average(step)
        share = max(0.1, 1 / (step + 1))
        expected += share * (weight.detach() - expected)
    torch.testing.assert_close(dict(t.average.named_parameters())[name], expected)
    assert not t.average.training
    assert trainer(CONFIG).average is not None


def test_a_discriminator_without_weight_is_left_alone():
    loss = dataclasses.replace(CONFIG.loss, sequence=0.0, sync=0.0, l1_mouth=1.0)
    config = dataclasses.replace(CONFIG, loss=loss)
    t = trainer(config)
    before = {k: v.clone() for k, v in t.discriminators.named_parameters()}
    terms = t.step(batch(config), torch.Generator().manual_seed(0))
    assert {"loss/g_frame", "loss/l1_mouth"} <= terms.keys()
    assert not {"loss/g_sequence", "loss/d_sync"} & terms.keys()
    changed = {
        k.split(".")[0] for k, v in t.discriminators.named_parameters() if (v != before[k]).any()
    }
    assert changed == {"frame"}


def test_an_exported_run_makes_the_average_models_frames(tmp_path):
    config = dataclasses.replace(CONFIG, average=0.5)
    t = trainer(config)
    t.step(batch(config), torch.Generator().manual_seed(0))
    t.update_average(1)
    write_json(tmp_path / "config.json", config.to_dict())
    info = {"step": 1, "config": config.to_dict()}
    save_checkpoint(tmp_path / "checkpoint.safetensors", t.modules, t.optimizers, info)
    out = export(ExportConfig(tmp_path, tmp_path / "out"))
    loaded, model = load_run(out, torch.device("cpu"), "eager")
    assert isinstance(loaded, TrainConfig)
    item = batch(config)
    made, known = (
        m(item.still, item.audio, torch.Generator().manual_seed(0)) for m in (model, t.average)
    )
    torch.testing.assert_close(made, known, atol=5e-3, rtol=0)  # weights of 16 bits
    assert (out / "checkpoint.safetensors").stat().st_size < 0.1 * (
        tmp_path / "checkpoint.safetensors"
    ).stat().st_size


def test_the_mouths_box():
    frames = torch.zeros(2, 3, 128, 96)
    frames[..., 76:109, 26:72] = 1
    assert mouth_box(frames).min() == 1
    assert mouth_box(frames).sum() == frames.sum()


def test_closed_eyes_count_as_far_as_they_are_closed():
    real = torch.zeros(2, 3, 3, 128, 96)
    generated = real.clone()
    generated[..., 35:55, 18:80] = 0.5  # the eyes' box
    generated[..., 90:, :] = 9.0
    assert eyes_box(generated).mean() == 0.5
    closure = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 0.0]])
    assert eyes_loss(generated, real, closure).item() == pytest.approx(0.5 * 1.5 / 6)
    assert eyes_loss(generated, real, 0 * closure) == 0


def test_the_eyes_are_learned_where_they_are_known():
    loss = dataclasses.replace(CONFIG.loss, l1_eyes=100.0)
    config = dataclasses.replace(
        CONFIG, loss=loss, model=dataclasses.replace(CONFIG.model, eyes=True)
    )
    item, rng = batch(config), torch.Generator().manual_seed(0)
    assert "loss/l1_eyes" not in trainer(config).step(item, rng)
    item.eyes = torch.full(item.frames.shape[:2], 0.5)
    terms = trainer(config).step(item, rng)
    assert 0 < terms["loss/l1_eyes"] < 1
