"""Read and write media files with PyAV: talking-face clips, sound alone, photos, result videos."""

from __future__ import annotations

import os

import av
import numpy as np
import soxr

from train.data.decode import Media, load_media, open_media
from train.data.limits import Limits, MediaError
from train.data.photo import Photo, load_photo, read_image
from train.data.recording import Recording
from train.data.video import AAC_RATE, open_video

__all__ = [
    "Limits",
    "Media",
    "MediaError",
    "Photo",
    "Recording",
    "load_media",
    "load_photo",
    "read_audio",
    "read_image",
    "read_media",
    "stated_seconds",
    "write_video",
]


def read_media(
    path: str | os.PathLike[str],
    sample_rate: int,
    *,
    fps: float | None = None,
    limits: Limits | None = None,
) -> tuple[np.ndarray, float, np.ndarray]:
    """Give frames, fps and audio of ``load_media``, without its remarks."""
    media = load_media(path, sample_rate, fps=fps, limits=limits)
    return media.frames, media.fps, media.audio


def stated_seconds(path: str | os.PathLike[str]) -> float | None:
    """Length of a media file by its header; None if it has none or cannot be opened."""
    try:
        with open_media(path, Limits()) as container:
            return container.duration / av.time_base if container.duration else None
    except (OSError, av.FFmpegError, MediaError):
        return None


def read_audio(
    path: str | os.PathLike[str], sample_rate: int, *, limits: Limits | None = None
) -> np.ndarray:
    """Decode the first audio stream of a sound or video file to (N,) float32 mono in [-1, 1].

    Holes between its packets are silent. Raises ``MediaError`` as ``load_media`` does.
    """
    return np.concatenate([*Recording(path, limits).pieces(sample_rate)])


def write_video(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    fps: float,
    audio: np.ndarray | None = None,
    sample_rate: int | None = None,
) -> None:
    """Write an MP4 that browsers, phones and players show: H.264 yuv420p, AAC, index first.

    Args:
        path: the .mp4 to write; it appears complete or not at all.
        frames: (T, 3, H, W) or (T, H, W, 3) uint8 RGB. Odd sizes are padded by one edge pixel.
        fps: frames per second.
        audio: (N,) float in [-1, 1], mono; resampled to 48 kHz.
        sample_rate: Hz, needed with ``audio``.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[3]) or not len(frames):
        raise ValueError(f"frames must be (T, 3, H, W) or (T, H, W, 3), got {frames.shape}")
    if frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 in 0..255, got {frames.dtype}")
    if (audio is None) != (sample_rate is None):
        raise ValueError("audio and sample_rate go together: give both or neither")
    if frames.shape[3] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    height, width = frames.shape[1:3]
    with open_video(path, height, width, fps, sound=audio is not None) as video:
        video.show(frames)
        if audio is not None and sample_rate is not None:
            video.hear(soxr.resample(np.asarray(audio, np.float32), sample_rate, AAC_RATE))
