"""Sound that arrives in pieces gives the frames of sound that is there as a whole."""

import dataclasses

import pytest
import torch

from model import ModelConfig, Speech2Vid, TalkingFace
from model.encoders import AudioEncoder
from model.eyes import Blinks
from model.folding import fold
from model.mel import MelAudioEncoder
from model.mfcc import SpeechWindows
from model.streaming import Stream, look_ahead
from tests.model.animate import TINY, lively
from tests.model.helpers import SMALL, inputs

FORMS = {  # configuration, frames of look-ahead
    "raw": (dataclasses.replace(SMALL, audio_layers=2), 2),
    "raw, 30 fps": (dataclasses.replace(SMALL, sample_rate=16000, fps=30.0), 3),
    "raw with lips": (dataclasses.replace(SMALL, sample_rate=16000, lips=True), 6),
    "mel": (TINY, 6),
    "noise fused": (dataclasses.replace(TINY, fuse_noise=True), 6),
}


def whole(model: TalkingFace, still, audio, seed):
    """Frames (T, 3, H, W) of all the sound at once, with the noise and blinks of a stream."""
    frames = audio.shape[1] // model.config.samples_per_frame
    rng = torch.Generator().manual_seed(seed)
    noise = torch.cat([model.noise.sample(1, 1, rng) for _ in range(frames)], 1)
    blinks = Blinks(model.config.fps, torch.Generator().manual_seed(seed)).draw(frames)
    model.noise.sample = lambda *_: noise
    try:
        return model(still, audio, eyes=blinks[None])[0]
    finally:
        del model.noise.sample


def streamed(stream: Stream, audio, sizes):
    """Frames of pieces of these sizes, and then of the rest."""
    made = []
    for piece in audio[0].split([*sizes, audio.shape[1] - sum(sizes)]):
        made += stream.push(piece)
    return torch.cat([*made, *stream.finish()])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_frames_are_those_of_the_whole_sound(form):
    config, ahead = FORMS[form]
    torch.manual_seed(0)
    model = fold(lively(TalkingFace(config, "cp", "eager")))
    assert look_ahead(model) == ahead
    still, audio = inputs(config, 1, 40)
    audio = torch.cat([audio, audio[:, : config.samples_per_frame // 2]], 1)  # and half a frame
    expected = whole(model, still, audio, 3)
    assert (expected[1:] - expected[:-1]).abs().amax((1, 2, 3)).min() > 1e-4
    for sizes in ([], [1, 0, 700], [len(audio[0]) // 7] * 6):
        stream = Stream(model, still[0], seed=3, piece=11)
        torch.testing.assert_close(streamed(stream, audio, sizes), expected, atol=1e-5, rtol=0)
    other = streamed(Stream(model, still[0], seed=4), audio, [])
    assert (other - expected).abs().max() > 1e-4


@torch.no_grad()
def test_a_frame_is_made_as_soon_as_its_sound_is_there():
    model = lively(TalkingFace(TINY, "cp", "eager"))
    still, audio = inputs(TINY, 1, 10)
    stream = Stream(model, still[0])
    counts = [sum(map(len, stream.push(piece))) for piece in audio[0].split(640)]
    assert counts == [0] * 6 + [1] * 4
    assert sum(map(len, stream.finish())) == 6
    with pytest.raises(ValueError, match="sound of 639 samples: expected at least one frame, 640"):
        streamed(Stream(model, still[0]), audio[:, :639], [])


@torch.no_grad()
def test_the_baseline_streams_too():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, sample_rate=16000)
    model = lively(Speech2Vid(config, "eager"))
    assert look_ahead(model) == 5
    still, audio = inputs(config, 1, 20)
    audio = audio[:, :-100]
    expected = model(still, audio)[0]
    got = streamed(Stream(model, still[0], piece=7), audio, [5000])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def hearing() -> dict[str, torch.nn.Module]:
    """Everything that turns sound at 16 kHz into features of frames of 640 samples."""
    config = ModelConfig(audio_dim=32)
    return {
        "raw": AudioEncoder(config),
        "mel": MelAudioEncoder(config),
        "cepstra": SpeechWindows(16000, 640),
    }


@pytest.mark.parametrize("name", hearing())
@torch.no_grad()
def test_sound_beyond_the_last_whole_frame_is_heard(name):
    torch.manual_seed(0)
    encoder = lively(hearing()[name])
    audio = torch.randn(2, 640 * 20 + 600) * 0.1
    features = encoder(audio)
    assert features.shape[1] == 20
    followed = encoder(torch.nn.functional.pad(audio, (0, 40 + 640 * 8)))
    torch.testing.assert_close(features, followed[:, :20])
    cut = encoder(audio[:, : 640 * 20])
    assert (cut[:, -1] - features[:, -1]).abs().max() > 1e-3
