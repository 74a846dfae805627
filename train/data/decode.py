"""Decode a clip: its pictures at a constant rate, its sound under them, and remarks on both.

Decoding uses one thread: clips are short, and ``train.prepare`` already fills the cores with files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, TypeVar

import av
import numpy as np

from train.data.frames import Frames, FramesInPieces
from train.data.limits import Limits, MediaError
from train.data.picture import Pictures
from train.data.sound import NOTICED, Sound
from train.data.timeline import ConstantRate, source_rate, timing_remarks

# Before 17, PyAV turned BT.709 pictures to RGB with the matrix of BT.601: faces were too red.
OLDEST_AV = 17
_AV = int(av.__version__.split(".")[0])
if _AV < OLDEST_AV:
    raise ImportError(
        f"PyAV {av.__version__} gives wrong colours; install a newer one: "
        f"pip install 'av>={OLDEST_AV}'"
    )

# PyAV 19 opens a file whose tags are not UTF-8; older ones fail at it unless told not to.
_TAGS: dict[str, Any] = {"metadata_errors": "ignore"} if _AV < 19 else {}

MAX_MISMATCH = 0.5  # seconds by which sound and picture may differ in length
MAX_DAMAGED = 0.05  # share of the frames with errors, without a time stamp, or out of order
DEMUXERS = {  # what files with these suffixes are expected to be, by FFmpeg's names
    ".mpg": {"mpeg", "mpegvideo", "mpegts"},
    ".mpeg": {"mpeg", "mpegvideo", "mpegts"},
    ".mp4": {"mp4"},
    ".m4v": {"mp4"},
    ".mov": {"mov"},
    ".avi": {"avi"},
    ".mkv": {"matroska"},
    ".webm": {"webm"},
    ".flv": {"flv"},
}


T = TypeVar("T")


@dataclass(frozen=True)
class Media:
    """A talking-face clip as a player shows it; sample 0 is heard when frame 0 is shown."""

    frames: np.ndarray  # (T, H, W, 3) uint8 RGB, frame i shown from i / fps on
    fps: float
    audio: np.ndarray  # (N,) float32 in [-1, 1], N = round(T / fps * sample rate)
    source_fps: float  # the file's own rate, the average if it varies
    remarks: tuple[str, ...]  # "kind: details", what was done to the file or is odd about it


@dataclass(frozen=True)
class Pieces(Generic[T]):
    """A talking-face clip as ``Media``, whose pictures were handed on in pieces."""

    items: list[tuple[int, int, T]]  # (first frame, number of frames, what ``work`` made of them)
    frames: int  # of the whole clip
    fps: float
    audio: np.ndarray  # (N,) float32 in [-1, 1], of the whole clip
    source_fps: float
    remarks: tuple[str, ...]


def load_media(
    path: str | os.PathLike[str],
    sample_rate: int,
    *,
    fps: float | None = None,
    limits: Limits | None = None,
    need_sound: bool = True,
) -> Media:
    """Decode the first video and the first audio stream of a file, by their time stamps.

    Frame i is the picture on show i / fps seconds after the first picture (see
    ``timeline.ConstantRate``: never early by more than half a frame), and the sound is laid under
    it by the stamps of its packets: late starts and holes are silent, sound before the first
    picture is left out. Edit lists, rotation, mirroring, pixel aspect and colours are those that
    players show.

    Args:
        path: anything FFmpeg reads.
        sample_rate: Hz, the rate the sound is resampled to (soxr, HQ).
        fps: frames per second of the result; the file's own rate if not given, and the average
            of a variable one.
        limits: what may be decoded; the defaults of ``Limits`` if not given.
        need_sound: whether a file without sound is refused; otherwise its ``audio`` is empty.

    Raises:
        MediaError: no such file, zero bytes, no video or audio stream, undecodable, truncated,
            over a limit, or time stamps that are missing or run backwards.
        ValueError: ``fps`` is not a positive number.
    """
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"fps must be a positive number, got {fps}")
    limits, frames = limits or Limits(), Frames()
    with errors_of(path):
        survey = _survey(path, limits, fps, need_sound)
        audio, rate, remarks = _decode(path, sample_rate, survey, limits, frames)
    return Media(frames.array(), survey.fps, audio, rate, remarks)


def load_pieces(
    path: str | os.PathLike[str],
    sample_rate: int,
    work: Callable[[np.ndarray], T],
    *,
    fps: float,
    length: int,
    least: int = 1,
    sound: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
) -> Pieces[T]:
    """Decode a clip as ``load_media`` does, but hold only ``length`` of its pictures at a time.

    Args:
        path, sample_rate, fps, limits: as for ``load_media``; the limit on bytes is on a piece.
        work: takes the pictures of each piece, (T, H, W, 3) uint8 RGB, as soon as they are there.
        length: T, frames of every piece but the last.
        least: frames that a last piece needs to be handed on.
        sound: a file with the sound, taken if the clip itself has none: it begins with the first
            picture.

    Raises:
        MediaError: as ``load_media``; a clip may turn out to be damaged after pieces of it were
            handed on. ``work`` may raise what it likes.
    """
    limits, frames = limits or Limits(), FramesInPieces(work, length)
    with errors_of(path):
        survey = _survey(path, limits, fps, sound is None, length)
        audio, rate, remarks = _decode(path, sample_rate, survey, limits, frames, sound)
    frames.finish(least)
    return Pieces(frames.items, frames.count, survey.fps, audio, rate, remarks)


@dataclass(frozen=True)
class _Survey:
    """What a file's packets say before anything is decoded."""

    fps: float  # to resample to
    hints: tuple[float, ...]  # rates that the file claims
    by_pts: bool  # whether pictures have presentation times, or decoding times only
    first_dts: int | None


def _survey(
    path: str | os.PathLike[str],
    limits: Limits,
    fps: float | None,
    need_sound: bool,
    held: float = float("inf"),
) -> _Survey:
    """Read all video packets without decoding them; refuse what will break a limit.

    ``held`` is the number of pictures that are held in memory at most.
    """
    with open_media(path, limits) as container:
        video, audio = _streams(container)
        if need_sound and audio is None:
            raise MediaError(_no_stream("audio", container))
        context = video.codec_context
        width, height = Pictures(video, limits).size(context.width, context.height)
        packets = [(packet.pts, packet.dts) for packet in container.demux(video) if packet.size]
        hints = _hints(video)
        base = video.time_base
        guessed = container.format.name == "avi"  # which has no presentation times at all
    stamped = sum(pts is not None for pts, _ in packets)
    by_pts = 2 * stamped > len(packets) and not guessed
    stamps = [pts if by_pts else dts for pts, dts in packets]
    times = np.unique([float(stamp * base) for stamp in stamps if stamp is not None])
    if fps is None and len(times) > 1:
        fps = source_rate(times, hints)[0]
    fps = fps or (hints[0] if hints else 0)
    if not fps:
        raise MediaError("the frame rate is unknown")
    if len(times):
        limits.check_seconds(times[-1] - times[0])
        limits.check_bytes(min(held, (times[-1] - times[0]) * fps) * height * width * 3)
    decoding = [dts for _, dts in packets if dts is not None]
    return _Survey(fps, hints, by_pts, min(decoding, default=None))


class _Stamps:
    """The times of the pictures, mended where single stamps are missing or run backwards."""

    def __init__(self, survey: _Survey, base: Fraction) -> None:
        self.times: list[float] = []  # seconds of the file's clock, ascending
        self.last = 0.0  # how long the last picture says that it is shown
        self._by_pts, self._first_dts, self._base = survey.by_pts, survey.first_dts, base
        self._step = 1 / (survey.hints[0] if survey.hints else survey.fps)
        self._delay: int | None = None  # of the decoder, in ticks
        self._missing = self._backward = self._damaged = 0

    def take(self, frame: Any) -> float | None:
        """Give the time of the next picture; None if it is to be left out."""
        stamp = frame.pts if self._by_pts else frame.dts
        self._damaged += frame.is_corrupt
        if stamp is None:
            # The decoder gives its last frames without the packets that had decoding times.
            self._missing += self._by_pts or self._delay is None
            time = self.times[-1] + self._step if self.times else 0.0
        else:
            if self._delay is None:
                # AVI has decoding times only: with B-frames they are those of a later packet.
                self._delay = 0 if self._by_pts else stamp - (self._first_dts or 0)
            time = float((stamp - self._delay) * self._base)
        if self.times and time <= self.times[-1]:
            self._backward += 1
            return None
        self.times.append(time)
        self.last = float((frame.duration or 0) * self._base)
        return time

    @property
    def typical(self) -> float:
        """Seconds from one picture to the next, the median."""
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else self._step

    def finish(self) -> float:
        """Give the seconds that the last picture is shown; ``MediaError`` if too much is wrong."""
        if not self.times:
            raise MediaError("no picture could be decoded")
        total = len(self.times) + self._backward
        for count, what in (
            (self._damaged, "decode with errors"),
            (self._missing, "have no time stamp"),
            (self._backward, "have time stamps that run backwards (joined without re-encoding?)"),
        ):
            if count > MAX_DAMAGED * total:
                raise MediaError(f"damaged, {count} of {total} frames {what}")
        return self.last if self.last > self.typical / 2 else self.typical

    def remarks(self, survey: _Survey) -> tuple[float, list[str]]:
        """Give the file's own rate and what was done to its time stamps."""
        remarks = []
        for count, what in (
            (self._damaged, "damaged: {} frames decode with errors"),
            (self._missing, "no time stamp: {} frames, put after the ones before"),
            (self._backward, "out of order: {} frames left out, their time stamps run backwards"),
        ):
            if count:
                remarks.append(what.format(count))
        if len(self.times) < 2:
            return survey.fps, remarks
        times = np.array(self.times)
        rate, constant = source_rate(times, survey.hints)
        return rate, remarks + list(timing_remarks(times, rate, constant, survey.fps))


def _decode(
    path: str | os.PathLike[str],
    sample_rate: int,
    survey: _Survey,
    limits: Limits,
    frames: Frames,
    beside: str | os.PathLike[str] | None = None,
) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Fill ``frames``; give the sound, the file's own rate and remarks.

    ``beside`` is the file whose sound is taken if the clip has none.
    """
    with open_media(path, limits) as container:
        video, audio = _streams(container)
        pictures, sound = Pictures(video, limits), Sound()
        stamps = _Stamps(survey, video.time_base)
        clock: ConstantRate[Any] = ConstantRate(survey.fps)

        def keep(shown: Iterator[Any]) -> None:
            for frame in shown:
                frames.append(pictures.convert(frame))
                limits.check_bytes(frames.nbytes + sound.nbytes)

        for frame in container.decode(*(stream for stream in (video, audio) if stream)):
            if isinstance(frame, av.VideoFrame):
                time = stamps.take(frame)
                if time is not None:
                    limits.check_seconds(time - stamps.times[0])
                    keep(clock.push(time, frame))
            else:
                sound.add(frame)
                limits.check_bytes(frames.nbytes + sound.nbytes)
                limits.check_seconds(sound.end - sound.start)
        last = stamps.finish()
        keep(clock.finish(last))
        declared, header = _declared_end(video), _header_end(container)
        remarks = _format_remarks(path, container)
    start, end = stamps.times[0], stamps.times[-1] + last
    seconds = frames.count / survey.fps
    missing = 0.0 if declared is None else declared - end
    lost = 0.0 if header is None else header - max(end, sound.end)
    hears = start
    if beside is not None and audio is None:
        sound = read_sound(beside, limits)
        hears = sound.start
        remarks.append(f"sound beside the video: from {Path(beside).name}")
    silent = audio is None and beside is None
    uneven = not silent and abs(sound.end - hears - (end - start)) > MAX_MISMATCH
    if missing > 1.5 * stamps.typical or lost > MAX_MISMATCH or uneven:
        raise MediaError(
            f"truncated or damaged ({end - start:.2f} s of picture, "
            f"{max(0.0, sound.end - hears):.2f} s of sound"
            + (f", {max(missing, lost):.2f} s missing)" if max(missing, lost) > 0 else ")")
        )
    if lost > NOTICED:
        remarks.append(f"cut off: its header speaks of {lost:.2f} s more")
    rate, timing = stamps.remarks(survey)
    wave, hearing = np.zeros(0, np.float32), ["no sound: the file has no audio stream"]
    if not silent:
        wave, hearing = sound.samples(sample_rate, hears, round(seconds * sample_rate))
    remarks += timing + pictures.finish() + hearing
    return wave, rate, tuple(remarks)


def read_sound(path: str | os.PathLike[str], limits: Limits) -> Sound:
    """Decode the first audio stream of a file; ``MediaError`` if it has none."""
    sound = Sound()
    with errors_of(path):
        with open_media(path, limits) as container:
            streams = decodable(container, "audio")
            if not streams:
                raise MediaError("no audio stream to decode")
            for frame in container.decode(streams[0]):
                sound.add(frame)
                limits.check_bytes(sound.nbytes)
                limits.check_seconds(sound.end - sound.start)
        if not sound.rate:
            raise MediaError("no sound could be decoded")
    return sound


def _hints(video: Any) -> tuple[float, ...]:
    rates = (video.average_rate, video.guessed_rate, video.base_rate)
    return tuple(float(rate) for rate in rates if rate)


def _declared_end(video: Any) -> float | None:
    """When the video should end by the index of containers that have one (MP4, AVI)."""
    if not video.frames or video.duration is None:
        return None
    return float(((video.start_time or 0) + video.duration) * video.time_base)


def _header_end(container: Any) -> float | None:
    """When a file should end by its header, of containers that are written as they come."""
    if not container.duration or not {"flv", "matroska"} & set(container.format.name.split(",")):
        return None
    return float(container.duration / av.time_base)


def _streams(container: Any) -> tuple[Any, Any | None]:
    """The first video stream that is no cover picture, and the first audio stream if any."""
    cover = av.stream.Disposition.attached_pic
    videos = [stream for stream in decodable(container, "video") if not stream.disposition & cover]
    if not videos:
        raise MediaError(_no_stream("video", container))
    return videos[0], next(iter(decodable(container, "audio")), None)


def _no_stream(what: str, container: Any) -> str:
    return f"no {what} stream to decode (it is a file of the kind {container.format.name})"


def decodable(container: Any, kind: str) -> list[Any]:
    """The streams of one ``kind``, "video" or "audio", whose codec FFmpeg knows."""
    return [stream for stream in container.streams if stream.type == kind and stream.codec_context]


def _format_remarks(path: str | os.PathLike[str], container: Any) -> list[str]:
    suffix, kind = Path(path).suffix.lower(), container.format.name
    if suffix in DEMUXERS and not DEMUXERS[suffix] & set(kind.split(",")):
        return [f"wrong extension: {suffix}, but it is a file of the kind {kind}"]
    return []


def existing(path: str | os.PathLike[str]) -> Path:
    """Give ``path``; ``MediaError`` if it is no file or an empty one."""
    path = Path(path)
    if not path.is_file():
        raise MediaError("not a file" if path.exists() else "no such file")
    if path.stat().st_size == 0:
        raise MediaError("zero bytes")
    return path


@contextmanager
def errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name before what is wrong with it."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"{path}: cannot be decoded ({error.strerror or error})") from None
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from None


@contextmanager
def open_media(path: str | os.PathLike[str], limits: Limits) -> Iterator[Any]:
    """Open a file with decoders of one thread that refuse pictures above the limit."""
    with av.open(str(existing(path)), **_TAGS) as container:
        for stream in decodable(container, "audio"):
            stream.codec_context.thread_count = 1
        for stream in decodable(container, "video"):
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(limits.pixels)}
        yield container
