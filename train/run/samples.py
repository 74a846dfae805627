"""Pictures and videos of what a model makes: real above or beside generated."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from train.data.media import write_video
from train.pictures import write_picture

COLUMNS = 8
GAP = 2


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames (…, 3, H, W) in [−1, 1] → uint8 array of the same shape."""
    return (frames.detach().float().cpu() * 127.5 + 127.5).round().clamp(0, 255).byte().numpy()


def write_grid(path: Path, real: Tensor, generated: Tensor) -> None:
    """Write a PNG: for every clip a row of real frames above a row of generated ones.

    real, generated: (K, T, 3, H, W) in [−1, 1].
    """
    times = np.linspace(0, real.shape[1] - 1, min(COLUMNS, real.shape[1])).round().astype(int)
    rows = []
    for clip in range(real.shape[0]):
        for video in (real, generated):
            frames = to_uint8(video[clip, times])
            rows.append(np.pad(frames, ((0, 0), (0, 0), (0, 0), (0, GAP)), constant_values=255))
            rows[-1] = np.concatenate(list(rows[-1]), axis=2)  # (3, H, 8·(W + gap))
        blank = np.full((3, 3 * GAP, rows[-1].shape[2]), 255, np.uint8)
        rows.append(blank)
    image = np.concatenate(rows, axis=1).transpose(1, 2, 0)
    image = _enlarge(image, real.shape[-2])
    write_picture(path, image)


def write_comparison(
    path: Path, real: Tensor, generated: Tensor, audio: Tensor, fps: float, sample_rate: int
) -> None:
    """Write an MP4 with sound: clip after clip, still | generated | real.

    real, generated: (K, T, 3, H, W) in [−1, 1]; audio: (K, T·s).
    """
    still = real[:, :1].expand_as(real)
    frames = to_uint8(torch.cat([still, generated, real], dim=4)).reshape(
        -1, 3, real.shape[3], 3 * real.shape[4]
    )
    frames = np.stack([_enlarge(f.transpose(1, 2, 0), real.shape[-2]) for f in frames])
    write_video(path, frames, fps, audio.cpu().numpy().reshape(-1), sample_rate)


def _enlarge(image: np.ndarray, height: int) -> np.ndarray:
    """Scale (H, W, 3) so that frames of ``height`` rows become about 256 rows high."""
    scale = max(1, round(256 / height)) if height < 128 else 2
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
