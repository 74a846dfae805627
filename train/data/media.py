"""Read and write media files with PyAV: talking-face clips, sound alone, photos, result videos."""

from __future__ import annotations

import os
import re
import warnings
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
import soxr
from PIL import Image

from train.data.decode import Media, errors_of, existing, load_media, open_media, read_sound
from train.data.limits import Limits, MediaError
from train.files import replacing

__all__ = [
    "Limits",
    "Media",
    "MediaError",
    "load_media",
    "read_audio",
    "read_image",
    "read_media",
    "stated_seconds",
    "write_video",
]

AAC_RATE = 48000  # Hz; the models' rates (16 000, 40 000) are rare or forbidden in AAC


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
    sound = read_sound(path, limits or Limits())
    return sound.samples(sample_rate, sound.start)[0]


def read_image(path: str | os.PathLike[str], *, limits: Limits | None = None) -> np.ndarray:
    """Read a photo as (H, W, 3) uint8 RGB, turned upright by its EXIF orientation.

    Its size is taken from its header and checked before it is decoded.
    """
    limits = limits or Limits()
    with errors_of(path):
        data = existing(path).read_bytes()
        limits.check_picture(*_header_size(path))
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise MediaError("not an image OpenCV can read (PNG and JPEG are safe choices)")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _header_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of a photo by its header; none of its pixels are decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.size
    except Image.DecompressionBombError as error:
        # Pillow does not give the size, only a sentence that starts with the number of pixels.
        pixels = re.search(r"\d+", str(error))
        return (int(pixels[0]) if pixels else 2**63), 1
    except (OSError, ValueError, SyntaxError):
        raise MediaError("not an image OpenCV can read (PNG and JPEG are safe choices)") from None


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
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    options = {"movflags": "+faststart"}
    try:
        with (
            replacing(path) as temporary,
            av.open(str(temporary), "w", format="mp4", options=options) as container,
        ):
            video = _video_stream(container, frames.shape[2], frames.shape[1], fps)
            sound = (
                container.add_stream("aac", rate=AAC_RATE, layout="mono") if sample_rate else None
            )
            for image in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
            if sound is not None and audio is not None and sample_rate is not None:
                sound.bit_rate = 128_000
                wave = soxr.resample(np.asarray(audio, np.float32), sample_rate, AAC_RATE)
                wave = np.clip(wave, -1, 1).astype(np.float32)[None]
                heard = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
                heard.sample_rate, heard.pts = AAC_RATE, 0
                container.mux(sound.encode(heard))
                container.mux(sound.encode(None))
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"cannot write {path}: {error.strerror or error}") from None


def _video_stream(container: Any, width: int, height: int, fps: float) -> Any:
    # No B-frames: they start the picture late by an edit list, which some players ignore, and
    # lip movement would then lag.
    stream = container.add_stream(
        "libx264",
        rate=Fraction(fps).limit_denominator(1001),
        options={"crf": "16", "preset": "medium", "bf": "0"},
    )
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.thread_count = 1
    # swscale converts with BT.601; say so, or players guess by the picture's height.
    context.colorspace, context.color_primaries, context.color_trc = 6, 6, 6
    context.color_range = 1
    return stream
