"""Write an MP4 picture by picture, so that its length costs no memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
import numpy as np

from train.data.limits import MediaError
from train.files import replacing

AAC_RATE = 48000  # Hz; the models' rates (16 000, 40 000) are rare or forbidden in AAC


class VideoWriter:
    """Takes pictures and sound as they are made; both should keep pace. See ``open_video``."""

    def __init__(self, container: Any, height: int, width: int, fps: float, sound: bool) -> None:
        self._container = container
        self._pad = (height % 2, width % 2)  # yuv420p has no odd sizes
        self._video = _video_stream(container, width + width % 2, height + height % 2, fps)
        self._sound = container.add_stream("aac", rate=AAC_RATE, layout="mono") if sound else None
        if self._sound is not None:
            self._sound.bit_rate = 128_000
        self._heard = 0  # samples

    def show(self, frames: np.ndarray) -> None:
        """Append pictures (T, H, W, 3) uint8 RGB."""
        if any(self._pad):
            frames = np.pad(frames, ((0, 0), *((0, by) for by in self._pad), (0, 0)), mode="edge")
        for image in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            self._container.mux(self._video.encode(picture))

    def hear(self, wave: np.ndarray) -> None:
        """Append sound (N,) float in [-1, 1], mono, at ``AAC_RATE``."""
        if self._sound is None or not len(wave):
            return
        wave = np.clip(wave, -1, 1).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = AAC_RATE, self._heard
        self._heard += wave.shape[1]
        self._container.mux(self._sound.encode(frame))

    def finish(self) -> None:
        """Write what the encoders still hold."""
        self._container.mux(self._video.encode(None))
        if self._sound is not None:
            self._container.mux(self._sound.encode(None))


@contextmanager
def open_video(
    path: str | os.PathLike[str], height: int, width: int, fps: float, *, sound: bool
) -> Iterator[VideoWriter]:
    """Give a writer of an MP4 that browsers, phones and players show.

    H.264 yuv420p and AAC, index first; odd sizes are padded by one edge pixel. The file appears
    complete when the block ends, or not at all. Raises ``MediaError`` if it cannot be written.
    """
    try:
        with (
            replacing(path) as temporary,
            av.open(
                str(temporary), "w", format="mp4", options={"movflags": "+faststart"}
            ) as container,
        ):
            writer = VideoWriter(container, height, width, fps, sound)
            yield writer
            writer.finish()
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
