"""Blinks: the detector on drawn signals and landmarks, the reader against the built-in truth."""

import numpy as np
import pytest
import torch

from train.data.landmarks import eye_aspect_ratio
from train.data.prepared import DataError
from train.data.synthetic import render_clip
from train.metrics.blinks import blink_scores, find_blinks, synthetic_ear
from train.metrics.score import MetricError, Score

FPS = 25


def signal(*blinks, frames=75, noise=True):
    """An EAR of 0.3 that falls to 0.05 between the frames (start, end) of each blink."""
    ear = np.full(frames, 0.3)
    for start, end in blinks:
        span = np.linspace(-1, 1, end - start + 1)
        ear[start : end + 1] = 0.05 + 0.25 * np.clip(2 * np.abs(span) - 0.9, 0, 1)
        ear[[start, end]] = 0.3
    return ear + (0.002 * (-1.0) ** np.arange(frames) if noise else 0)


def test_peaks_around_a_blink_are_its_ends():
    # peaks of the alternating noise lie on even frames
    assert find_blinks(signal((20, 28), (50, 56))).tolist() == [[20, 28], [50, 56]]
    assert find_blinks(signal((21, 29))).tolist() == [[20, 30]]
    assert find_blinks(signal()).tolist() == []


def test_without_peaks_the_blink_reaches_to_the_ends_of_the_clip():
    flat = signal((20, 28), noise=False)
    assert find_blinks(flat).tolist() == [[0, 74]]
    assert find_blinks(flat, edges="level").tolist() == [[20, 28]]


def test_a_blink_may_end_on_the_last_frame_before_the_next_closing():
    ear = [0.3, 0.31, 0.3, 0.1, 0.1, 0.15, 0.2, 0.3, 0.27, 0.1, 0.1, 0.15, 0.3, 0.31, 0.3]
    assert find_blinks(np.array(ear)).tolist() == [[1, 7], [7, 13]]


def test_closing_that_is_a_peak_starts_there():
    ear = signal(noise=False)
    ear[30] = 0.31
    ear[31:34] = [0.1, 0.05, 0.1]
    ear[34] = 0.32
    assert find_blinks(ear).tolist() == [[30, 34]]


def test_closing_without_reopening():
    ear = signal((60, 68))[:65]
    assert find_blinks(ear).tolist() == [[60, 64]]  # the last one lasts to the end
    ear = signal((20, 28))
    ear[24:28] = [0.05, 0.05, 0.14, 0.05]  # a second fall from below the upper half
    found = find_blinks(ear)
    assert len(found) == 1
    assert found[0, 1] == 28


def test_slow_closings_are_below_the_threshold():
    ear = np.concatenate([np.linspace(0.3, 0.05, 12), np.linspace(0.05, 0.3, 12)])
    assert len(find_blinks(ear)) == 0
    assert len(find_blinks(ear, threshold=0.02)) == 1


def test_ratio_of_landmarks():
    points = np.zeros((4, 68, 2))
    eye = np.array([(0, 0), (1, -1), (2, -1), (3, 0), (2, 1), (1, 1)], float)
    points[:, 36:42], points[:, 42:48] = eye, eye * (2, 1) + 9
    assert eye_aspect_ratio(points) == pytest.approx([(2 / 3 + 2 / 6) / 2] * 4)
    points[[0, 2]] = np.nan
    assert eye_aspect_ratio(points) == pytest.approx([0, 0.5, 0.5, 0.5])
    with pytest.raises(DataError, match=r"expected \(T, 68, 2\)"):
        eye_aspect_ratio(points[:, :5])


def test_aggregate():
    scores = blink_scores([signal((20, 28)), signal((10, 16), (40, 48)), signal()], fps=FPS)
    assert scores["blinks_per_s"].value == pytest.approx(3 / 9)
    assert scores["blink_duration"].value == pytest.approx((8 + 6 + 8) / 3 / FPS)
    nobody = blink_scores([signal()], fps=FPS)
    assert (nobody["blinks_per_s"], nobody["blink_duration"]) == (Score(0.0), Score(0.0))


@pytest.mark.parametrize(
    ("ears", "fps", "reason"),
    [
        ([], 25, "less than two frames"),
        ([np.zeros(1)], 25, "less than two frames"),
        ([signal()], 30, "30 fps, the threshold is for 25"),
    ],
)
def test_what_cannot_be_measured_says_why(ears, fps, reason):
    for score in blink_scores(ears, fps=fps).values():
        assert score.value is None
        assert reason in score.reason


def test_unsuitable_signals_are_one_line():
    with pytest.raises(MetricError, match="finite"):
        find_blinks(np.array([0.3, np.nan]))
    with pytest.raises(MetricError, match="'peak' or 'level'"):
        find_blinks(signal(), edges="both")
    with pytest.raises(MetricError, match="fps 0"):
        blink_scores([signal()], fps=0)
    assert len(find_blinks(np.array([0.3]))) == 0


def compare(clips, edges, size=None):
    """Precision, recall and mean and mean absolute error of the durations in frames."""
    errors, extra, missed = [], 0, 0
    for clip in clips:
        frames = torch.from_numpy(clip.frames)
        if size is not None:
            frames = torch.nn.functional.interpolate(frames.float(), size, mode="area").byte()
        (ear,) = synthetic_ear(frames)
        truth = clip.truth["blink_times"].tolist()
        for start, end in (find_blinks(ear, edges=edges) + 0.5) / FPS:
            overlapping = [t for t in truth if min(end, t[1]) > max(start, t[0])]
            if overlapping:
                true_start, true_end = overlapping[0]
                truth.remove(overlapping[0])
                errors.append(((end - start) - (true_end - true_start)) * FPS)
            else:
                extra += 1
        missed += len(truth)
    found = len(errors)
    return (
        found / (found + extra),
        found / (found + missed),
        np.mean(errors),
        np.mean(np.abs(errors)),
    )


def test_reader_follows_the_lids():
    clips = [render_clip(index, seed=11) for index in range(6)]
    read = np.concatenate([synthetic_ear(torch.from_numpy(clip.frames))[0] for clip in clips])
    truth = np.concatenate([clip.truth["eye_openness"] for clip in clips])
    assert np.corrcoef(read, truth)[0, 1] > 0.95
    precision, recall, bias, error = compare(clips, "level")
    assert precision == recall == 1
    assert abs(bias) < 1
    assert error < 1


@pytest.fixture(scope="module")
def unseen():
    """Speakers and clips that had no part in fixing the reader's constants."""
    return [render_clip(index, seed=23, speakers=64) for index in range(64)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (64, 48)])
def test_blinks_of_the_built_in_set(unseen, size):
    precision, recall, bias, error = compare(unseen, "level", size)
    assert precision >= 0.95
    assert recall >= 0.95
    assert abs(bias) < 1
    assert error < 1
    precision, recall, bias, _ = compare(unseen, "peak", size)
    assert precision >= 0.95
    assert recall >= 0.95
    assert 1 < bias < 5  # the authors' edges lengthen blinks


def test_pictures_without_eyes():
    grey = torch.full((2, 30, 3, 64, 48), 90, dtype=torch.uint8)
    assert [score.reason for score in synthetic_ear(grey)] == ["no eyes in the pictures"] * 2
    with pytest.raises(MetricError, match="uint8"):
        synthetic_ear(grey.float())
