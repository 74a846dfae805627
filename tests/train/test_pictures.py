"""Pictures as players show them, odd sound, limits, and the remarks that say what was done."""

import importlib
import json
import struct
import zlib
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from train.data import decode, landmarks
from train.data.limits import Limits
from train.data.media import MediaError, load_media, read_audio, read_image, read_media, write_video
from train.data.prepared import PreparedSet
from train.prepare import prepare_grid

RATE = 16000
needs_dlib = pytest.mark.skipif(not landmarks.installed(), reason=landmarks.INSTALL)


def corners(height=48, width=64):
    """A picture whose quarters are red, green, blue and white, from the top left on."""
    image = np.full((height, width, 3), 230, np.uint8)
    image[: height // 2, : width // 2] = 230, 20, 20
    image[: height // 2, width // 2 :] = 20, 180, 20
    image[height // 2 :, : width // 2] = 20, 20, 230
    return image


def noise(seconds, level=0.1):
    return np.random.default_rng(0).normal(0, level, round(seconds * RATE)).astype(np.float32)


def turn(path, a, b, c, d):
    """Write a display matrix into the first track of an MP4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    one = 65536
    data[at : at + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 2**30)
    path.write_bytes(data)


MATRICES = {
    "": ((1, 0, 0, 1), lambda image: image),
    "rotated: by 90": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "rotated: by 180": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "rotated: by 270": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "mirrored: as": ((1, 0, 0, -1), lambda image: image[::-1]),
    "mirrored: as the file": ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    "mirrored: as the": ((0, -1, -1, 0), lambda image: np.rot90(image, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("remark", MATRICES)
def test_display_matrix_is_applied(tmp_path, remark):
    matrix, expected = MATRICES[remark]
    write_video(tmp_path / "clip.mp4", np.stack([corners()] * 10), 25, noise(0.4), RATE)
    plain = read_media(tmp_path / "clip.mp4", RATE)[0]
    assert np.abs(plain[5].astype(int) - corners())[::8, ::8].mean() < 6
    turn(tmp_path / "clip.mp4", *matrix)
    media = load_media(tmp_path / "clip.mp4", RATE)
    for before, after in zip(plain, media.frames, strict=True):
        np.testing.assert_array_equal(after, expected(before))
    assert any(text.startswith(remark) for text in media.remarks) or media.remarks == ()


def test_odd_angles_are_refused(tmp_path):
    write_video(tmp_path / "clip.mp4", np.stack([corners()] * 10), 25, noise(0.4), RATE)
    turn(tmp_path / "clip.mp4", 1, 1, -1, 1)
    with pytest.raises(MediaError, match=r"clip\.mp4: is to be shown turned by 45 degrees"):
        read_media(tmp_path / "clip.mp4", RATE)


def write_planes(path, planes, *, colorspace=2, full=False, aspect=None, count=10, size=(48, 64)):
    """A clip of constant YUV 4:2:0 ``planes``, losslessly encoded, with tags and faint sound."""
    height, width = size
    image = np.r_[
        np.full(height * width, planes[0]),
        np.full(height * width // 4, planes[1]),
        np.full(height * width // 4, planes[2]),
    ]
    image = image.round().astype(np.uint8).reshape(height * 3 // 2, width)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"qp": "0", "preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        context = video.codec_context
        context.colorspace, context.color_range = colorspace, 2 if full else 1
        if aspect:
            context.sample_aspect_ratio = aspect
        sound = container.add_stream("aac", rate=RATE, layout="mono")
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(image, format="yuv420p")
            frame.pts, frame.color_range = i, context.color_range
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(noise(count / 25)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


def planes_of(rgb, red, blue, full):
    """Y, Cb, Cr of a colour in 0..255, for a matrix given by its weights of red and blue."""
    r, g, b = np.array(rgb) / 255
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    if full:
        return 255 * y, 128 + 255 * cb, 128 + 255 * cr
    return 16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr


BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("tag", "weights", "size"),
    [
        (1, BT709, (48, 64)),
        (5, BT601, (48, 64)),
        (6, BT601, (720, 1280)),
        (2, BT601, (48, 64)),
        (2, BT709, (720, 1280)),
    ],
)
@pytest.mark.parametrize("rgb", [(200, 60, 40), (30, 90, 220)])
def test_colours(tmp_path, rgb, tag, weights, size, full, suffix):
    planes = planes_of(rgb, *weights, full)
    path = tmp_path / f"clip.{suffix}"
    write_planes(path, planes, colorspace=tag, full=full, size=size, count=2)
    media = load_media(path, RATE)
    np.testing.assert_allclose(media.frames.mean(axis=(0, 1, 2)), rgb, atol=3)
    assumed = [remark for remark in media.remarks if remark.startswith("colours")]
    assert bool(assumed) == (tag == 2 and size[0] == 720)


@pytest.mark.parametrize("version", ["13.1.0", "16.1.0"])
def test_old_pyav_is_refused_at_import(monkeypatch, version):
    monkeypatch.setattr(av, "__version__", version)
    with pytest.raises(ImportError, match=rf"PyAV {version} gives wrong colours.*'av>=17'"):
        importlib.reload(decode)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("aspect", "size"), [((2, 1), (48, 128)), ((16, 15), (48, 68)), ((1, 2), (96, 64))]
)
def test_pixels_are_made_square(tmp_path, aspect, size, suffix):
    aspect = Fraction(*aspect)
    path = write_planes(tmp_path / f"clip.{suffix}", (90, 128, 128), aspect=aspect)
    media = load_media(path, RATE)
    assert media.frames.shape[1:3] == size
    assert media.remarks == (f"scaled: pixels of {aspect} made square",)


def write_channels(path, channels, layout, rate=48000):
    """A sound file of float32 ``channels`` (C, N)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=rate, layout=layout)
        pcm = (channels * 32767).round().astype(np.int16).T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm), format="s16", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_opposite_phase_is_not_silence(tmp_path):
    tone = 0.5 * np.sin(np.arange(48000) / 20)
    path = write_channels(tmp_path / "a.flac", np.stack([0.8 * tone, -tone]), "stereo")
    np.testing.assert_allclose(np.abs(read_audio(path, 48000)), np.abs(tone), atol=1e-3)
    path = write_channels(tmp_path / "b.flac", np.stack([0.5 * tone, tone]), "stereo")
    np.testing.assert_allclose(read_audio(path, 48000), 0.75 * tone, atol=1e-3)
    path = write_channels(tmp_path / "c.flac", np.stack([0 * tone, tone]), "stereo")
    np.testing.assert_allclose(read_audio(path, 48000), 0.5 * tone, atol=1e-3)


def test_surround_keeps_speech_and_leaves_out_the_bass(tmp_path):
    tone = 0.5 * np.sin(np.arange(48000) / 20)
    silent = np.zeros((6, 48000))
    heard = {}
    for channel, name in enumerate(["FL", "FR", "FC", "LFE", "BL", "BR"]):
        channels = silent.copy()
        channels[channel] = tone
        path = write_channels(tmp_path / f"{name}.flac", channels, "5.1")
        heard[name] = read_audio(path, 48000).std() / tone.std()
    assert heard["FC"] > heard["FL"] == heard["FR"] > heard["BL"] == heard["BR"] > 0.1
    assert heard["LFE"] == 0
    path = write_channels(tmp_path / "all.flac", silent + tone, "5.1")
    np.testing.assert_allclose(read_audio(path, 48000), tone, atol=1e-3)


def moving(count=50):
    return np.stack([np.roll(corners(), i, axis=1) for i in range(count)])


def odd_clips():
    """Remarks, and the frames and sound of clips that call for them."""
    grey = moving()
    grey[:12] = 128
    return {
        "silent: nothing is louder than -60 dB": (moving(), np.zeros(2 * RATE, np.float32)),
        "sound cut off at the end: the last 0.2": (moving(), noise(1.75)),
        "grey start: the first 12 frames show nothing": (grey, noise(2)),
    }


@pytest.mark.parametrize("remark", odd_clips())
def test_remarks(tmp_path, remark):
    write_video(tmp_path / "clip.mp4", odd_clips()[remark][0], 25, odd_clips()[remark][1], RATE)
    remarks = load_media(tmp_path / "clip.mp4", RATE).remarks
    assert len(remarks) == 1
    assert remarks[0].startswith(remark)


def test_wrong_extension_is_named(tmp_path):
    write_video(tmp_path / "clip.mp4", moving(), 25, noise(2), RATE)
    (tmp_path / "clip.mp4").rename(tmp_path / "clip.mpg")
    (remark,) = load_media(tmp_path / "clip.mpg", RATE).remarks
    assert remark.startswith("wrong extension: .mpg, but it is a file of the kind mov,mp4")
    cv2.imwrite(str(tmp_path / "photo.png"), corners())
    (tmp_path / "photo.png").rename(tmp_path / "photo.mpg")
    with pytest.raises(MediaError, match=r"photo\.mpg: no audio stream.*kind png_pipe"):
        load_media(tmp_path / "photo.mpg", RATE)


@pytest.fixture
def undecoded(monkeypatch):
    """Whatever is decoded in this test is a failure."""

    def fail(*_):
        raise AssertionError("decoded before the limits were checked")

    monkeypatch.setattr(decode, "_decode", fail)
    monkeypatch.setattr(cv2, "imdecode", fail)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(decoded_bytes=400_000), r"decodes to 0\.00 GB, more than the limit of 0\.00 GB"),
        (Limits(seconds=1.5), r"lasts 2 s by its time stamps, more than the limit of 1\.5 s"),
        (
            Limits(pixels=3000),
            "64 x 48 = 0.00307 million pixels, more than the limit of 0.003 million",
        ),
    ],
)
def test_limits_are_checked_before_decoding(tmp_path, undecoded, limits, message):
    write_video(tmp_path / "clip.mp4", moving(), 25, noise(2), RATE)
    with pytest.raises(MediaError, match=rf"clip\.mp4: .*{message}"):
        read_media(tmp_path / "clip.mp4", RATE, limits=limits)


def test_small_file_of_many_large_pictures_is_refused(tmp_path, undecoded):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = 3840, 2160, "yuv420p"
        container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for pts in (0, 100, 300):
            frame = av.VideoFrame(3840, 2160, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.pts = pts
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    assert path.stat().st_size < 100_000
    with pytest.raises(MediaError, match=r"clip\.mkv: decodes to 7\.46 GB.* 2\.20 GB; cut it"):
        read_media(path, RATE, fps=25)


def test_limits_are_enforced_while_decoding(tmp_path):
    write_video(tmp_path / "clip.mp4", moving(), 25, noise(2), RATE)
    pictures = 50 * 64 * 48 * 3
    with pytest.raises(MediaError, match="decodes to"):  # the sound alone is too much
        read_media(tmp_path / "clip.mp4", RATE, limits=Limits(decoded_bytes=pictures + 100_000))
    assert len(read_media(tmp_path / "clip.mp4", RATE, limits=Limits(pictures + 400_000))[0]) == 50
    with pytest.raises(MediaError, match="lasts 2 s"):
        read_audio(tmp_path / "clip.mp4", RATE, limits=Limits(seconds=1.5))
    with pytest.raises(MediaError, match="decodes to"):
        read_audio(tmp_path / "clip.mp4", RATE, limits=Limits(decoded_bytes=200_000))


@pytest.mark.parametrize(("width", "height"), [(30000, 30000), (12000, 12000)])
def test_huge_photo_is_refused_by_its_header(tmp_path, undecoded, width, height):
    def chunk(kind, data):
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
    (tmp_path / "photo.png").write_bytes(png + chunk(b"IEND", b""))
    with pytest.raises(MediaError, match=r"photo\.png: .* million pixels, more than the limit"):
        read_image(tmp_path / "photo.png")


@pytest.mark.parametrize("aligner", ["haar", pytest.param("dlib", marks=needs_dlib)])
def test_remarks_reach_manifest_and_summary(aligner, grid_dir, tmp_path, capsys):
    frames, _, audio = read_media(grid_dir / "s1" / "bbir6n.mpg", RATE)
    grey, few = frames.copy(), frames.copy()
    grey[:12] = 128
    few[10:] = 90
    clips = {
        "rotated": np.rot90(frames, 1, axes=(1, 2)),
        "resampled": frames[np.arange(90) * 75 // 90],
        "grey start": grey,
        "few faces": few,
        "two faces": np.concatenate([frames, frames], axis=2),
        "silent": frames,
    }
    raw = tmp_path / "raw" / "s1"
    raw.mkdir(parents=True)
    for kind, pictures in clips.items():
        path = raw / f"{kind.replace(' ', '_')}.mp4"
        fps = 30 if kind == "resampled" else 25
        write_video(path, pictures, fps, audio * (kind != "silent"), RATE)
    turn(raw / "rotated.mp4", 0, 1, -1, 0)
    out = prepare_grid(tmp_path / "raw", tmp_path / "out", workers=1, landmarks=aligner)
    printed = capsys.readouterr().out
    entries = json.loads((out / "manifest.json").read_text())["clips"]
    assert len(entries) == len(clips)
    for entry in entries:
        kind = entry["name"].replace("_", " ")
        assert [remark.split(":")[0] for remark in entry["remarks"]] == [kind]
        assert f"      1  {entry['remarks'][0]}" in printed
        assert entry["frames"] == 75
    data = {
        entry["name"]: clip for entry, clip in zip(entries, PreparedSet(out, None), strict=True)
    }
    off = data["rotated"]["frames"].float() - data["silent"]["frames"].float()
    assert off.abs().mean() < 8  # eyes are found again, not quite at the same place
