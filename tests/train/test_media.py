"""Reading and writing media files, and face alignment, on made files and on real clips of GRID."""

import os
import wave
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from train.data import align
from train.data.align import EYES, NoFace, align_frames, align_image, locate_eyes, warp
from train.data.decode import load_pieces
from train.data.media import (
    Limits,
    MediaError,
    load_media,
    read_audio,
    read_image,
    read_media,
    write_video,
)

RATE = 16000
GRID = Path(
    os.environ.get("POLYFUSION_GRID") or Path(__file__).parents[3] / "shared" / "grid-speakers"
)
needs_grid = pytest.mark.skipif(not GRID.is_dir(), reason=f"no GRID clips at {GRID}")


def moving_frames(count=12, height=48, width=64):
    y, x = np.mgrid[:height, :width]
    t = np.arange(count)[:, None, None]
    waves = [128 + 100 * np.sin((x + 2 * t) / 9 + c) * np.cos((y + t) / 11) for c in range(3)]
    return np.stack(waves, axis=-1).round().astype(np.uint8)


def chirp(seconds, rate=RATE):
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 * t + 300 * t**2))).astype(np.float32)


def write_streams(path, video_start=None, audio_start=None, seconds=1.0, event=0.4, rate=RATE):
    """A Matroska file whose picture flashes and whose sound clicks at the time ``event``.

    Streams start at the given times (in seconds); None leaves a stream out.
    """
    with av.open(str(path), "w", format="matroska") as container:
        if video_start is not None:
            video = container.add_stream("mpeg4", rate=25)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        if audio_start is not None:
            audio = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        if video_start is not None:
            for i in range(round(video_start * 25), round(seconds * 25)):
                image = np.full((48, 64, 3), 255 if i == round(event * 25) else 16, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 25)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if audio_start is not None:
            pcm = np.zeros(round(seconds * rate), np.int16)
            pcm[round(event * rate)] = 30000
            pcm = pcm[round(audio_start * rate) :]
            frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, round(audio_start * rate)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


@needs_grid
def test_reads_a_grid_clip():
    frames, fps, audio = read_media(GRID / "s1" / "bbir6n.mpg", RATE)
    assert frames.shape == (75, 288, 360, 3)
    assert frames.dtype == np.uint8
    assert fps == 25
    assert audio.shape == (48000,)
    assert audio.dtype == np.float32
    assert 0.02 < audio.std() < 0.3
    assert np.abs(audio).max() <= 1
    corner = frames[:, :40, :40].mean(axis=(0, 1, 2))
    assert corner[2] > corner[0] + 30  # the wall is blue, so channels are in the order RGB


@pytest.mark.parametrize(("video_start", "audio_start"), [(0, 0), (0, 0.2), (0.2, 0), (0.12, 0.2)])
def test_picture_and_sound_keep_their_timing(tmp_path, video_start, audio_start):
    path = write_streams(tmp_path / "clip.mkv", video_start, audio_start)
    frames, fps, audio = read_media(path, RATE)
    flash = frames.mean(axis=(1, 2, 3)).argmax() / fps
    assert flash == pytest.approx(0.4 - video_start)
    assert np.abs(audio).argmax() / RATE == pytest.approx(flash, abs=0.001)  # Matroska counts ms
    assert len(audio) == round(len(frames) / fps * RATE)


def test_tags_that_are_no_text_do_no_harm(tmp_path):
    path = write_streams(tmp_path / "clip.mkv", 0, 0)
    written = path.read_bytes()
    assert b"Lavf" in written  # a tag that the muxer writes
    path.write_bytes(written.replace(b"Lavf", b"\xff\xfe\xff\xfe"))
    assert len(read_media(path, RATE)[0]) == 25


def test_pieces_are_the_whole_and_need_less_memory(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, moving_frames(25), 25, chirp(1.0), RATE)
    whole = load_media(path, RATE)
    limits = Limits(decoded_bytes=12 * whole.frames[0].nbytes + 4 * 50000)
    with pytest.raises(MediaError, match="decodes to"):
        load_media(path, RATE, limits=limits)
    for least, spans in ((3, [(0, 10), (10, 10), (20, 5)]), (6, [(0, 10), (10, 10)])):
        pieces = load_pieces(path, RATE, np.copy, fps=25, length=10, least=least, limits=limits)
        assert [(first, count) for first, count, _ in pieces.items] == spans
        assert pieces.frames == 25
        joined = np.concatenate([frames for *_, frames in pieces.items])
        np.testing.assert_array_equal(joined, whole.frames[: len(joined)])
        np.testing.assert_array_equal(pieces.audio, whole.audio)


def test_sound_beside_a_video_without_one(tmp_path):
    path, beside = write_streams(tmp_path / "clip.mkv", 0), tmp_path / "clip.mka"
    write_streams(beside, None, 0)
    with pytest.raises(MediaError, match="no audio stream"):
        load_pieces(path, RATE, len, fps=25, length=99)
    pieces = load_pieces(path, RATE, np.copy, fps=25, length=99, sound=beside)
    assert pieces.remarks == ("sound beside the video: from clip.mka",)
    assert np.abs(pieces.audio).argmax() / RATE == pytest.approx(0.4, abs=0.001)
    assert pieces.items[0][2].mean(axis=(1, 2, 3)).argmax() == 10
    assert len(pieces.audio) == RATE
    write_streams(beside, None, 0, seconds=0.45)
    with pytest.raises(MediaError, match=r"1\.00 s of picture, 0\.45 s of sound"):
        load_pieces(path, RATE, len, fps=25, length=99, sound=beside)
    beside.write_bytes(b"no sound")
    with pytest.raises(MediaError, match=r"clip\.mka: cannot be decoded"):
        load_pieces(path, RATE, len, fps=25, length=99, sound=beside)


@pytest.mark.parametrize(
    ("share", "said"), [(0.9, "cut off: its header speaks of 0."), (0.5, None)]
)
def test_end_of_a_file_that_its_header_promises(tmp_path, share, said):
    path = tmp_path / "clip.mkv"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for i in range(75):
            image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            pcm = rng.integers(-9999, 9999, (1, RATE // 25), dtype=np.int16)
            frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, i * RATE // 25
            container.mux(audio.encode(frame))
        container.mux(video.encode(None))
    assert not any("cut off" in remark for remark in load_media(path, RATE).remarks)
    path.write_bytes(path.read_bytes()[: round(share * path.stat().st_size)])
    if said:
        assert any(remark.startswith(said) for remark in load_media(path, RATE).remarks)
    else:
        with pytest.raises(MediaError, match=r"truncated or damaged .* s missing\)"):
            load_media(path, RATE)


def test_sound_is_averaged_over_channels_and_resampled(tmp_path):
    path = tmp_path / "tone.wav"
    t = np.arange(44100) / 44100
    left = 0.8 * np.sin(2 * np.pi * 440 * t)
    pcm = np.stack([left, 0.5 * left], axis=1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes((pcm * 32767).round().astype("<i2").tobytes())
    audio = read_audio(path, RATE)
    expected = 0.6 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert audio.shape == (RATE,)
    np.testing.assert_allclose(audio[500:-500], expected[500:-500], atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_written_video_reads_back(tmp_path, height, width, layout):
    frames, audio = moving_frames(25, height, width), chirp(1.0)
    given = frames.transpose(0, 3, 1, 2) if layout == "NCHW" else frames
    path = tmp_path / "clip.mp4"
    write_video(path, given, 25, audio, RATE)
    back, fps, sound = read_media(path, RATE)
    assert fps == 25
    assert back.shape == (25, height + height % 2, width + width % 2, 3)
    error = np.mean((back[:, :height, :width].astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 32
    lags = range(-200, 201)
    fit = [np.corrcoef(audio[200:-200], np.roll(sound, -lag)[200:-200])[0, 1] for lag in lags]
    assert abs(lags[int(np.argmax(fit))]) <= 1
    assert max(fit) > 0.99
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_written_video_plays_everywhere(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, moving_frames(), 30000 / 1001, chirp(0.4), 40000)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.pix_fmt) == ("h264", "yuv420p")
        assert video.average_rate == Fraction(30000, 1001)
        assert video.frames == 12
        assert video.start_time == 0
        assert (audio.codec_context.name, audio.rate) == ("aac", 48000)


@pytest.mark.parametrize(
    ("frames", "sound", "message"),
    [
        (np.zeros((2, 3, 4), np.uint8), {}, "got \\(2, 3, 4\\)"),
        (np.zeros((0, 3, 4, 4), np.uint8), {}, "frames must be"),
        (np.zeros((2, 3, 4, 4), np.float32), {}, "uint8"),
        (np.zeros((2, 3, 4, 4), np.uint8), {"sample_rate": RATE}, "go together"),
    ],
)
def test_write_video_refuses(tmp_path, frames, sound, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "clip.mp4", frames, 25, **sound)
    assert not os.listdir(tmp_path)


def test_unwritable_video_is_one_line(tmp_path):
    with pytest.raises(MediaError, match="cannot write"):
        write_video(tmp_path / "missing" / "clip.mp4", moving_frames(), 25)


def _truncated(path):
    write_video(path, moving_frames(50), 25, chirp(2.0), RATE)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


BROKEN = {
    "no such file": lambda path: None,
    "zero bytes": lambda path: path.touch(),
    "not a file": lambda path: path.mkdir(),
    "no audio stream": lambda path: write_video(path, moving_frames(), 25),
    "no video stream": lambda path: write_streams(path, None, 0),
    "cannot be decoded": lambda path: path.write_bytes(np.random.default_rng(0).bytes(50000)),
    "cannot be decoded|truncated": _truncated,
    "truncated or damaged": lambda path: write_video(path, moving_frames(50), 25, chirp(0.5), RATE),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_unusable_media_is_named_in_one_line(tmp_path, reason):
    path = tmp_path / "clip.mpg"
    BROKEN[reason](path)
    with pytest.raises(MediaError, match=reason) as caught:
        read_media(path, RATE)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@needs_grid
def test_damaged_grid_clip_is_refused(tmp_path):
    data = bytearray((GRID / "s1" / "lwbf5a.mpg").read_bytes())
    for position in np.random.default_rng(0).integers(20000, len(data), 60):
        data[position] ^= 0xFF
    (tmp_path / "clip.mpg").write_bytes(data)
    with pytest.raises(MediaError, match="damaged"):
        read_media(tmp_path / "clip.mpg", RATE)


def test_reads_photos(tmp_path):
    image = moving_frames(1)[0]
    cv2.imwrite(str(tmp_path / "photo.png"), image[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), image)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(MediaError, match=r"text\.png: not an image"):
        read_image(tmp_path / "text.png")
    with pytest.raises(MediaError, match="no such file"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("size", [(128, 96), (64, 48)])
@pytest.mark.parametrize("scale", [0.6, 1.7, 5.0])
def test_warp_moves_the_eyes_to_their_places(size, scale):
    centre = np.array([200.0, 180.0]) * scale
    along = 30 * scale * np.array([np.cos(0.2), np.sin(0.2)])
    eyes = np.stack([centre - along, centre + along])
    grid = np.stack(np.meshgrid(np.arange(400 * scale), np.arange(360 * scale)), axis=-1)
    dots = [np.exp(-((grid - eye) ** 2).sum(-1) / (2 * (3 * scale) ** 2)) for eye in eyes]
    image = np.stack([*dots, np.zeros_like(dots[0])], axis=-1)
    aligned = warp((255 * image).astype(np.uint8)[None], eyes, size)[0].astype(float)
    y, x = np.mgrid[: size[0], : size[1]]
    for channel, eye in zip(aligned, EYES, strict=False):
        found = np.array([(channel * x).sum(), (channel * y).sum()]) / channel.sum()
        expected = (eye + 0.5) * size[1] / 96 - 0.5
        np.testing.assert_allclose(found, expected, atol=0.15)


def test_warp_does_not_alias():
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    aligned = warp(stripes[None], np.array([[120.0, 150.0], [280.0, 150.0]]))
    assert aligned[..., 16:-16].std() < 20  # 60 and more if pixels are only sampled


@needs_grid
@pytest.mark.parametrize("clip", ["s1/bbwgzn.mpg", "s5/lbax4n.mpg", "s22/lbbc2a.mpg"])
def test_faces_of_grid_are_aligned(clip):
    frames = read_media(GRID / clip, RATE)[0][:30]
    aligned = align_frames(frames)
    assert aligned.shape == (30, 3, 128, 96)
    assert aligned.dtype == np.uint8
    large = [
        cv2.copyMakeBorder(
            cv2.resize(np.ascontiguousarray(image.transpose(1, 2, 0)), (288, 384)),
            *(60, 60, 60, 60),
            cv2.BORDER_REPLICATE,
        )
        for image in aligned
    ]
    eyes, found = locate_eyes(np.stack(large))
    assert found
    again = (eyes - 60 + 0.5) / 3 - 0.5
    np.testing.assert_allclose(again, np.broadcast_to(EYES, again.shape), atol=2.5)


@needs_grid
def test_alignment_undoes_scale_and_rotation():
    image = read_media(GRID / "s20" / "brbk7n.mpg", RATE)[0][0]
    turn = cv2.getRotationMatrix2D((165, 165), 8, 2.5)
    turn[:, 2] += 250
    turned = cv2.warpAffine(image, turn, (900, 900), borderMode=cv2.BORDER_REPLICATE)
    difference = align_image(image).astype(float) - align_image(turned)
    assert 10 * np.log10(255**2 / np.mean(difference**2)) > 22


@needs_grid
def test_face_box_stands_in_for_missing_eyes(monkeypatch):
    frames = read_media(GRID / "s2" / "pwij3p.mpg", RATE)[0][:10]
    eyes, found = locate_eyes(frames)
    assert found
    monkeypatch.setattr(align, "_eye_pair", lambda grey, face: None)
    guessed, found = locate_eyes(frames)
    assert not found
    np.testing.assert_allclose(guessed, eyes, atol=6)


@pytest.mark.parametrize("kind", ["flat", "noise", "tiny"])
def test_no_face(kind):
    rng = np.random.default_rng(0)
    frames = {
        "flat": np.full((6, 120, 160, 3), 128, np.uint8),
        "noise": rng.integers(0, 256, (6, 120, 160, 3), dtype=np.uint8),
        "tiny": np.full((1, 2, 2, 3), 128, np.uint8),
    }[kind]
    with pytest.raises(NoFace, match="no face"):
        align_frames(frames)
