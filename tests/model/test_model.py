"""The networks: parameter counts of the paper, shapes at any size, and who gets gradients."""

import pytest
import torch
from torch import nn

from model import Discriminators, ModelConfig, TalkingFace
from model.encoders import AudioEncoder, IdentityEncoder, NoiseEncoder, audio_windows
from model.generator import Generator
from polyfusion.nn.fusion import FUSIONS
from tests.model.helpers import SMALL, inputs, parameters


@pytest.mark.parametrize(
    ("rate", "count"), [(16000, 1_490_896), (40000, 1_492_816), (48000, 1_493_456)]
)
def test_audio_encoder_has_the_published_size(rate, count):
    assert parameters(AudioEncoder(ModelConfig(sample_rate=rate))) == count


def test_paper_sizes_equal_the_published_counts():
    config = ModelConfig()
    with torch.device("meta"):
        assert parameters(IdentityEncoder(config)) == 12_721_024
        generator = Generator(config, config.audio_dim + config.identity_dim + config.noise_dim)
        assert parameters(generator) + parameters(NoiseEncoder(config)) == 41_061_652
        assert parameters(Discriminators(config).frame) == 11_163_392


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_animates_and_every_parameter_gets_a_gradient(fusion):
    untouched = []
    for seed in range(3):  # some draws leave one of these few ReLUs without a gradient
        torch.manual_seed(seed)
        model = TalkingFace(SMALL, fusion)
        still, audio = inputs(SMALL)
        frames = model(still, audio, torch.Generator().manual_seed(0))
        assert frames.shape == (2, 7, 3, 32, 24)
        assert frames.abs().max() <= 1
        frames.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())
        untouched.append({name for name, grad in gradients.items() if not grad.any()})
    assert not set.intersection(*untouched)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_choice_of_kernels_reaches_every_part_that_has_some(fusion):
    for module in (TalkingFace(SMALL, fusion, "eager"), Discriminators(SMALL, "eager")):
        choices = {
            name: part.kernels for name, part in module.named_modules() if hasattr(part, "kernels")
        }
        assert len(choices) >= 6
        assert set(choices.values()) == {"eager"}, choices


def test_noise_is_a_function_of_its_random_source():
    model = TalkingFace(SMALL).eval()
    still, audio = inputs(SMALL)
    a, b, c = (model(still, audio, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_frames_depend_on_audio_and_on_the_still():
    model = TalkingFace(SMALL)  # in training mode: untrained running statistics hide everything
    still, audio = inputs(SMALL)
    noise = [torch.Generator().manual_seed(0) for _ in range(3)]
    frames = model(still, audio, noise[0])
    assert not torch.allclose(frames, model(still, audio.flip(0), noise[1]))
    assert not torch.allclose(frames, model(still.flip(0), audio, noise[2]))


def test_discriminators_judge_clips():
    d = Discriminators(SMALL)
    still, audio = inputs(SMALL)
    video = torch.rand(2, 7, 3, 32, 24)
    n = SMALL.snippet_frames
    assert d.frame(video[:, 0], still).shape == (2,)
    assert d.sequence(video, audio).shape == (2,)
    assert d.sync(video[:, :n], audio[:, : SMALL.window]).shape == (2,)


def test_sequence_discriminator_hears_and_sees_order():
    d = Discriminators(SMALL).sequence
    _, audio = inputs(SMALL)
    video = torch.rand(2, 7, 3, 32, 24)
    logits = d(video, audio)
    assert (logits - d(video, audio.flip(0))).abs().max() > 1e-5
    assert (logits - d(video.flip(1), audio)).abs().max() > 1e-5


def test_recurrent_layers_keep_float32_under_autocast():
    """A GPU's autocast runs PyTorch's own in float16, where gradients overflow."""
    model, d = TalkingFace(SMALL), Discriminators(SMALL)
    recurrent = [m for part in (model, d) for m in part.modules() if isinstance(m, nn.GRU)]
    assert len(recurrent) == 3
    for layer in recurrent:
        x = torch.randn(2, 5, layer.input_size).bfloat16().float()
        expected, last = nn.GRU.forward(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            found, found_last = layer(x.bfloat16())
        assert torch.equal(found, expected)
        assert torch.equal(found_last, last)


def test_frozen_encoders_keep_weights_and_statistics():
    model = TalkingFace(SMALL)
    model.freeze_encoders()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    still, audio = inputs(SMALL)
    model(still, audio).sum().backward()
    for name, value in model.state_dict().items():
        if name.split(".")[0] in ("identity", "audio", "noise"):
            assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.identity.parameters())
    assert all(p.grad is not None for p in model.generator.parameters())


def test_audio_windows_are_centred_on_their_frames():
    audio = torch.zeros(1, 1600)
    audio[0, 480:640] = 1.0  # frame 3 of stride 160
    windows = audio_windows(audio, 800, 160)
    assert windows.shape == (1, 10, 800)
    assert windows[0, 3, 320:480].all()
    assert windows[0, 3].sum() == 160
    assert torch.equal(windows[0, 0, :320], torch.zeros(320))


def test_sound_beyond_the_last_whole_frame_is_heard():
    """The last window is of the padded sound, not of the padded frames; there is none more."""
    audio = torch.rand(1, 1600 + 159)
    windows = audio_windows(audio, 800, 160)
    assert windows.shape == (1, 10, 800)
    assert torch.equal(windows[0, 9, : 480 + 159], audio[0, 1120:])
    assert not windows[0, 9, 480 + 159 :].any()
    assert torch.equal(windows[:, :7], audio_windows(audio[:, :1600], 800, 160)[:, :7])


def test_a_clip_without_a_whole_frame_of_audio_is_an_error():
    with pytest.raises(ValueError, match="at least one frame"):
        audio_windows(torch.zeros(1, 100), 800, 160)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 100}, "multiples of 2"),
        ({"sample_rate": 44100}, "multiple of 1000"),
        ({"audio_dim": 20}, "multiple of 16"),
        ({"rank": 0}, "positive"),
        ({"sequence_extent": 2}, "odd"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**change)


def test_wrong_still_and_audio_are_named():
    model = TalkingFace(SMALL)
    still, audio = inputs(SMALL)
    with pytest.raises(ValueError, match="still"):
        model(still[:, :, :16], audio)
    with pytest.raises(ValueError, match="audio"):
        model(still, audio[:1])
