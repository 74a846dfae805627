"""Read and write media files with PyAV: talking-face clips, sound alone, photos, result videos.

Decoding uses one thread: clips are short, and ``train.prepare`` already fills the cores with files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import soxr

from train.errors import UserError

AAC_RATE = 48000  # Hz; the models' rates (16 000, 40 000) are rare or forbidden in AAC
MAX_MISMATCH = 0.5  # seconds by which sound and picture may differ in length
MAX_DAMAGED = 0.05  # share of the frames that may be decoded with errors


class MediaError(UserError):
    """A media file cannot be used; the message names the file and the reason."""


def read_media(
    path: str | os.PathLike[str], sample_rate: int
) -> tuple[np.ndarray, float, np.ndarray]:
    """Decode the first video and the first audio stream of a file.

    Args:
        path: anything FFmpeg reads.
        sample_rate: Hz, the rate the sound is resampled to (soxr, HQ).

    Returns:
        frames (T, H, W, 3) uint8 RGB; fps (average rate); audio (N,) float32 in [-1, 1], the mean
        of the channels. The sound covers exactly the picture: sample 0 is heard when frame 0 is
        shown, whatever the streams' start times, and N = round(T / fps * sample_rate); missing
        sound is silence.

    Raises:
        MediaError: no such file, zero bytes, no video or audio stream, undecodable, truncated.
    """
    with _open(path) as container:
        if not container.streams.video:
            raise MediaError(f"{path}: no video stream")
        if not container.streams.audio:
            raise MediaError(f"{path}: no audio stream")
        video, audio = container.streams.video[0], container.streams.audio[0]
        sound = _Sound()
        frames: list[np.ndarray] = []
        start, damaged = 0.0, 0
        for frame in container.decode(video, audio):
            if isinstance(frame, av.VideoFrame):
                if not frames:
                    start = frame.time or 0.0
                frames.append(frame.to_ndarray(format="rgb24"))
                damaged += frame.is_corrupt
            else:
                sound.add(frame)
        fps = video.average_rate or video.guessed_rate
        declared = video.frames
    if not frames:
        raise MediaError(f"{path}: no picture could be decoded")
    if not fps:
        raise MediaError(f"{path}: the frame rate is unknown")
    if len({frame.shape for frame in frames}) > 1:
        raise MediaError(f"{path}: the picture size changes within the clip")
    if damaged > MAX_DAMAGED * len(frames):
        raise MediaError(f"{path}: damaged, {damaged} of {len(frames)} frames decode with errors")
    seconds = float(len(frames) / fps)
    heard = sound.seconds + sound.start - start
    if len(frames) < declared - 1 or abs(heard - seconds) > MAX_MISMATCH:
        raise MediaError(
            f"{path}: truncated or damaged ({seconds:.2f} s of picture, {heard:.2f} s of sound"
            + (f", {len(frames)} of {declared} frames)" if declared else ")")
        )
    samples = round(seconds * sample_rate)
    return np.stack(frames), float(fps), sound.samples(sample_rate, start, samples)


def read_audio(path: str | os.PathLike[str], sample_rate: int) -> np.ndarray:
    """Decode the first audio stream of a sound or video file to (N,) float32 mono in [-1, 1].

    Raises :class:`MediaError` as :func:`read_media` does.
    """
    with _open(path) as container:
        if not container.streams.audio:
            raise MediaError(f"{path}: no audio stream")
        sound = _Sound()
        for frame in container.decode(container.streams.audio[0]):
            sound.add(frame)
    if not sound.chunks:
        raise MediaError(f"{path}: no sound could be decoded")
    return sound.samples(sample_rate, sound.start)


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a photo as (H, W, 3) uint8 RGB, turned upright by its EXIF orientation."""
    data = np.frombuffer(_existing(path).read_bytes(), dtype=np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise MediaError(f"{path}: not an image OpenCV can read (PNG and JPEG are safe choices)")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


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

    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")
    try:
        with av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
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
        os.replace(temporary, path)
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


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


class _Sound:
    """Decoded audio frames, collected as mono float chunks at the stream's own rate."""

    def __init__(self) -> None:
        self.chunks: list[np.ndarray] = []
        self.rate = 0
        self.start = 0.0
        # To planar float only: swresample's own downmix to mono can exceed [-1, 1].
        self._to_float = av.AudioResampler(format="fltp")

    def add(self, frame: Any) -> None:
        if not self.chunks:
            self.rate, self.start = frame.sample_rate, frame.time or 0.0
        for part in self._to_float.resample(frame):
            self.chunks.append(part.to_ndarray().mean(axis=0, dtype=np.float32))

    @property
    def seconds(self) -> float:
        return sum(map(len, self.chunks)) / self.rate if self.rate else 0.0

    def samples(self, rate: int, start: float, count: int | None = None) -> np.ndarray:
        """The sound from time ``start`` at ``rate`` Hz, padded or cut to ``count`` samples."""
        if not self.chunks:
            return np.zeros(count or 0, dtype=np.float32)
        audio = np.concatenate(self.chunks)
        offset = round((self.start - start) * self.rate)
        audio = np.pad(audio, (offset, 0)) if offset > 0 else audio[-offset:]
        audio = np.clip(soxr.resample(audio, self.rate, rate, "HQ"), -1, 1)
        if count is not None:
            audio = np.pad(audio[:count], (0, max(0, count - len(audio))))
        return audio.astype(np.float32)


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"{path}: " + ("not a file" if path.exists() else "no such file"))
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: zero bytes")
    return path


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with av.open(str(_existing(path)), metadata_errors="ignore") as container:
            for stream in (*container.streams.video, *container.streams.audio):
                stream.codec_context.thread_count = 1
            yield container
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"{path}: cannot be decoded ({error.strerror or error})") from None
