"""The procedural talking-head set: determinism, ground truth, audio times identity."""

import time

import cv2
import numpy as np
import pytest

from train.data.prepared import Clip, read_clip, write_clip
from train.data.synthetic import (
    OPENING,
    articulate,
    draw_blinks,
    eyelids,
    render_clip,
    speaker_identity,
)
from train.data.synthetic.clip import AWAKE, BLINK_RATE, BLINK_SECONDS, REFRACTORY
from train.data.synthetic.identity import ARTICULATION
from train.data.synthetic.speech import Utterance

SMALL = {"size": (64, 48), "seconds": 2.0}


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Two utterances of each of six speakers at the full size."""
    return [render_clip(index, seed=3, speakers=6) for index in range(12)]


def assert_same(a: Clip, b: Clip) -> None:
    np.testing.assert_array_equal(a.frames, b.frames)
    np.testing.assert_array_equal(a.audio, b.audio)
    assert (a.speaker, a.name, a.truth.keys()) == (b.speaker, b.name, b.truth.keys())
    for key in a.truth:
        np.testing.assert_array_equal(a.truth[key], b.truth[key])


def test_same_arguments_same_bytes_whatever_the_global_state():
    np.random.seed(0)
    a = render_clip(5, seed=1, **SMALL)
    np.random.seed(1)
    assert_same(a, render_clip(5, seed=1, **SMALL))


@pytest.mark.parametrize("other", [{"index": 45}, {"seed": 2}])
def test_another_index_or_seed_is_another_clip(other):
    a = render_clip(5, seed=1, **SMALL)
    b = render_clip(**{"index": 5, "seed": 1, **other}, **SMALL)
    assert not np.array_equal(a.audio, b.audio)
    assert not np.array_equal(a.frames, b.frames)


def test_shapes_types_and_ranges(clips):
    for index, clip in enumerate(clips):
        assert clip.frames.shape == (75, 3, 128, 96)
        assert clip.frames.dtype == np.uint8
        assert clip.frames.flags.c_contiguous
        assert clip.audio.shape == (48000,)
        assert clip.audio.dtype == np.float32
        assert np.abs(clip.audio).max() < 0.95
        assert 0.05 < clip.audio.std() < 0.12
        assert (clip.fps, clip.sample_rate) == (25.0, 16000)
        assert clip.speaker == f"speaker{index % 6:02d}"
        assert clip.name == f"{index:04d}"
        shapes = {key: value.shape for key, value in clip.truth.items()}
        blinks = len(clip.truth["blink_times"])
        per_frame = ("openness", "width", "jaw_drive", "spread_drive", "eye_openness", "voiced")
        assert shapes == {
            **dict.fromkeys(per_frame, (75,)),
            "articulation": (len(ARTICULATION),),
            "blink_times": (blinks, 2),
            "formants": (75, 4),
            "pose": (75, 3),
            "lips": (75, 3),
        }
        assert all(v.dtype == np.float32 for v in clip.truth.values())
        assert all(np.isfinite(v).all() for v in clip.truth.values())
        for key in ("jaw_drive", "eye_openness", "voiced"):
            assert clip.truth[key].min() >= 0
            assert clip.truth[key].max() <= 1
        assert (np.diff(clip.truth["formants"], axis=1) > 0).all()


@pytest.mark.parametrize(
    ("size", "seconds", "fps", "sample_rate", "frames", "samples"),
    [
        ((64, 48), 1.0, 25.0, 16000, 25, 16000),
        ((96, 96), 0.5, 30.0, 48000, 15, 24000),
        ((17, 33), 0.3, 29.97, 22050, 8, 6615),
        ((256, 192), 0.04, 25, 8000, 1, 320),
    ],
)
def test_other_sizes_and_rates(size, seconds, fps, sample_rate, frames, samples):
    clip = render_clip(2, seconds=seconds, fps=fps, sample_rate=sample_rate, size=size)
    assert clip.frames.shape == (frames, 3, *size)
    assert clip.audio.shape == (samples,)
    assert clip.frames.std() > 20


def test_size_scales_the_picture():
    large = render_clip(1, seed=3, seconds=1.0).frames[10].transpose(1, 2, 0)
    small = render_clip(1, seed=3, seconds=1.0, size=(64, 48)).frames[10].transpose(1, 2, 0)
    shrunk = cv2.resize(large, (48, 64), interpolation=cv2.INTER_AREA)
    difference = np.abs(shrunk.astype(float) - small)  # strands of hair and grain differ
    assert np.median(difference) < 2
    assert difference.mean() < 6


def test_a_clip_survives_the_prepared_format(tmp_path):
    clip = render_clip(3, **SMALL)
    write_clip(tmp_path / "clip.safetensors", clip)
    back = read_clip(tmp_path / "clip.safetensors")
    np.testing.assert_array_equal(back.frames, clip.frames)
    np.testing.assert_array_equal(back.truth["openness"], clip.truth["openness"])
    assert np.abs(back.audio - clip.audio).max() <= 1 / 32768


def test_a_speaker_keeps_face_articulation_and_voice(clips):
    for a, b in zip(clips[:6], clips[6:], strict=True):
        np.testing.assert_array_equal(a.truth["articulation"], b.truth["articulation"])
        # The same face and backdrop: first frames differ by a small head motion only.
        same = np.abs(a.frames[0].astype(float) - b.frames[0]).mean()
        other = min(
            np.abs(a.frames[0].astype(float) - c.frames[0]).mean()
            for c in clips
            if c.speaker != a.speaker
        )
        assert same < 0.6 * other
    assert (
        speaker_identity(4, seed=3).articulation.tolist() == clips[4].truth["articulation"].tolist()
    )
    many = render_clip(4, seed=3, speakers=1000, **SMALL)
    np.testing.assert_array_equal(many.truth["articulation"], clips[4].truth["articulation"])


def test_openness_is_drive_times_gain(clips):
    for clip in clips:
        gain = clip.truth["articulation"][ARTICULATION.index("jaw")]
        expected = OPENING * gain * clip.truth["jaw_drive"]
        np.testing.assert_allclose(clip.truth["openness"], expected, rtol=1e-5, atol=1e-5)


def test_articulation_varies_and_can_be_read_from_the_face():
    people = [speaker_identity(i) for i in range(300)]
    gains = np.array([p.articulation for p in people])
    assert gains[:, 0].min() < 0.6
    assert gains[:, 0].max() > 1.4
    assert (gains[:, 0] >= 0.35).all()
    assert (gains[:, 0] <= 1.6).all()
    visible = [(1, p.lip_fullness, p.lip_redness, p.lip_width, p.jaw) for p in people]
    for column in (0, 1, 2):  # jaw, spread, round
        fit = np.linalg.lstsq(np.array(visible), gains[:, column], rcond=None)[0]
        residual = gains[:, column] - np.array(visible) @ fit
        assert residual.std() < 0.15 * gains[:, column].std()


def test_the_mouth_in_the_picture_opens_with_the_truth(clips):
    for clip in clips:
        truth = clip.truth["openness"]
        mouth = clip.frames[:, :, 80:112, 30:68].astype(float).mean(axis=1)
        darkest_closed = np.percentile(mouth[truth < 0.3], 0.5)
        dark = (mouth < darkest_closed).sum(axis=(1, 2))
        assert np.corrcoef(dark, truth)[0, 1] > 0.8


def test_one_utterance_looks_different_on_different_speakers():
    """Swap the identity under the same drives: the openings differ by the ratio of the gains."""
    people = sorted((speaker_identity(i) for i in range(30)), key=lambda p: p.articulation[0])
    said = Utterance(
        audio=np.zeros(0),
        formants=np.zeros((3, 4)),
        voiced=np.ones(3),
        jaw=np.array([0.0, 0.5, 1.0]),
        spread=np.zeros(3),
    )
    mumbler, declaimer = articulate(people[0], said), articulate(people[-1], said)
    assert mumbler.openness[0] == declaimer.openness[0] == 0
    assert declaimer.openness[2] > mumbler.openness[2] + 6


def test_the_still_is_quiet_closed_and_awake(clips):
    starts = [render_clip(i, seed=9, seconds=0.4, size=(32, 24)).truth for i in range(60)]
    assert all((t["eye_openness"][:5] == 1).all() for t in starts)
    assert np.mean([t["openness"][0] < 0.5 for t in starts]) > 0.8


def test_pauses_are_silent_with_closed_lips(clips):
    level, openness = [], []
    for clip in clips:
        frames = clip.audio.reshape(75, 640)
        level.append(np.sqrt((frames**2).mean(axis=1)))
        openness.append(clip.truth["jaw_drive"])
    level, openness = np.concatenate(level), np.concatenate(openness)
    silent = level < 0.002
    assert 0.1 < silent.mean() < 0.6
    assert openness[silent].mean() < 0.1
    assert np.corrcoef(level, openness)[0, 1] > 0.6


def test_vowels_have_their_formants_in_the_audio(clips):
    """Where the voice is loud and F1 high, the spectrum's energy below 1.5 kHz lies higher."""
    high, low = [], []
    freq = np.fft.rfftfreq(1024, 1 / 16000)
    band = (freq > 150) & (freq < 1500)
    for clip in clips:
        for frame, f, v in zip(
            clip.audio.reshape(75, 640), clip.truth["formants"], clip.truth["voiced"], strict=True
        ):
            if v > 0.7:
                power = np.abs(np.fft.rfft(frame * np.hanning(640), 1024))[band] ** 2
                (high if f[0] > 600 else low).append((power * freq[band]).sum() / power.sum())
    assert np.mean(high) > np.mean(low) + 100


def test_blinks_come_at_the_stated_rate():
    rng = np.random.default_rng(0)
    for seconds in (3.0, 10.0):
        blinks = [draw_blinks(rng, seconds) for _ in range(4000)]
        rate = sum(map(len, blinks)) / (4000 * seconds)
        assert abs(rate - BLINK_RATE) < 0.025
        for pairs in blinks:
            duration = pairs[:, 1] - pairs[:, 0]
            assert (
                (duration > BLINK_SECONDS[0] - 1e-4) & (duration < BLINK_SECONDS[1] + 1e-4)
            ).all()
            assert (pairs[:, 0] >= AWAKE).all()
            assert (pairs[:, 1] <= seconds).all()
            assert (pairs[1:, 0] - pairs[:-1, 1] >= REFRACTORY - 1e-5).all()
    counts = np.array([len(b) for b in blinks])
    assert 0 < counts.var() < counts.mean()  # random, but more regular than a Poisson process


@pytest.mark.parametrize("fps", [10.0, 25.0, 29.97, 60.0])
def test_lids_close_during_blinks_and_only_then(fps):
    rng = np.random.default_rng(1)
    times = (np.arange(int(20 * fps)) + 0.5) / fps
    blinks = draw_blinks(rng, 20.0)
    assert len(blinks) >= 2
    eyes = eyelids(blinks, times, fps)
    during = ((times[:, None] > blinks[:, 0]) & (times[:, None] < blinks[:, 1])).any(axis=1)
    assert (eyes[~during] == 1).all()
    for start, end in blinks:
        middle = np.abs(times - (start + end) / 2).argmin()
        assert eyes[middle] == 0


def test_closed_eyes_hide_the_irises():
    clip = next(c for c in map(render_clip, range(40)) if len(c.truth["blink_times"]))
    eyes = clip.frames[:, :, 36:52, 20:78].astype(float)
    truth = clip.truth["eye_openness"]
    contrast = eyes.std(axis=(1, 2, 3))
    assert contrast[truth == 0].max() < 0.9 * contrast[truth == 1].min()


@pytest.mark.parametrize(
    "bad",
    [
        {"index": -1},
        {"index": 1.5},
        {"seed": -1},
        {"speakers": 0},
        {"seconds": 0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"fps": 0},
        {"fps": "25"},
        {"sample_rate": 100},
        {"sample_rate": 16000.5},
        {"size": (8, 8)},
        {"size": 128},
        {"size": (128, 96, 3)},
        {"size": (100_000, 96)},
    ],
)
def test_bad_arguments_are_named(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"^render_clip: {name} is .*expected"):
        render_clip(**{"index": 0, **bad})


def test_a_clip_takes_less_than_three_tenths_of_a_second():
    render_clip(0)
    seconds = []
    for index in range(3):
        start = time.process_time()
        render_clip(index)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3
