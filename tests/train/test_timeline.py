"""Pictures and sound by their time stamps: a flash and a click, and where they land."""

from fractions import Fraction

import av
import numpy as np
import pytest

from train.data.media import MediaError, load_media, read_audio
from train.data.timeline import ConstantRate, source_rate

RATE = 16000
STORED = 48000  # Hz of the sound in the files
FPS = 25


def write(path, times, event, pieces=None, *, video="libx264", audio="pcm_s16le", tick=1000, **bf):
    """A clip of 64 x 48 that flashes for 0.12 s and clicks at ``event`` seconds.

    ``times`` are those of its pictures, ``pieces`` (start, end) those of its sound, in seconds;
    ``tick`` is the rate in which both are counted. Keywords are options of the encoder.
    """
    times = np.asarray(times, float)
    fmt = "s16" if audio in ("pcm_s16le", "mp2") else "fltp"
    with av.open(str(path), "w") as container:
        rate = 25 if video.startswith("mpeg") else tick
        pictures = container.add_stream(video, rate=rate, options={"bf": "0", **bf})
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        pictures.codec_context.time_base = Fraction(1, rate)
        sound = container.add_stream(audio, rate=STORED, layout="mono")
        for time in times:
            level = 250 if -1e-6 < time - event < 0.12 - 1e-6 else 40
            image = np.full((48, 64, 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time * rate), Fraction(1, rate)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        for start, end in pieces or [(times[0], times[-1] + 1 / FPS)]:
            at = np.arange(round(start * STORED), round(end * STORED)) / STORED
            wave = np.where(np.abs(at - event - 0.002) < 0.002, 0.8, 0.0)
            wave = wave * 32767 if fmt == "s16" else wave
            wave = wave.astype(np.int16 if fmt == "s16" else np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format=fmt, layout="mono")
            frame.sample_rate, frame.time_base = STORED, Fraction(1, STORED)
            frame.pts = round(start * STORED)
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


def measure(media):
    """Seconds at which the flash is first seen and the click is loudest."""
    bright = media.frames.mean(axis=(1, 2, 3)) > 150
    assert bright.any()
    click = np.abs(media.audio).argmax() / RATE - 0.002
    return bright.argmax() / media.fps, click


def assert_lands(path, event, fps=FPS, sound=0.01):
    """Read a clip; its flash is within half a frame of ``event``, the click within ``sound``."""
    media = load_media(path, RATE, fps=fps)
    flash, click = measure(media)
    assert flash == pytest.approx(event, abs=0.5 / media.fps + 0.002)
    assert click == pytest.approx(event, abs=sound)
    assert len(media.audio) == round(len(media.frames) / media.fps * RATE)
    return media


EVEN = np.arange(75) / FPS
UNEVEN = np.r_[np.arange(25) * 0.02, 0.5 + np.arange(50) * 0.05]  # 25 frames/s on average


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("event", [0.3, 0.5, 2.0])
def test_variable_rate(tmp_path, suffix, event):
    audio = "aac" if suffix == "mp4" else "pcm_s16le"
    path = write(tmp_path / f"clip.{suffix}", UNEVEN, event, audio=audio, bf="3")
    for fps in (FPS, None):
        media = assert_lands(path, event, fps, sound=0.01)
        assert media.fps == FPS
        assert abs(len(media.frames) - 75) <= 1
        assert any(remark.startswith("variable frame rate") for remark in media.remarks)


def test_dropped_frames(tmp_path):
    times = np.delete(np.arange(85) / FPS, range(20, 30))
    path = write(tmp_path / "clip.mkv", times, 2.0)
    for fps in (FPS, None):
        media = assert_lands(path, 2.0, fps)
        assert media.frames.shape[0] == 85
        assert media.fps == FPS
        assert "frames missing: 10, from 0.76 s on; the one before was held" in media.remarks


def test_picture_is_held_until_the_end_of_a_hole(tmp_path):
    times = np.delete(EVEN, range(20, 30))
    media = assert_lands(write(tmp_path / "clip.mkv", times, 1.2), 1.2)
    assert not (media.frames[:30].mean(axis=(1, 2, 3)) > 150).any()


def test_hole_in_the_sound(tmp_path):
    path = write(tmp_path / "clip.mkv", EVEN, 2.0, [(0, 1), (1.4, 3)])
    media = assert_lands(path, 2.0)
    assert "hole in the sound: 0.40 s filled with silence, from 1.00 s on" in media.remarks
    click = np.abs(read_audio(path, RATE)).argmax() / RATE
    assert click == pytest.approx(2.002, abs=0.004)


def test_sound_that_is_given_twice(tmp_path):
    media = assert_lands(write(tmp_path / "clip.mkv", EVEN, 2.0, [(0, 1.2), (1.0, 3)]), 2.0)
    assert "sound given twice: 0.20 s left out" in media.remarks


@pytest.mark.parametrize("kind", ["mkv", "mp4", "ts", "mpg"])
@pytest.mark.parametrize(("video_start", "audio_start"), [(0, 0.4), (0.4, 0), (0.2, 0.6)])
def test_late_starts(tmp_path, kind, video_start, audio_start):
    codecs = {
        "mkv": {},
        "mp4": {"audio": "aac"},
        "ts": {"audio": "mp2", "video": "mpeg2video"},
        "mpg": {"audio": "mp2", "video": "mpeg1video"},
    }[kind]
    times = np.arange(round(video_start * FPS), 75) / FPS
    pieces = [(audio_start, 3)]
    path = write(tmp_path / f"clip.{kind}", times, 2.0, pieces, tick=FPS, **codecs)
    media = assert_lands(path, 2.0 - video_start, sound=0.015)
    assert abs(len(media.frames) - len(times)) <= (kind == "mpg")  # its muxer leaves a gap
    late = [remark for remark in media.remarks if remark.startswith("sound starts late")]
    assert bool(late) == (audio_start > video_start)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "h264.avi", "ts", "mpg"])
def test_reordered_frames(tmp_path, kind):
    codecs = {
        "mp4": {"audio": "aac", "b-adapt": "0"},
        "mkv": {"b-adapt": "0"},
        "avi": {"video": "mpeg4"},
        "h264.avi": {"b-adapt": "0"},
        "ts": {"audio": "mp2", "video": "mpeg2video"},
        "mpg": {"audio": "mp2", "video": "mpeg1video"},
    }[kind]
    path = write(tmp_path / f"clip.{kind}", EVEN, 1.2, tick=FPS, bf="2", **codecs)
    media = assert_lands(path, 1.2, sound=0.015)
    assert len(media.frames) == 75
    assert media.remarks == ()


@pytest.mark.parametrize("bf", ["0", "3"])
def test_edit_list(tmp_path, bf):
    whole = write(tmp_path / "whole.mp4", EVEN, 2.0, audio="aac", tick=FPS, bf=bf, g="250")
    trimmed, cut = tmp_path / "trimmed.mp4", Fraction(4, 5)
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(whole)) as source, av.open(str(trimmed), "w", options=options) as target:
        streams = {stream: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is None:
                continue
            shift = int(cut / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            if packet.stream.type == "video" or packet.pts >= 0:
                packet.stream = streams[packet.stream]
                target.mux(packet)
    media = assert_lands(trimmed, 1.2, sound=0.015)
    assert abs(len(media.frames) - 55) <= 1


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("rate", [(24, 1), (30000, 1001), (30, 1), (50, 1), (60, 1)])
def test_other_rates_are_resampled(tmp_path, rate, suffix):
    rate = Fraction(*rate)
    times = np.arange(round(3 * rate)) / float(rate)
    event = float(times[round(2 * rate)])
    audio = "aac" if suffix == "mp4" else "pcm_s16le"
    path = write(tmp_path / f"clip.{suffix}", times, event, [(0, 3)], tick=90000, audio=audio)
    media = assert_lands(path, event)
    assert len(media.frames) == 75
    assert media.remarks == (f"resampled: from {float(rate):.5g} frames/s to 25",)
    assert load_media(path, RATE).fps == pytest.approx(float(rate), rel=1e-3)


@pytest.mark.parametrize("source", [24, 25, 30000 / 1001, 30, 50, 60, 120])
@pytest.mark.parametrize("target", [24, 25, 30])
def test_no_picture_is_off_by_more_than_half_a_frame(source, target):
    times = 5 + np.round(np.arange(200) / source, 3)  # rounded to milliseconds
    clock = ConstantRate(target)
    shown = [picture for time in times for picture in clock.push(time, time)]
    shown += clock.finish(1 / source)
    assert len(shown) == clock.count == round((times[-1] - 5 + 1 / source) * target)
    off = np.array(shown) - 5 - np.arange(len(shown)) / target
    assert off.max() <= 0.5 / target + 0.001  # early
    assert -off.min() <= max(0.5 / source, 1 / source - 0.5 / target) + 0.001  # still on show
    if source == target:
        assert shown == list(times)


@pytest.mark.parametrize(
    ("times", "hints", "expected"),
    [
        (np.round(np.arange(90) / 30, 3), [], (30, True)),
        (np.round(np.arange(300) * 1001 / 30000, 3), [], (30000 / 1001, True)),
        (np.delete(np.arange(80) / 25, range(30, 40)), [22.0], (25, True)),
        (np.arange(30) / 7, [7.0], (7, True)),
        (UNEVEN, [25.0], (25, False)),
        (np.array([0.0, 0.1, 0.7, 0.9, 1.7, 1.8]), [], (pytest.approx(6 / 2), False)),
    ],
)
def test_rate_of_time_stamps(times, hints, expected):
    assert source_rate(times, hints) == expected


def test_backward_time_stamps_are_refused(tmp_path):
    first = write(
        tmp_path / "one.ts", EVEN, 1.0, [(0, 3)], tick=FPS, audio="mp2", video="mpeg2video"
    )
    path = tmp_path / "joined.ts"
    path.write_bytes(2 * first.read_bytes())
    with pytest.raises(MediaError, match=r"joined\.ts.*(go|run) backwards"):
        load_media(path, RATE)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "ts"])
def test_damage_is_named_or_read_as_far_as_it_goes(tmp_path, kind):
    codecs = {"mp4": {"audio": "aac"}, "avi": {"video": "mpeg4"}, "mkv": {}}
    codecs["ts"] = {"audio": "mp2", "video": "mpeg2video"}
    path = write(tmp_path / f"clip.{kind}", EVEN[:20], 0.4, tick=FPS, bf="2", **codecs[kind])
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for attempt in range(25):
        damaged = whole.copy()
        within = len(whole) if attempt % 2 else min(3000, len(whole))
        places = rng.integers(0, within, 5)
        damaged[places] = rng.integers(0, 256, 5)
        path.write_bytes(damaged[: rng.integers(1, len(whole)) if attempt % 5 == 0 else None])
        media, reason = None, ""
        try:
            media = load_media(path, RATE, fps=FPS)
        except MediaError as error:
            reason = str(error)
        if media is None:
            assert reason.startswith(str(path))
            continue
        assert len(media.audio) == round(len(media.frames) / FPS * RATE)
        assert np.isfinite(media.audio).all()


def test_missing_rate_is_refused(tmp_path):
    path = write(tmp_path / "clip.mkv", EVEN, 1.0)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps must be a positive number"):
            load_media(path, RATE, fps=fps)
