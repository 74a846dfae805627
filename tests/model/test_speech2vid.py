"""Speech2Vid: its sound features and its network."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model import ModelConfig, Speech2Vid
from model.mfcc import MFCC, SpeechWindows
from model.speech2vid import UpBlock
from tests.model.helpers import SMALL, inputs, parameters


def slow_mfcc(audio: np.ndarray, rate: int) -> np.ndarray:
    """The definition, sum by sum, in float64."""
    signal = np.round(audio * 32768, 6)
    signal = np.array(
        [signal[0], *(signal[n] - 0.97 * signal[n - 1] for n in range(1, len(audio)))]
    )
    frame, hop = int(0.025 * rate), int(0.010 * rate)
    fft = 2 ** math.ceil(math.log2(frame))
    hamming = [0.54 - 0.46 * math.cos(2 * math.pi * n / (frame - 1)) for n in range(frame)]
    mel = lambda hz: 1127 * math.log(1 + hz / 700)  # noqa: E731
    hertz = lambda m: 700 * (math.exp(m / 1127) - 1)  # noqa: E731
    step = (mel(3700) - mel(300)) / 41
    corners = [hertz(mel(300) + i * step) for i in range(42)]
    rows = []
    for start in range(0, len(signal) - frame + 1, hop):
        piece = signal[start : start + frame] * hamming
        magnitude = [
            abs(sum(piece * np.exp(-2j * math.pi * k * np.arange(frame) / fft)))
            for k in range(fft // 2 + 1)
        ]
        logs = []
        for low, centre, high in zip(corners, corners[1:], corners[2:], strict=False):
            total = 0.0
            for k, value in enumerate(magnitude):
                f = k * rate / fft
                if low <= f <= centre:
                    total += value * (f - low) / (centre - low)
                elif centre < f <= high:
                    total += value * (high - f) / (high - centre)
            logs.append(math.log(max(total, 1.0)))
        row = []
        for n in range(13):
            angles = [math.cos(math.pi * n * (m + 0.5) / 40) for m in range(40)]
            value = math.sqrt(2 / 40) * sum(a * b for a, b in zip(angles, logs, strict=True))
            row.append((1 + 11 * math.sin(math.pi * n / 22)) * value)
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("rate", [16000, 8000, 40000])
def test_cepstra_agree_with_their_definition(rate):
    rng = np.random.default_rng(0)
    time = np.arange(int(0.06 * rate)) / rate
    tones = 0.2 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 2100 * time)
    audio = tones + 0.01 * rng.standard_normal(len(time))
    expected = slow_mfcc(audio, rate)
    value = MFCC(rate)(torch.from_numpy(audio).float()[None])[0]
    assert value.shape == expected.shape == (4, 13)
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-3)


def test_digital_silence_is_zero_and_nothing_is_infinite():
    mfcc = MFCC(16000)
    assert torch.equal(mfcc(torch.zeros(2, 1600)), torch.zeros(2, 8, 13))
    assert mfcc(torch.full((1, 1600), 1.0)).isfinite().all()


def test_autocast_does_not_coarsen_the_cepstra():
    mfcc, audio = MFCC(16000), torch.randn(1, 1600) * 0.1
    with torch.autocast("cpu", torch.bfloat16):
        value = mfcc(audio)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, mfcc(audio))


def test_a_rate_below_the_filters_is_refused():
    with pytest.raises(ValueError, match="sample_rate=4000: expected at least 8000"):
        MFCC(4000)


@pytest.mark.parametrize(
    ("samples", "frames"), [(640, 1), (1279, 1), (1280, 2), (640 * 9 + 100, 9)]
)
def test_every_whole_frame_of_sound_has_a_window(samples, frames):
    windows = SpeechWindows(16000, 640)
    assert windows(torch.randn(2, samples)).shape == (2, frames, 12, 35)


def test_less_than_a_frame_of_sound_is_an_error():
    with pytest.raises(ValueError, match="at least one frame, 640"):
        SpeechWindows(16000, 640)(torch.zeros(1, 639))


def test_windows_are_four_columns_apart_and_centred_on_their_frame():
    windows = SpeechWindows(16000, 640)
    x = windows(torch.randn(1, 640 * 12) * 0.1)[0]
    assert torch.equal(x[3:, :, :31], x[2:-1, :, 4:])
    click = torch.zeros(1, 640 * 12)
    click[0, 640 * 6 + 320] = 0.5  # the middle of frame 6
    heard = windows(click)[0].abs().sum(1)  # (T, 35)
    columns = heard[6].nonzero().flatten()
    assert columns.float().mean() == pytest.approx(17, abs=0.5)
    assert heard[0].sum() == heard[11].sum() == 0


@pytest.mark.parametrize(("rate", "stride"), [(16000, 533), (48000, 1600), (16000, 650)])
def test_windows_at_rates_that_are_no_multiple_of_a_column(rate, stride):
    """Every window starts within half a column of where centring it on its frame puts it."""
    windows, hop = SpeechWindows(rate, stride), rate // 100
    audio = torch.randn(1, 20 * stride) * 0.1
    x = windows(audio)
    span = 34 * hop + windows.mfcc.frame
    left = (span - stride) // 2
    cepstra = windows.mfcc(F.pad(audio, (left, span)))[0]
    for t in range(20):
        start = round(t * stride / hop) * hop
        assert abs(start - t * stride) <= hop / 2
        torch.testing.assert_close(x[0, t], cepstra[start // hop :][:35, 1:].T)


def test_published_widths():
    with torch.device("meta"):
        model = Speech2Vid(ModelConfig())
    generator = model.generator
    shape = lambda layer: tuple(layer.weight.shape)  # noqa: E731
    assert shape(generator.identity.conv1[0]) == (96, 3, 7, 7)
    assert shape(generator.identity.conv2[0]) == (256, 96, 5, 5)
    assert shape(generator.speech.head[0]) == (512, 512 * 6 * 9)
    assert shape(generator.speech.head[2]) == (256, 512)
    assert shape(generator.mix_speech) == (2 * 8 * 6, 256)  # 98 = 2·7·7 at 112×112
    assert shape(generator.first[1]) == (512, 2, 6, 6)
    assert [up.norm.channels for up in generator.ups] == [96, 96, 64]
    assert shape(generator.final) == (64, 3, 5, 5)
    assert len(model.deblur.convs) == 10
    assert parameters(model) == 41_723_526
    assert parameters(model.deblur) == 298_947


@pytest.mark.parametrize("size", [(32, 24), (24, 40), (8, 8)])
@pytest.mark.parametrize("fps", [25.0, 30.0])
def test_it_animates_frames_of_any_size(size, fps):
    config = dataclasses.replace(SMALL, height=size[0], width=size[1], fps=fps)
    still, audio = inputs(config)
    frames = Speech2Vid(config)(still, F.pad(audio, (0, 100)))
    assert frames.shape == (2, 7, 3, *size)
    assert frames.abs().max() <= 1


def test_every_parameter_gets_a_gradient():
    model = Speech2Vid(SMALL)
    torch.nn.init.normal_(model.deblur.convs[-1].weight, std=0.01)  # 0 would stop the gradient
    still, audio = inputs(SMALL)
    model(still, audio).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_it_is_deterministic_and_ignores_the_noise_source():
    model = Speech2Vid(SMALL).eval()
    still, audio = inputs(SMALL)
    a, b = (model(still, audio, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert torch.equal(a, b)


def test_frames_depend_on_the_sound_and_on_the_still():
    model = Speech2Vid(SMALL)
    still, audio = inputs(SMALL)
    frames = model(still, audio)
    assert not torch.allclose(frames, model(still, audio.flip(0)), atol=1e-4)
    assert not torch.allclose(frames, model(still.flip(0), audio), atol=1e-4)


def test_wrong_inputs_are_named():
    model = Speech2Vid(SMALL)
    still, audio = inputs(SMALL)
    with pytest.raises(ValueError, match="still"):
        model(still[:, :, :16], audio)
    with pytest.raises(ValueError, match="audio"):
        model(still, audio[:1])


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_a_skip_is_a_concatenation_computed_once_per_clip(size):
    """Equal to the published layer: repeat the skip over the frames, concatenate, convolve."""
    block = UpBlock(4, 3, 5).double()
    x = torch.randn(6, 4, 4, 3, dtype=torch.float64)
    skip = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    weight = torch.cat([block.frames.weight, block.skip.weight])
    joined = torch.cat([x, skip.repeat_interleave(3, 0)], 1)
    extra = [s - 2 * n + 1 for s, n in zip(size, (4, 3), strict=True)]
    u = F.conv_transpose2d(joined, weight, None, 2, 2, extra)
    expected = F.batch_norm(u, None, None, block.norm.weight, block.norm.bias, True).relu()
    torch.testing.assert_close(block(x, skip, list(size)), expected)


def test_five_equal_stills_are_one_still_with_summed_weights():
    weight, still = torch.randn(4, 15, 7, 7), torch.randn(2, 3, 32, 24)
    five = F.conv2d(still.repeat(1, 5, 1, 1), weight, None, 2, 3)
    one = F.conv2d(still, weight.unflatten(1, (5, 3)).sum(1), None, 2, 3)
    torch.testing.assert_close(one, five, rtol=1e-4, atol=1e-4)


def test_the_deblurring_network_starts_as_the_identity():
    model = Speech2Vid(SMALL).eval()
    still, audio = inputs(SMALL)
    assert torch.equal(model(still, audio), model.generator(still, audio))


def test_a_part_of_a_clip_is_heard_as_in_the_whole():
    """Snippets of training are shorter than a window: cut off there, no window would be whole."""
    model = Speech2Vid(SMALL, "eager").eval()
    stride, context = SMALL.samples_per_frame, model.context
    still, audio = torch.rand(1, 3, 32, 24), torch.rand(1, 20 * stride) - 0.5
    heard = audio[:, (8 - context) * stride : (11 + context) * stride]
    cut_off = audio[:, 8 * stride : 11 * stride]
    windows = model.generator.speech.windows
    part, whole = windows(heard, context), windows(audio)[:, 8:11]
    assert (part - whole).abs().max() < 1e-3
    assert (windows(cut_off) - whole).abs().max() > 1
    with torch.no_grad():
        frames, wanted = model(still, heard, context=context), model(still, audio)[:, 8:11]
    assert frames.shape == wanted.shape
    assert (frames - wanted).abs().max() < 1e-5
