"""PSNR and SSIM against scikit-image and OpenCV, on real clips and hostile ones."""

import math

import cv2
import numpy as np
import pytest
import torch

from train.data.media import read_media
from train.metrics.quality import grey, psnr, quality_scores, ssim
from train.metrics.score import MetricError, Score, check_rates, mean_score


@pytest.fixture(scope="module")
def videos(grid_dir):
    """A real clip, 8 frames, and itself three frames later: (T, 3, H, W) uint8 each."""
    frames = read_media(grid_dir / "s1" / "bbir6n.mpg", 16000)[0][20:31]
    frames = torch.from_numpy(frames[:, 90:218, 130:226].transpose(0, 3, 1, 2).copy())
    return frames[3:], frames[:-3]


def pictures(frames, colour):
    frames = frames.numpy().transpose(0, 2, 3, 1)
    return frames if colour else np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames])


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("average", ["video", "frame"])
def test_psnr_agrees_with_scikit_image(videos, colour, average):
    metrics = pytest.importorskip("skimage.metrics")
    made, real = (pictures(video, colour) for video in videos)
    peak = metrics.peak_signal_noise_ratio
    if average == "video":
        expected = peak(real, made, data_range=255)
    else:
        expected = np.mean([peak(r, m, data_range=255) for m, r in zip(made, real, strict=True)])
    value = psnr(*videos, colour=colour, average=average)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("window", ["uniform", "gaussian"])
def test_ssim_agrees_with_scikit_image(videos, colour, window):
    metrics = pytest.importorskip("skimage.metrics")
    shape = {"win_size": 11} if window == "uniform" else {"gaussian_weights": True, "sigma": 1.5}
    made, real = (pictures(video, colour) for video in videos)
    expected = np.mean(
        [
            metrics.structural_similarity(
                m,
                r,
                data_range=255,
                use_sample_covariance=False,
                channel_axis=2 if colour else None,
                **shape,
            )
            for m, r in zip(made, real, strict=True)
        ]
    )
    value = ssim(*videos, colour=colour, window=window)
    assert value.item() == pytest.approx(expected, abs=1e-4)


def test_grey_is_opencvs():
    colours = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    expected = cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)
    np.testing.assert_array_equal(grey(torch.from_numpy(colours.transpose(2, 0, 1))), expected)


def test_a_batch_is_its_clips(videos):
    made, real = videos
    together = torch.stack([made, real]), torch.stack([real, real])
    for metric in (psnr, ssim):
        values = metric(*together)
        assert values[0] == metric(made, real)[0]
        assert values[1] == metric(real, real)[0]


def test_one_frame_and_known_values():
    flat = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert psnr(flat + 5, flat).item() == pytest.approx(20 * math.log10(255 / 5))
    c1 = (0.01 * 255) ** 2
    luminance = (2 * 105 * 100 + c1) / (105**2 + 100**2 + c1)
    assert ssim(flat + 5, flat).item() == pytest.approx(luminance)
    assert psnr(flat, flat).item() == math.inf


def test_identical_videos_have_no_psnr(videos):
    scores = quality_scores(videos[0], videos[0])
    assert scores["psnr"] == Score(None, "identical to the real video")
    assert scores["ssim"].value == pytest.approx(1)
    assert quality_scores(*videos)["psnr"].value == pytest.approx(psnr(*videos).item())


@pytest.mark.parametrize(
    ("made", "real", "message"),
    [
        ((5, 3, 16, 16), (4, 3, 16, 16), "5 frames and the real one 4"),
        ((5, 3, 16, 20), (5, 3, 16, 16), "20 columns and the real one 16"),
        ((2, 5, 3, 16, 16), (5, 3, 16, 16), "2 clips and the real one 1"),
        ((5, 1, 16, 16), (5, 3, 16, 16), "expected .B, T, 3, H, W."),
        ((0, 3, 16, 16), (0, 3, 16, 16), "expected .B, T, 3, H, W."),
        ((2, 3, 10, 16), (2, 3, 10, 16), "sides of at least 11"),
    ],
)
def test_unsuitable_videos_are_one_line(made, real, message):
    with pytest.raises(MetricError, match=message) as caught:
        ssim(torch.zeros(made, dtype=torch.uint8), torch.zeros(real, dtype=torch.uint8))
    assert "\n" not in str(caught.value)


def test_floats_are_refused():
    with pytest.raises(MetricError, match=r"uint8 tensor.*got torch.float32"):
        psnr(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_mean_score():
    assert mean_score([Score(1.0), Score(3.0)]) == Score(2.0)
    some = mean_score([Score(1.0), Score(None, "silent"), Score(3.0)])
    assert some == Score(2.0, "1 of 3 clips left out: silent")
    assert mean_score([Score(None, "silent")]) == Score(None, "silent")
    assert mean_score([]).value is None
    assert str(Score(None, "silent")) == "-"


def test_rates_of_a_comparison_agree():
    assert check_rates([25.0, 25.0]) == 25
    with pytest.raises(MetricError, match="videos of 25, 30 fps: expected one rate"):
        check_rates([25.0, 30.0])
    with pytest.raises(MetricError, match="0 fps"):
        check_rates([0.0])
