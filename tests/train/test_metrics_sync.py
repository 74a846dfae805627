"""AV offset and confidence: features, procedure, architecture and hostile input."""

import numpy as np
import pytest
import torch

from train.data.media import read_media
from train.metrics.mfcc import mfcc
from train.metrics.score import MetricError
from train.metrics.sync import SHIFT, at_25_fps, shift_distances, sync_scores
from train.metrics.syncnet import (
    OurSyncNet,
    SyncNet,
    face_crop,
    load_ours,
    load_published,
    mfcc_windows,
)
from train.metrics.weights import save_network

# Rows 10 and 54 of python_speech_features 0.6, mfcc(chirp, 16000), of the chirp below.
CHIRP = {
    10: [20.71363139, 19.28643165, -24.08941448, -36.59779403, -9.43561048, 24.04426194,
         26.49198062, -2.55136318, -26.76746067, -21.69165376, 1.64846041, 13.93148813,
         6.19590271],
    54: [23.46061921, -26.83376758, 12.02837071, -2.06143898, -16.63781538, 27.9026711,
         -36.45973407, 32.95509051, -26.83132044, 8.90160003, 1.98769119, -17.42982705,
         19.28229702],
}  # fmt: skip


def chirp():
    t = np.arange(9000)
    return np.rint(8000 * np.sin(t * t / 9000.0))


def test_mfcc_is_that_of_python_speech_features():
    features = mfcc(chirp(), 16000)
    assert features.shape == (55, 13)  # 1 + ceil((9000 - 400) / 160)
    for row, expected in CHIRP.items():
        np.testing.assert_allclose(features[row], expected, atol=1e-6)
    assert mfcc(np.ones(7), 16000).shape == (1, 13)
    assert np.isfinite(mfcc(np.zeros(2000), 16000)).all()


class Wave:
    """A network whose embeddings are the picture's and the sound's own momentary state."""

    title = "test"

    def embed_video(self, frames):
        return frames[:, :, 0, 0].float().unfold(0, 5, 1).flatten(1)

    def embed_audio(self, cepstra):
        """Loudness of the middle of every frame's 40 ms, again five frames long."""
        loud = mfcc_windows(cepstra[:, :1])[:, 0, 2::4]
        return loud.repeat_interleave(3, 0).view(len(loud), 3, 5).flatten(1)


def matched_clip(frames=75, shift=0, seed=0):
    """Noise of changing loudness; frame t shows the loudness of frame t + shift of the sound."""
    rng = np.random.default_rng(seed)
    levels = rng.uniform(-7, -1, frames + 40)
    levels = np.where(rng.random(frames + 40) < 0.5, levels, levels[::-1])
    sound = (np.exp(levels).repeat(640) * rng.standard_normal(len(levels) * 640)).clip(-1, 1)
    audio = sound[20 * 640 : (20 + frames) * 640]
    shown = mfcc(np.rint(sound * 32768), 16000)[2::4, 0][20 - shift : 20 - shift + frames]
    pictures = torch.from_numpy(shown).round().clamp(0, 255).byte()
    return pictures[:, None, None, None].expand(-1, 3, 2, 2).contiguous(), audio


@pytest.mark.parametrize(
    ("shift", "masked"),
    [*((s, False) for s in (-9, -1, 0, 1, 4, 9)), *((s, True) for s in (-15, -9, 0, 1, 15))],
)
def test_known_shifts_are_found_with_their_sign(shift, masked):
    # what is heard in frame t is shown in frame t + shift: the sound is early by `shift`
    frames, audio = matched_clip(shift=shift)
    scores = sync_scores(Wave(), frames, audio, fps=25, sample_rate=16000, masked=masked)
    assert scores["av_offset"].value == shift
    assert scores["av_confidence"].value > 1


def test_zeros_beyond_the_clip_bias_large_shifts_unless_masked():
    frames, audio = matched_clip(shift=15)
    scores = sync_scores(Wave(), frames, audio, fps=25, sample_rate=16000)
    assert scores["av_offset"].value != 15


def test_delaying_the_sound_lowers_the_offset():
    frames, audio = matched_clip(shift=4)
    late = np.concatenate([np.full(6 * 640, 1e-3), audio])[: len(audio)]
    before = sync_scores(Wave(), frames, audio, fps=25, sample_rate=16000)["av_offset"].value
    after = sync_scores(Wave(), frames, late, fps=25, sample_rate=16000)["av_offset"].value
    assert (before, after) == (4, -2)  # the case reported in the published code's issue 2


def test_distances_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    video, audio = (torch.randn(n, 7, generator=generator) for n in (24, 24))
    zeros = torch.zeros(SHIFT, 7)
    padded = torch.cat([zeros, audio, zeros])
    pairs = [[(i, i + j) for i in range(24)] for j in range(31)]
    distance = torch.nn.functional.pairwise_distance
    expected = [torch.stack([distance(video[i], padded[k]) for i, k in p]).mean() for p in pairs]
    torch.testing.assert_close(shift_distances(video, audio), torch.stack(expected))
    real = [[(i, k) for i, k in p if SHIFT <= k < SHIFT + 24] for p in pairs]
    expected = [torch.stack([distance(video[i], padded[k]) for i, k in p]).mean() for p in real]
    torch.testing.assert_close(shift_distances(video, audio, masked=True), torch.stack(expected))


def test_other_rates_are_resampled():
    frames, audio = matched_clip(frames=100, shift=3)
    slow = at_25_fps(frames.repeat_interleave(6, 0), 150)
    assert torch.equal(slow, frames)
    halved = np.repeat(audio, 2)  # 32 kHz
    scores = sync_scores(Wave(), frames.repeat_interleave(2, 0), halved, fps=50, sample_rate=32000)
    assert scores["av_offset"].value == 3
    assert len(at_25_fps(torch.zeros(90, 3, 2, 2), 30)) == 75
    assert len(at_25_fps(torch.zeros(1, 3, 2, 2), 60)) == 1


@pytest.mark.parametrize(
    ("frames", "audio", "reason"),
    [(75, 0.0, "silent audio"), (1, 0.1, "clip of 1 frames"), (20, 0.1, "needs 21")],
)
def test_what_cannot_be_measured_says_why(frames, audio, reason):
    sound = audio * np.random.default_rng(0).standard_normal(frames * 640).clip(-1, 1)
    pictures = torch.zeros(frames, 3, 8, 8, dtype=torch.uint8)
    for score in sync_scores(Wave(), pictures, sound, fps=25, sample_rate=16000).values():
        assert score.value is None
        assert reason in score.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 30}, "2.50 s and sound of 3.00 s"),
        ({"sample_rate": 44100}, "3.00 s and sound of 1.09 s"),
        ({"fps": 0}, "expected positive rates"),
        ({"audio": np.zeros((2, 48000))}, "mono"),
        ({"audio": np.full(48000, np.nan)}, "finite"),
        ({"frames": torch.zeros(75, 3, 8, 8)}, "uint8"),
        ({"frames": torch.zeros(2, 75, 3, 8, 8, dtype=torch.uint8)}, "one clip, got 2"),
    ],
)
def test_unsuitable_clips_are_one_line(change, message):
    clip = {"frames": torch.zeros(75, 3, 8, 8, dtype=torch.uint8), "audio": np.zeros(48000)}
    arguments = clip | {"fps": 25, "sample_rate": 16000} | change
    with pytest.raises(MetricError, match=message) as caught:
        sync_scores(Wave(), **arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published architecture with random weights, on disk."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "syncnet_v2.model"
    torch.save(SyncNet().state_dict(), path)
    return path


def test_published_architecture_and_its_state_dict(published):
    network = load_published(published)
    state = network.state_dict()
    assert sum(p.numel() for p in network.parameters()) == 13_631_616
    assert len(state) == 102
    assert state["netcnnaud.4.weight"].shape == (192, 64, 3, 3)
    assert state["netcnnlip.0.weight"].shape == (96, 3, 5, 7, 7)
    assert state["netcnnlip.18.weight"].shape == (512, 256, 1, 6, 6)
    assert state["netfclip.3.bias"].shape == (1024,)
    assert not network.training
    clip = torch.zeros(25, 3, 128, 96, dtype=torch.uint8)
    sound = 0.1 * np.random.default_rng(0).standard_normal(16000)
    scores = sync_scores(network, clip, sound, fps=25, sample_rate=16000)
    assert np.isfinite(scores["av_confidence"].value)


def test_published_input_is_blue_green_red_in_a_padded_box():
    frames = torch.zeros(2, 3, 128, 96, dtype=torch.uint8)
    frames[:, 0] = 200
    crop = face_crop(frames)
    assert crop.shape == (2, 3, 224, 224)
    assert crop[0, :, 80, 112].tolist() == pytest.approx([200, 0, 0], abs=1e-3)
    assert crop[0, :, 220, 112].tolist() == pytest.approx([110, 110, 110], abs=1e-3)
    seen = []
    network = SyncNet()
    network.lip_stream = lambda windows: seen.append(windows) or windows.flatten(1)[:, :1]
    network.embed_video(frames.repeat(3, 1, 1, 1))
    assert seen[0].shape == (2, 3, 5, 224, 224)
    assert seen[0][0, :, 0, 80, 112].tolist() == pytest.approx([0, 0, 200], abs=1e-3)


def test_weights_of_another_network_are_one_line(tmp_path, published):
    torch.save(OurSyncNet().state_dict(), tmp_path / "other.model")
    torch.save(OurSyncNet(), tmp_path / "module.model")
    torch.save([1, 2], tmp_path / "list.model")
    (tmp_path / "noise.model").write_bytes(b"hello")
    state = torch.load(published, weights_only=True)
    state["netfcaud.3.bias"] = state["netfcaud.3.bias"][:7]
    torch.save(state, tmp_path / "short.model")
    for name, message in (
        ("other", "not the weights of SyncNet.*netcnnaud.0.weight is missing"),
        ("module", "not a PyTorch state dict"),
        ("list", "expected a state dict, found list"),
        ("noise", "not a PyTorch state dict"),
        ("short", r"netfcaud.3.bias has shape \(7,\), expected \(1024,\)"),
        ("absent", "no such file"),
    ):
        with pytest.raises(MetricError, match=message) as caught:
            load_published(tmp_path / f"{name}.model")
        assert "\n" not in str(caught.value)


def test_our_weights_file(tmp_path, published):
    path = tmp_path / "ours.safetensors"
    save_network(path, OurSyncNet.title, OurSyncNet(), {"found": 1.0})
    assert not load_ours(path).training
    save_network(path, "a discriminator", OurSyncNet(), {})
    with pytest.raises(MetricError, match="expected weights of our SyncNet, found a discriminator"):
        load_ours(path)
    with pytest.raises(MetricError, match="not a readable safetensors file"):
        load_ours(published)
    with pytest.raises(MetricError, match=r"python -m train\.syncnet"):
        load_ours(tmp_path / "absent")


def test_our_network_ignores_light_and_size(grid_dir):
    frames, _, audio = read_media(grid_dir / "s1" / "bbir6n.mpg", 16000)
    frames = torch.from_numpy(frames[:40, 90:218, 130:226].transpose(0, 3, 1, 2).copy())
    network = OurSyncNet().eval()
    mouths = network.mouths(frames)
    dimmer = network.mouths((frames.float() * 0.7 + 20).round().byte())
    assert (mouths - dimmer).abs().mean() < 0.05
    small = torch.nn.functional.interpolate(frames.float(), scale_factor=0.5, mode="area")
    assert (mouths - network.mouths(small.byte())).abs().mean() < 0.1
    cepstra = torch.from_numpy(mfcc(audio[: 40 * 640] * 32768, 16000)).float()
    louder = torch.from_numpy(mfcc(audio[: 40 * 640] * 16384, 16000)).float()
    torch.testing.assert_close(network.sounds(cepstra), network.sounds(louder), atol=0.02, rtol=0)
