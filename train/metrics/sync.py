"""AV offset and AV confidence: are the lips in time with the sound, and how clearly?

The procedure of joonson/syncnet_python: embed every window of five frames and the sound of every
frame, take the distances of each window i to the sound of the frames i - 15 .. i + 15, average
over the windows, and find the shift of the smallest mean. Offset = 15 - its index, in frames of
1/25 s; confidence = median - minimum of the 31 means.

Sign: a positive offset means that the sound is early. (The code says so, and delaying a clip's
sound by 0.25 s moved its offset from 4 to -2; a comment in the authors' forum says the reverse.)

Traps. Face detection and tracking are bypassed: frames are taken as aligned, at a fixed box (see
``train.metrics.syncnet``); the published pipeline's defaults reject clips of 75 frames or 96
pixels. Where a shift reaches beyond the clip the procedure compares with zeros, which biases clips
of 3 s (70 windows): ``masked=True`` leaves those pairs out. Numbers of two networks cannot be
compared.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import soxr
import torch
from torch import Tensor
from torch.nn import functional as F

from train.metrics.mfcc import mfcc
from train.metrics.score import MetricError, Score, check_frames
from train.metrics.syncnet import WINDOW

FPS, SAMPLE_RATE = 25.0, 16000
STRIDE = 640  # samples to a frame
SHIFT = 15  # frames searched to each side
MIN_FRAMES = SHIFT + 1 + WINDOW  # the clip must overlap itself at the greatest shift
SILENCE = 1e-4  # RMS of full scale, -80 dB
MISMATCH = 0.25  # s by which picture and sound may differ in length
_EPS = 1e-6  # of torch's pairwise_distance, added to every difference


class TwoStream(Protocol):
    """What the procedure needs of a network."""

    title: str

    def embed_video(self, frames: Tensor) -> Tensor:
        """(T - 4, E) from aligned frames (T, 3, H, W) uint8."""

    def embed_audio(self, cepstra: Tensor) -> Tensor:
        """(K, E) from MFCC (M, 13), one per video frame."""


def shift_distances(video: Tensor, audio: Tensor, *, masked: bool = False) -> Tensor:
    """Mean distance (31,) of windows (n, E) each to sounds (n, E), by shift index j = 0 .. 30.

    Index j compares window i with sound i + j - 15; sounds beyond the clip are zeros, or with
    ``masked`` left out of the mean.
    """
    windows = len(video)
    padded = F.pad(audio[:windows], (0, 0, SHIFT, SHIFT))
    candidates = padded.unfold(0, 2 * SHIFT + 1, 1)  # (n, E, 31)
    distance = (video.unsqueeze(2) - candidates + _EPS).norm(dim=1)  # (n, 31)
    if not masked:
        return distance.mean(0)
    position = torch.arange(windows, device=video.device)[:, None]
    other = position + torch.arange(-SHIFT, SHIFT + 1, device=video.device)
    inside = (other >= 0) & (other < windows)
    return (distance * inside).sum(0) / inside.sum(0)


@torch.no_grad()
def sync_scores(
    network: TwoStream,
    frames: Tensor,
    audio: np.ndarray,
    *,
    fps: float,
    sample_rate: int,
    masked: bool = False,
) -> dict[str, Score]:
    """AV offset (frames at 25/s, positive: sound early), confidence and minimal distance of a clip.

    Args:
        network: ``load_ours`` or ``load_published``, on the device of ``frames``.
        frames: (T, 3, H, W) uint8 RGB, aligned.
        audio: (N,) float in [-1, 1], mono; sample 0 is heard when frame 0 is shown.
        fps, sample_rate: other rates than 25 and 16000 Hz are resampled.

    No value for silent sound or clips under 21 frames (0.84 s). As in the published code a longer
    picture or sound is cut to the other; MetricError if they differ by more than 0.25 s.
    """
    names = ("av_offset", "av_confidence", "av_distance")
    frames = check_frames(frames)
    if len(frames) != 1:
        raise MetricError(f"sync_scores takes one clip, got {len(frames)}")
    if not (fps > 0 and sample_rate >= 1000):
        raise MetricError(f"fps {fps} and sample rate {sample_rate}: expected positive rates")
    audio = np.asarray(audio, np.float32)
    if audio.ndim != 1 or not np.isfinite(audio).all():
        raise MetricError(f"audio: expected finite mono (N,), got shape {audio.shape}")
    seconds = frames.shape[1] / fps, len(audio) / sample_rate
    if abs(seconds[0] - seconds[1]) > MISMATCH:
        raise MetricError(
            f"picture of {seconds[0]:.2f} s and sound of {seconds[1]:.2f} s: expected the same "
            "length; are the rates right?"
        )
    pictures = at_25_fps(frames[0], fps)
    if sample_rate != SAMPLE_RATE:
        audio = soxr.resample(audio, sample_rate, SAMPLE_RATE)
    length = min(len(pictures), len(audio) // STRIDE)
    if length < MIN_FRAMES:
        reason = f"clip of {length} frames, AV sync needs {MIN_FRAMES} ({MIN_FRAMES / FPS} s)"
        return {name: Score(None, reason) for name in names}
    if np.sqrt(np.mean(np.square(audio, dtype=np.float64))) < SILENCE:
        return {name: Score(None, "silent audio") for name in names}

    windows = length - WINDOW  # one less than would fit, as in the published code
    cepstra = mfcc(np.rint(audio * 32768), SAMPLE_RATE)
    video = network.embed_video(pictures[: windows + WINDOW - 1])
    sound = network.embed_audio(torch.from_numpy(cepstra).float().to(frames.device))
    means = shift_distances(video, sound[:windows], masked=masked)
    smallest = means.min()
    values = (SHIFT - means.argmin(), means.median() - smallest, smallest)
    return {name: Score.of(value) for name, value in zip(names, values, strict=True)}


def at_25_fps(frames: Tensor, fps: float) -> Tensor:
    """Frames (T, ...) at 25/s: for each instant the frame shown then."""
    if abs(fps - FPS) < 1e-3:
        return frames
    count = max(1, round(len(frames) * FPS / fps))
    times = (torch.arange(count, dtype=torch.float64) + 0.5) / FPS
    return frames[(times * fps).long().clamp_max(len(frames) - 1).to(frames.device)]
