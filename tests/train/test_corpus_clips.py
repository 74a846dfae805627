"""Corpora prepared from real clips of GRID, in each corpus's names, rates, sizes and containers."""

import json
import os
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from scipy.signal import correlate

from train import prepare
from train.data import clips as clip_module
from train.data.align import NoFace
from train.data.media import load_media
from train.data.prepared import PreparedSet, read_clip

GRID = Path(
    os.environ.get("POLYFUSION_GRID") or Path(__file__).parents[3] / "shared" / "grid-speakers"
)
pytestmark = pytest.mark.skipif(not GRID.is_dir(), reason=f"no GRID clips at {GRID}")


def command(monkeypatch, *args):
    """Run ``python -m train.prepare ARGS`` in this process, small and with one worker."""
    options = ["--size", "32", "24", "--workers", "1", "--landmarks", "haar"]
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args), *options])
    return prepare.main()


def remux(path, clips, fps, size, video, audio, *, seconds=None, aspect=None, rate=44100):
    """Write clips of GRID, one after the other, as one file of another kind.

    ``size`` is width and height, ``audio`` None for no sound; by default it lasts 1.2 s.
    """
    media = [load_media(GRID / f"{clip}.mpg", rate) for clip in clips]
    frames = np.concatenate([clip.frames for clip in media])
    sound = np.concatenate([clip.audio for clip in media])
    count = round((seconds or 1.2) * float(fps))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast"} if video == "libx264" else {}
        pictures = container.add_stream(video, rate=fps, options=options)
        pictures.width, pictures.height, pictures.pix_fmt = *size, "yuv420p"
        pictures.bit_rate = 4_000_000
        if aspect:
            pictures.codec_context.sample_aspect_ratio = aspect
        heard = container.add_stream(audio, rate=rate, layout="mono") if audio else None
        for i in range(count):
            image = cv2.resize(frames[int(i / float(fps) * 25)], size)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, 1 / Fraction(fps)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        if heard is not None:
            write_sound(container, heard, sound[: round(count / float(fps) * rate)], rate)
    return path


def write_sound(container, stream, wave, rate):
    frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = rate, 0
    resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate)
    for part in resampler.resample(frame):
        container.mux(stream.encode(part))
    container.mux(stream.encode(None))


def write_wav(path, clip, seconds=1.2, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = load_media(GRID / f"{clip}.mpg", rate).audio[: round(seconds * rate)]
    with av.open(str(path), "w") as container:
        write_sound(
            container, container.add_stream("pcm_s16le", rate=rate, layout="mono"), wave, rate
        )


def cut_short(flv, share):
    """The start of a Flash video, up to the end of one of its packets, as a download leaves it."""
    at = 13
    while at < share * len(flv):
        at += 15 + int.from_bytes(flv[at + 1 : at + 4])
    return flv[:at]


def flash(path, clip, audio="libmp3lame"):
    return remux(path, [clip], 30, (480, 360), "flv", audio)


def clips(out, *keys):
    """The manifest's clips: whole, or what it says under ``keys``."""
    listed = json.loads((out / "manifest.json").read_text())["clips"]
    return [tuple(clip[key] for key in keys) for clip in listed] if keys else listed


def skips(out):
    skipped = json.loads((out / "manifest.json").read_text())["skipped"]
    return {Path(skip["file"]).name: skip["reason"] for skip in skipped}


def heard_as(audio, clip, rate):
    """Greatest correlation with the sound of a clip of GRID, shifted by up to 60 ms."""
    real = load_media(GRID / f"{clip}.mpg", rate).audio[: len(audio)]
    both = correlate(audio[: len(real)], real) / np.linalg.norm(real) ** 2
    middle, most = len(real) - 1, round(0.06 * rate)
    return both[middle - most : middle + most].max()


def test_crema_d(tmp_path, monkeypatch, capsys):
    raw, out = tmp_path / "CREMA-D", tmp_path / "out"
    video = raw / "VideoFlash"
    flash(video / "1001_DFA_ANG_XX.flv", "s1/bbir6n")
    flash(video / "1002_dfa_neu_xx.FLV", "s2/pwij3p", audio=None)
    write_wav(raw / "AudioWAV" / "1002_DFA_NEU_XX.wav", "s2/pwij3p")
    flash(video / "1003_DFA_NEU_XX.flv", "s20/brbk7n", audio=None)
    shutil.copy(video / "1001_DFA_ANG_XX.flv", video / "1076_MTI_NEU_XX.flv")
    data = (video / "1001_DFA_ANG_XX.flv").read_bytes()
    (video / "1004_DFA_ANG_XX.flv").write_bytes(cut_short(data, 0.4))
    (video / "1005_DFA_ANG_XX.flv").write_text("version https://git-lfs.github.com/spec/v1\n")
    (video / "1006_DFA_ANG_XX.flv.crdownload").write_bytes(data)
    assert command(monkeypatch, "crema-d", raw, out) == 0
    reasons = {
        "1003_DFA_NEU_XX.flv": "no audio stream",
        "1004_DFA_ANG_XX.flv": "truncated",
        "1005_DFA_ANG_XX.flv": "pointer of Git LFS",
        "1006_DFA_ANG_XX.flv.crdownload": "unfinished download",
        "1076_MTI_NEU_XX.flv": "known to be bad: it has no sound",
    }
    assert skips(out).keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in skips(out)[name]
    made = PreparedSet(out, split=None)
    assert (made.fps, made.sample_rate) == (30, 16000)
    assert [(clip["speaker"], clip["name"], clip["frames"]) for clip in made.clips] == [
        ("1001", "1001_DFA_ANG_XX", 36),
        ("1002", "1002_DFA_NEU_XX", 36),
    ]
    assert heard_as(made.clip(0).audio, "s1/bbir6n", 16000) > 0.9
    assert heard_as(made.clip(1).audio, "s2/pwij3p", 16000) > 0.9
    assert "sound beside the video: from 1002_DFA_NEU_XX.wav" in made.clips[1]["remarks"]


def test_tcd_timit(tmp_path, monkeypatch, capsys):
    raw, out = tmp_path / "TCD-TIMIT", tmp_path / "out"
    ntsc = Fraction(30000, 1001)
    make = {"fps": ntsc, "video": "libx264", "audio": "aac", "rate": 48000}
    long = raw / "volunteers" / "01M" / "Clips" / "straightcam" / "sa1.mp4"
    remux(long, ["s1/bbir6n", "s1/bbwgzn"], size=(480, 270), seconds=4.5, **make)
    large = raw / "volunteers" / "34m" / "Clips" / "straightcam" / "SX4.MP4"
    remux(large, ["s2/pwij3p"], size=(1920, 1080), **make)
    short = raw / "volunteers" / "08F" / "Clips" / "straightcam" / "sa2.mp4"
    remux(short, ["s20/brbk7n"], size=(480, 270), **make)
    for other in ("volunteers/01M/Clips/30degcam/sa1.mp4", "lipspeakers/Lipspkr1/sa1.mp4"):
        (raw / other).parent.mkdir(parents=True)
        shutil.copy(short, raw / other)
    assert command(monkeypatch, "tcd-timit", raw, out) == 0
    printed = capsys.readouterr().out
    assert "division of TCD-TIMIT does not name them: Lipspkr1\n" in printed
    assert "left out 1 videos that are no clips of TCD-TIMIT" in printed
    assert clips(out, "speaker", "name", "split", "frames") == [
        ("01M", "sa1-1of2", "train", 90),
        ("01M", "sa1-2of2", "train", 45),
        ("08F", "sa2", "val", 36),
        ("34M", "sx4", "test", 36),
    ]
    assert json.loads((out / "splits.json").read_text()) == {
        "train": ["01M"],
        "val": ["08F"],
        "test": ["34M"],
    }
    first, second, *_ = clips(out)
    assert "cut: 0.00 to 3.00 s of 4.50 s" in first["remarks"]
    assert "cut: 3.00 to 4.50 s of 4.50 s" in second["remarks"]
    audio = read_clip(out / first["file"]).audio
    assert len(audio) == 3 * 48000
    assert heard_as(audio, "s1/bbir6n", 48000) > 0.9
    assert heard_as(read_clip(out / second["file"]).audio, "s1/bbwgzn", 48000) > 0.9

    (out / first["file"]).unlink()  # then both pieces are made again, and nothing else
    kept = (out / second["file"]).stat().st_mtime_ns
    assert command(monkeypatch, "tcd-timit", raw, out) == 0
    assert "4 clips in" in (printed := capsys.readouterr().out)
    assert "(2 were there before)" in printed
    assert (out / second["file"]).stat().st_mtime_ns > kept
    assert command(monkeypatch, "tcd-timit", raw, out) == 0
    assert "(4 were there before)" in capsys.readouterr().out

    both = tmp_path / "splits.json"  # lipspeakers and others by a file of one's own
    both.write_text('{"train": ["08F"], "test": ["Lipspkr1"]}')
    assert command(monkeypatch, "tcd-timit", raw, tmp_path / "own", "--splits", both) == 0
    assert {*clips(tmp_path / "own", "speaker")} == {("08F",), ("Lipspkr1",)}


def test_grid_of_720_by_576(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    make = {"fps": 25, "video": "mpeg1video", "audio": "mp2"}
    large = raw / "s1.mpg_6000.part1" / "s1" / "video" / "mpg_6000" / "bbir6n.mpg"
    remux(large, ["s1/bbir6n"], size=(720, 576), seconds=3, **make)
    (raw / "s2" / "video").mkdir(parents=True)
    shutil.copy(GRID / "s1" / "bbir6n.mpg", raw / "s2" / "video" / "bbir6n.mpg")
    assert command(monkeypatch, "grid", raw, tmp_path / "out") == 0
    made = PreparedSet(tmp_path / "out", split=None)
    assert [(clip["speaker"], clip["frames"]) for clip in made.clips] == [("s1", 75), ("s2", 75)]
    large, small = (made.clip(i).frames.astype(float) for i in range(2))
    assert 10 * np.log10(255**2 / np.mean((large - small) ** 2)) > 25  # the same face in its place


def test_own_videos(tmp_path, monkeypatch, capsys):
    raw = tmp_path / "my videos"
    remux(raw / "Ann" / "x.mov", ["s20/brbk7n"], 25, (360, 288), "libx264", "aac")
    remux(raw / "Ann" / "day 2" / "x.mkv", ["s20/brbk7n"], 50, (360, 288), "mpeg4", "aac")
    remux(raw / "Žofie" / "ř.avi", ["s1/bbir6n"], 25, (360, 288), "mpeg4", "mp2")
    assert command(monkeypatch, "any", raw, tmp_path / "out") == 0
    assert clips(tmp_path / "out", "speaker", "name", "frames") == [
        ("Ann", "day 2_x", 30),
        ("Ann", "x", 30),
        ("Žofie", "ř", 30),
    ]

    told = tmp_path / "speakers.csv"
    told.write_text("file,speaker\nAnn/x.mov,Eve\nŽofie/ř.avi,Zofie\n", encoding="utf-8")
    assert command(monkeypatch, "any", raw, tmp_path / "told", "--speakers", told) == 0
    assert f"left out, because {told} does not name them: 1 videos" in capsys.readouterr().out
    made = clips(tmp_path / "told", "speaker", "name")
    assert made == [("Eve", "Ann_x"), ("Zofie", "Žofie_ř")]


def test_pieces_without_a_face_are_left_out(tmp_path, monkeypatch, capsys):
    real = clip_module.find_face

    def blind(frames):
        if len(frames) == 5:  # the second piece
            raise NoFace("no face found")
        return real(frames)

    monkeypatch.setattr(clip_module, "find_face", blind)
    raw = tmp_path / "raw"
    remux(raw / "Ann" / "x.mp4", ["s20/brbk7n"], 25, (360, 288), "libx264", "aac", seconds=0.6)
    shutil.copy(raw / "Ann" / "x.mp4", raw / "Ann" / "x-1of2.mp4")
    args = ["any", raw, tmp_path / "out", "--clip-seconds", "0.4", "--min-frames", "5"]
    assert command(monkeypatch, *args) == 0
    assert clips(tmp_path / "out", "name", "frames") == [("x-1of1", 10)]
    named = {"x-1of2.mp4": f"called like a piece of {raw / 'Ann' / 'x.mp4'}; rename it"}
    assert skips(tmp_path / "out") == named
    remarks = clips(tmp_path / "out")[0]["remarks"]
    assert "left out: 0.20 s, 1 pieces without a face" in remarks
    assert "cut: 0.00 to 0.40 s of 0.60 s" in remarks
    assert command(monkeypatch, *args) == 0
    assert "(1 were there before)" in capsys.readouterr().out
