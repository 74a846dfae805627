"""What a still cannot fool: mouths by landmarks, dlib's measures of real faces, its own row."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.train.helpers import measure
from train.baselines import REAL, SPEAKER_MEAN, STILL, SpeakerMeans, baselines
from train.data import landmarks
from train.data.landmarks import FIVE, PLACES, align_landmarks, find_landmarks, lip_shape, opening
from train.data.media import read_media
from train.data.prepared import PreparedSet
from train.evaluate import EvaluateConfig, load_meters
from train.metrics import faces
from train.metrics.faces import FaceEmbedder, FaceReader
from train.metrics.mouth import mouth_box, mouth_psnr, mouth_scores
from train.metrics.score import MetricError, Score
from train.metrics.table import Meters, Pair, speaker_mean
from train.prepare import prepare_synthetic

needs_dlib = pytest.mark.skipif(not landmarks.installed(), reason=landmarks.INSTALL)
MOUTH = ("mouth_psnr", "lmd", "mouth_amplitude", "mouth_correlation")


def face(open_by, centre=(48.0, 80.0), eyes=34.0):
    """Landmarks (T, 68, 2): eyes that far apart, lips that far open, the mouth 20 px wide."""
    open_by = np.asarray(open_by, float)
    points = np.zeros((len(open_by), 68, 2))
    points[:, 36:42], points[:, 42:48] = (48 - eyes / 2, 44), (48 + eyes / 2, 44)
    points[:, 48:68] = centre
    points[:, 48, 0] -= 10
    points[:, 54, 0] += 10
    points[:, 62, 1] -= open_by / 2
    points[:, 66, 1] += open_by / 2
    return points


WAVE = 4 + 3 * np.sin(np.arange(50) / 3)


def test_the_opening_is_relative_to_the_eyes():
    np.testing.assert_allclose(opening(face(WAVE)), WAVE / 34)
    np.testing.assert_allclose(opening(face(WAVE) * 3 + 7), WAVE / 34)


def test_the_shape_of_the_lips_is_relative_to_the_eyes_and_the_speaker():
    points = face(WAVE)
    points[:, 54, 0] += WAVE  # the mouth widens as it opens; its outer lips are 30 apart
    points[:, 51, 1] -= 30
    expected = np.column_stack([WAVE, np.zeros(50), WAVE - WAVE.mean()]) / 34
    np.testing.assert_allclose(lip_shape(points), expected, atol=1e-6)
    np.testing.assert_allclose(lip_shape(3 * points + 7), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("made", "amplitude", "correlation"),
    [
        (WAVE, 1, 1),
        (4 + (WAVE - 4) / 2, 0.5, 1),
        (8 - WAVE, 1, -1),
        (np.full(50, 4.0), 0, None),
    ],
)
def test_amplitude_and_correlation(made, amplitude, correlation):
    scores = mouth_scores(face(made), face(WAVE))
    assert scores["mouth_amplitude"].value == pytest.approx(amplitude)
    assert scores["mouth_correlation"].value == (correlation and pytest.approx(correlation))
    if correlation is None:
        assert scores["mouth_correlation"].reason == "the generated mouth does not move"


def test_a_mouth_at_rest_has_no_amplitude_to_compare_with():
    scores = mouth_scores(face(WAVE), face(WAVE * 0 + 1))
    for key in ("mouth_amplitude", "mouth_correlation"):
        assert scores[key] == Score(None, "the real mouth is at rest")


def test_landmark_distance_in_percent_of_the_eyes_distance():
    moved = face(WAVE, centre=(51.0, 84.0))  # 5 px away
    assert mouth_scores(moved, face(WAVE))["lmd"].value == pytest.approx(100 * 5 / 34)
    assert mouth_scores(2 * moved, 2 * face(WAVE))["lmd"].value == pytest.approx(100 * 5 / 34)
    with pytest.raises(MetricError, match=r"expected \(T, 68, 2\) twice"):
        mouth_scores(moved[:9], face(WAVE))


def test_mouth_psnr_sees_the_mouth_alone():
    box = mouth_box(face(WAVE), (128, 96))
    top, bottom, left, right = box
    assert (top, bottom, left, right) == (73, 88, 34, 63)  # 3.5 and 10 px, and a tenth of 34
    rng = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (4, 3, 128, 96), dtype=torch.uint8, generator=rng)
    made = real.clone()
    made[..., :top, :] = made[..., bottom:, :] = made[..., :left] = made[..., right:] = 0
    assert mouth_psnr(made, real, box) == Score(None, "identical to the real video")
    made[..., top:bottom, left:right] = (real[..., top:bottom, left:right] // 2) + 10
    inside = (..., slice(top, bottom), slice(left, right))
    assert (
        mouth_psnr(made, real, box).value
        == mouth_psnr(made[inside], real[inside], (0, bottom - top, 0, right - left)).value
    )
    assert mouth_box(face(WAVE, centre=(1.0, 126.0)), (128, 96))[1:3] == (128, 0)
    with pytest.raises(MetricError, match="lies outside the frame of 64 x 48"):
        mouth_box(face(WAVE, centre=(90.0, 120.0)), (64, 48))


def test_every_person_counts_once():
    scores = [("a", Score(1.0)), ("a", Score(3.0)), ("b", Score(8.0)), ("b", Score(None, "why"))]
    assert speaker_mean(scores) == Score(5.0, "1 of 4 clips left out: why")
    assert speaker_mean(scores[3:]) == Score(None, "why")


@pytest.fixture(scope="module")
def clips(grid_dir):
    """Aligned frames (75, 3, 128, 96) of a man who blinks once, a man who does not, a woman."""
    found = {}
    for name in ("s2/pwij3p", "s30/pgbb4s", "s20/brbk7n"):
        frames, _, audio = read_media(grid_dir / f"{name}.mpg", 16000)
        aligned = align_landmarks(frames, find_landmarks(frames).points)
        found[name[:3].strip("/")] = SimpleNamespace(
            frames=torch.from_numpy(aligned), audio=audio, name=name
        )
    return found


@pytest.fixture(scope="module")
def meters():
    return Meters(FaceEmbedder(), faces=FaceReader())


@needs_dlib
def test_landmarks_of_aligned_faces_of_any_size(clips, meters):
    frames = clips["s30"].frames
    points = meters.faces.read(frames)
    assert np.abs(points[:, FIVE].mean(0) - PLACES).max() < 2
    half = torch.nn.functional.interpolate(frames.float(), (64, 48), mode="area").byte()
    assert np.abs(meters.faces.read(half) * 2 + 0.5 - points).mean() < 1
    assert np.ptp(meters.faces.read(frames[:1].repeat(5, 1, 1, 1)), axis=0).max() == 0


@needs_dlib
def test_what_is_no_aligned_face_has_no_landmarks(clips, meters):
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (5, 3, 128, 96), dtype=torch.uint8, generator=rng)
    low = clips["s30"].frames.roll(45, dims=2)
    small = torch.full((5, 3, 384, 288), 90, dtype=torch.uint8)
    small[..., :128, :96] = clips["s30"].frames[:5]
    for frames in (noise, low, small):
        assert meters.faces.read(frames) == Score(None, faces.NO_FACE)


@needs_dlib
def test_a_video_is_read_once(clips, monkeypatch):
    reader = FaceReader()
    frames = clips["s30"].frames[:3]
    first = reader.read(frames)
    monkeypatch.setattr(faces, "predict", None)
    assert reader.read(frames) is first


@needs_dlib
def test_blinks_of_real_faces_by_the_authors_detector(clips, meters):
    rates = {}
    for key in ("s2", "s30"):
        clip = clips[key]
        pair = Pair(clip.frames, clip.frames, clip.audio, 25.0, 16000, clip.name)
        row = measure([pair], Meters(faces=meters.faces))
        rates[key] = row["blinks_per_s"].value
        if key == "s2":
            assert 0.2 < row["blink_duration"].value < 0.7
    assert rates == {"s2": pytest.approx(1 / 3), "s30": 0}


@needs_dlib
def test_a_stranger_is_further_away_than_oneself(clips, meters):
    (own,), (later,), (other,) = (
        meters.embedder(frames)
        for frames in (clips["s2"].frames[:1], clips["s2"].frames[60:61], clips["s30"].frames[:1])
    )
    assert (own - later).norm() < 0.4  # dlib's own threshold is 0.6
    assert (own - other).norm() > 0.6


@needs_dlib
def test_a_still_has_a_fair_psnr_and_is_found_out_by_its_mouth(clips, meters):
    clip = clips["s2"]
    pair = Pair(clip.frames.clone(), clip.frames, clip.audio, 25.0, 16000, clip.name)
    others = dict(baselines(pair, {}, None))
    assert others.keys() == {STILL, REAL}
    still, real = (measure([others[key]], meters) for key in (STILL, REAL))
    assert still["psnr"].value > 27
    assert still["mouth_psnr"].value < still["psnr"].value
    assert still["mouth_amplitude"].value == pytest.approx(0, abs=1e-9)
    assert still["mouth_correlation"].value is None
    assert still["lmd"].value > 1
    assert still["acd"].value == 0
    assert 0.05 < real["acd"].value < 0.4
    assert all(real[key] == Score(None, "the real video itself") for key in MOUTH)
    late = Pair(clip.frames.roll(5, 0), clip.frames, clip.audio, 25.0, 16000, clip.name)
    row = measure([late], Meters(faces=meters.faces))
    assert row["mouth_amplitude"].value == pytest.approx(1)
    assert row["mouth_correlation"].value < 0.8


@needs_dlib
def test_a_video_without_a_face_has_dashes_that_say_so(clips, meters):
    clip = clips["s30"]
    flat = torch.full_like(clip.frames, 90)
    row = measure([Pair(flat, clip.frames, clip.audio, 25.0, 16000)], meters)
    for key in ("lmd", "mouth_amplitude", "acd", "blinks_per_s"):
        assert row[key] == Score(None, faces.NO_FACE), key
    assert row["mouth_psnr"].value > 0  # the box is the real clip's
    row = measure([Pair(clip.frames, flat, clip.audio, 25.0, 16000)], meters)
    assert all(row[key] == Score(None, f"real video: {faces.NO_FACE}") for key in MOUTH)


def test_without_dlib_there_are_dashes_that_say_what_to_install(monkeypatch, tmp_path):
    rng = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (4, 3, 64, 48), dtype=torch.uint8, generator=rng)
    pair = Pair(frames.clone(), frames, np.ones(2560, np.float32), 25.0, 16000)

    def measured(**options):
        config = EvaluateConfig(tmp_path, **options)
        return measure([pair], load_meters(config, eyes=False, device=torch.device("cpu")))

    row = measured(landmarks="none")
    assert {row[key] for key in (*MOUTH, "blinks_per_s")} == {Score(None, "--landmarks none")}
    monkeypatch.setattr(landmarks.importlib.util, "find_spec", lambda name: None)
    row = measured()
    assert all(landmarks.INSTALL in row[key].reason for key in (*MOUTH, "blink_duration"))
    assert row["ssim"].value == pytest.approx(1)  # the other columns are as ever


def test_the_mean_of_a_speaker_leaves_the_clip_itself_out(tmp_path):
    root = prepare_synthetic(
        tmp_path / "set", clips=9, speakers=4, seconds=0.2, size=(32, 24), workers=1
    )
    means = SpeakerMeans(root, (32, 24))
    data = PreparedSet(root, split=None, size=(32, 24))
    alone = 0
    for index, clip in enumerate(data.clips):
        others = [
            data[i]["frames"].float().mean(0)
            for i, other in enumerate(data.clips)
            if other["speaker"] == clip["speaker"] and i != index
        ]
        frames = data[index]["frames"]
        pair = Pair(frames.clone(), frames, np.ones(1, np.float32), 25.0, 16000)
        other = dict(baselines(pair, clip, means))[SPEAKER_MEAN]
        if not others:
            alone += 1
            assert other == Score(None, "the only clip of its speaker")
        else:
            expected = torch.stack(others).mean(0)
            assert (other.made.float() - expected).abs().max() <= 0.5
            assert other.made.shape == frames.shape
    assert 0 <= alone < len(data)
    many = SpeakerMeans(root, (32, 24))
    clip = {"speaker": data.clips[0]["speaker"], "file": "another"}
    many._clips[clip["speaker"]] = list(range(9)) * 3
    many.without(clip)
    assert len(many._means) <= 8
