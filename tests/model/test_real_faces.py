"""What unseen people need: log-mel speech, frames made of the still, eyes that close."""

import dataclasses

import numpy as np
import pytest
import torch

from model import ModelConfig, TalkingFace, talking_face
from model.composition import COMPOSITIONS, Composition, displace
from model.eyes import RATE, SECONDS, draw_eye_closure
from model.folding import fold
from model.mel import LogMel, MelAudioEncoder
from tests.model.helpers import SMALL, inputs
from train.metrics.blinks import blink_scores

REAL = dataclasses.replace(
    SMALL, audio_encoder="mel", composition="warp", eyes=True, lips=True, sample_rate=16000
)


def test_displacement_shows_the_still_elsewhere():
    still = torch.rand(2, 3, 32, 24)
    shift = torch.zeros(2, 5, 2, 32, 24)
    torch.testing.assert_close(displace(still, shift), still[:, None].expand(-1, 5, -1, -1, -1))
    shift[:, :, 0], shift[:, :, 1] = 2 / 24, -1 / 32  # what lies 2 to the right and 1 above
    moved = displace(still, shift)
    expected = still[:, :, :-1, 2:]
    for t in range(5):
        torch.testing.assert_close(moved[:, t, :, 1:, :-2], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", COMPOSITIONS)
def test_compositions_of_maps(kind):
    compose = Composition(kind)
    still, maps = torch.rand(2, 3, 32, 24) * 2 - 1, torch.rand(2, 4, compose.channels, 32, 24)
    maps = (maps * 2 - 1).requires_grad_()
    frames = compose(still, maps)
    assert frames.shape == (2, 4, 3, 32, 24)
    assert frames.abs().max() <= 1
    frames.square().sum().backward()
    assert (maps.grad.abs().sum((0, 1, 3, 4)) > 0).all()  # every map counts
    if kind == "direct":
        assert frames is maps
        return
    with torch.no_grad():
        maps[:, :, 3] = -1  # the mask is all but closed
        maps[:, :, 4:] = 0
        assert (compose(still, maps) - still[:, None]).abs().max() < 0.01
        maps[:, :, 3] = 1  # and here it is all but open
        assert (compose(still, maps) - maps[:, :, :3]).abs().max() < 0.25


def test_an_unknown_composition_is_named():
    with pytest.raises(ValueError, match="composition 'blend': expected one of 'direct', 'mask'"):
        Composition("blend")


def test_bands_are_those_of_an_independent_spectrum():
    mel = LogMel(16000, 640).eval()
    time = np.arange(16000) / 16000
    wave = 0.3 * np.sin(2 * np.pi * 1000 * time)
    bands = mel(torch.tensor(wave, dtype=torch.float32)[None])[0]
    assert bands.shape == (100, 40)
    middle = 50
    centre = round((middle + 0.5) * 160)
    emphasised = np.append(0, wave[1:] - 0.97 * wave[:-1])
    piece = emphasised[centre - 200 : centre + 200] * np.hanning(401)[:-1]
    power = np.abs(np.fft.rfft(piece, 512)) ** 2
    expected = (np.log(np.maximum(power @ mel.filters.numpy().T, 1e-6)) + 6) / 4
    np.testing.assert_allclose(bands[middle].numpy(), expected, atol=2e-3)
    peak = bands.mean(0).argmax().item()
    assert mel.filters[peak].argmax().item() == pytest.approx(1000 / 16000 * 512, abs=3)


def test_a_part_of_the_sound_has_the_features_of_the_whole():
    torch.manual_seed(0)
    encoder = MelAudioEncoder(ModelConfig(audio_dim=32)).eval()
    audio = torch.randn(2, 640 * 30) * 0.1
    whole = encoder(audio)
    assert whole.shape == (2, 30, 32)
    part = encoder(audio[:, 640 * 4 : 640 * 26], context=6)
    torch.testing.assert_close(part, whole[:, 10:20])
    with pytest.raises(ValueError, match="context=7: expected at most 6"):
        encoder(audio, context=7)


def test_training_hears_other_voices():
    mel = LogMel(16000, 640)
    audio = torch.randn(2, 6400) * 0.1
    plain = mel.eval()(audio)
    changed = mel.train()(audio)
    assert changed.shape == plain.shape
    assert (changed - plain).abs().mean() > 0.05
    assert torch.isfinite(changed).all()


def test_eyes_blink_as_often_and_as_long_as_said():
    closure = draw_eye_closure(300, 250, 25.0, torch.Generator().manual_seed(0))
    assert closure.shape == (300, 250)
    assert closure.min() == 0
    assert closure.max() <= 1
    assert (closure[:, :15] == 0).all()
    ears = [0.3 - 0.2 * row.numpy() for row in closure]
    scores = blink_scores(ears, fps=25, edges="level")
    assert scores["blinks_per_s"].value == pytest.approx(RATE, rel=0.15)
    assert SECONDS[0] - 0.04 < scores["blink_duration"].value < SECONDS[1]
    again = draw_eye_closure(300, 250, 25.0, torch.Generator().manual_seed(0))
    assert torch.equal(closure, again)


def test_the_whole_model_with_all_of_them():
    torch.manual_seed(0)
    model = TalkingFace(REAL, "cp", "eager")
    assert model.context == 6
    still, audio = inputs(REAL)
    frames = model(still, audio, torch.Generator().manual_seed(0), eyes=torch.zeros(2, 7))
    assert frames.shape == (2, 7, 3, 32, 24)
    frames.mean().backward()
    model.eval()
    wide = inputs(REAL, frames=7 + 2 * 6)[1]
    assert model(still, wide, context=6).shape == (2, 7, 3, 32, 24)
    seeds = (torch.Generator().manual_seed(3) for _ in range(2))
    plain, folded = (
        m(still, audio, rng) for m, rng in zip((model, fold(model)), seeds, strict=True)
    )
    torch.testing.assert_close(plain, folded, atol=1e-4, rtol=1e-4)


def test_closing_eyes_change_the_picture():
    torch.manual_seed(0)
    model = TalkingFace(REAL, "cp", "eager")
    still, audio = inputs(REAL)
    opened, shut = (
        model(still, audio, torch.Generator().manual_seed(0), eyes=torch.full((2, 7), float(x)))
        for x in (0, 1)
    )
    assert not torch.allclose(opened, shut)


def test_lips_change_the_picture_and_are_foretold_by_the_sound():
    torch.manual_seed(0)
    model = TalkingFace(REAL, "cp", "eager").eval()
    still, audio = inputs(REAL)
    wide = inputs(REAL, frames=7 + 2 * 6)[1]

    def show(sound, **known):
        return model(still, sound, torch.Generator().manual_seed(0), **known)

    foretold = model.lips(audio)
    assert foretold.shape == (2, 7, 3)
    torch.testing.assert_close(show(audio), show(audio, lips=foretold))
    torch.testing.assert_close(
        show(wide, context=6), show(wide, context=6, lips=model.lips(wide, 6))
    )
    assert not torch.allclose(show(audio), show(audio, lips=foretold + 0.1))
    model.config = dataclasses.replace(REAL, lips_gain=1.5)
    mean = torch.tensor([0.088, 0, 0])
    torch.testing.assert_close(show(audio), show(audio, lips=1.5 * foretold - 0.5 * mean))


def test_drawn_eyes_close_further_by_the_gain():
    config = dataclasses.replace(REAL, eyes=True, eyes_gain=1.5)
    model = TalkingFace(config).eval()
    still, audio = inputs(config)
    rng = torch.Generator().manual_seed(0)
    noise = model.noise.sample(2, 7, rng)
    closure = torch.full((2, 7), 0.5)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(talking_face, "draw_eye_closure", lambda *_: closure)
        drawn = model(still, audio, noise=noise)
        torch.testing.assert_close(drawn, model(still, audio, noise=noise, eyes=1.5 * closure))
        assert not torch.allclose(drawn, model(still, audio, noise=noise, eyes=closure))
