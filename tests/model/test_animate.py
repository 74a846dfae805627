"""A photo and a recording become a video, and what is wrong with either is one line."""

import os
import resource
import sys
import tracemalloc
import wave
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from model import Animator
from model.animate import AnimateConfig, animate, main
from model.portrait import Paste, aligned_portrait, find_portrait
from tests.model.animate import TINY, face, photo, speech, write_run
from train.data import landmarks
from train.data.align import NoFace, align_image
from train.data.media import read_media
from train.errors import UserError

needs_dlib = pytest.mark.skipif(not landmarks.installed(), reason=landmarks.INSTALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny run."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def animator(checkpoint) -> Animator:
    """What animates with it."""
    return Animator(checkpoint)


def write_photo(path: Path, image: np.ndarray) -> Path:
    """Write (H, W, 3) RGB or (H, W) grey, also where OpenCV cannot write the name."""
    pixels = image[..., ::-1] if image.ndim == 3 else image
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())
    return path


def write_wav(path: Path, samples: np.ndarray | None = None, rate: int = 16000) -> Path:
    """Write 16-bit sound."""
    samples = speech(0.6, rate) if samples is None else samples
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch, capsys):
    """Run the command line in a folder with face.jpg and speech.wav: exit code and its words."""
    monkeypatch.chdir(tmp_path)
    write_photo(Path("face.jpg"), photo(2.0))
    write_wav(Path("speech.wav"))

    def run(*words: str, image="face.jpg", audio="speech.wav") -> tuple[int, str]:
        args = ["animate", "--image", image, "--audio", *audio.split("|"), *words]
        monkeypatch.setattr(sys, "argv", [*args, "--checkpoint", str(checkpoint)])
        code = main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        if code:
            errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
            assert errors, said.err
        return code, said.out + said.err

    return run


def test_a_photo_and_a_recording_become_a_video(command):
    code, said = command("--out", "talk.mp4")
    assert code == 0
    assert "talk.mp4: 15 frames, 0.60 s, made in" in said
    assert "times as fast as they play" in said
    data = Path("talk.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open("talk.mp4") as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.pix_fmt, video.frames) == ("h264", "yuv420p", 15)
        assert (audio.codec_context.name, audio.rate) == ("aac", 48000)
    frames, fps, sound = read_media("talk.mp4", 16000)
    assert frames.shape == (15, 32, 24, 3)
    assert fps == 25
    near = [np.corrcoef(sound[s : s + 8000], speech()[:8000])[0, 1] for s in range(40)]
    assert max(near) > 0.9
    assert sorted(os.listdir()) == ["face.jpg", "speech.wav", "talk.mp4"]


def test_three_lines_of_python_are_the_command(command, checkpoint, tmp_path):
    assert command("--seed", "3")[0] == 0
    Animator(checkpoint)("face.jpg", "speech.wav", seed=3).save("again.mp4")
    assert Path("again.mp4").read_bytes() == Path("talk.mp4").read_bytes()
    assert command("--seed", "4", "--out", "other.mp4")[0] == 0
    assert Path("other.mp4").read_bytes() != Path("talk.mp4").read_bytes()


def test_a_small_network_takes_one_thread_unless_the_user_chooses(command, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert command()[0] == 0
    assert not chosen
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert command("--overwrite")[0] == 0
    assert chosen == [1]


def test_arrays_and_progress(animator, tmp_path):
    seen = []
    animation = animator(photo(2.0), (speech(1.5) * 32767).astype(np.int16), sample_rate=16000)
    animation.save(tmp_path / "talk.mp4", progress=lambda *state: seen.append(state))
    assert seen[-1] == (37, 37)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert animation.total == 37
    assert animation.frames.shape == (37, 32, 24, 3)
    assert animation.portrait.still.shape == (32, 24, 3)
    assert len(animation.audio(16000)) == 24000
    for image, sound, message in (
        (np.zeros((4, 4, 2), np.uint8), speech(), "expected .H, W, 3. uint8"),
        (photo(2.0), speech(0.03), "a frame alone takes 0.040 s"),
    ):
        with pytest.raises(UserError, match=message):
            animator(image, sound, sample_rate=16000)
    with pytest.raises(UserError, match="sample_rate: samples need it"):
        animator(photo(2.0), speech())


@torch.no_grad()
def test_the_stream_is_the_whole_and_comes_as_soon_as_it_can(animator):
    whole = animator(photo(2.0), speech(1.0), sample_rate=16000, seed=5).frames
    assert animator.latency == pytest.approx(0.24)
    chunks = np.split(speech(1.0), range(1000, 16000, 1000))
    given, arrived = 0, []

    def arriving():
        nonlocal given
        for chunk in chunks:
            given += len(chunk)
            yield chunk

    for frames in animator.stream(photo(2.0), arriving(), seed=5):
        arrived += [(given / 16000, frame) for frame in frames]
    assert len(arrived) == len(whole) == 25
    for number, (time, frame) in enumerate(arrived):
        assert np.abs(frame.astype(int) - whole[number]).max() <= 1  # rounding
        assert time <= min(1.0, (number + 1) / 25 + animator.latency + 1000 / 16000) + 1e-9
    assert np.abs(np.diff(whole.astype(int), axis=0)).max() > 10  # it is no still


def test_several_photos_and_recordings(command):
    Path("people").mkdir()
    write_photo(Path("people/Ännchen Müller.png"), photo(2.0))
    write_photo(Path("people/张伟.png"), photo(1.5))
    Path("people/notes.txt").write_text("no photo")
    write_photo(Path("people/empty.png"), np.full((200, 200, 3), 128, np.uint8))
    write_wav(Path("second.wav"))
    code, said = command("--out", "videos", image="people", audio="speech.wav|second.wav")
    assert code == 2
    assert "error: people/empty.png: no face found" in said
    assert "error: 2 of 6 videos could not be made" in said
    stems = ("Ännchen Müller", "张伟")
    expected = {f"{stem}-{sound}.mp4" for stem in stems for sound in ("speech", "second")}
    assert set(os.listdir("videos")) == expected
    for words, message in (
        (("--out", "a.mp4"), "--out a.mp4: 6 videos need a folder"),
        (("--out", "videos"), "exists; --overwrite replaces it"),
    ):
        code, said = command(*words, image="people", audio="speech.wav|second.wav")
        assert code == 2
        assert message in said


def test_two_faces(animator, command):
    both = photo(1.2, 2.0)
    write_photo(Path("two.png"), both)
    code, said = command(image="two.png")
    assert code == 0
    assert "two.png: 2 faces: the largest was taken; --face 2 takes the next" in said
    largest, next_ = (animator.portrait(both, face=number) for number in (1, 2))
    assert "--face" not in " ".join(largest.remarks)
    assert largest.place[0, 0] < next_.place[0, 0]  # the larger, the more it is reduced
    for portrait in (largest, next_):
        expected = cv2.resize(face(1.0), (24, 32), interpolation=cv2.INTER_AREA)
        fit = np.corrcoef(portrait.still[4:-4, 3:-3].ravel(), expected[4:-4, 3:-3].ravel())[0, 1]
        assert fit > 0.9
    code, said = command("--overwrite", "--face", "3", image="two.png")
    assert code == 2
    assert "--face 3: expected 1 to 2" in said


@pytest.mark.parametrize("alignment", ["haar", pytest.param("dlib", marks=needs_dlib)])
def test_faces_are_aligned_as_in_training(alignment):
    image = photo(2.0)
    still = find_portrait(image, (128, 96), alignment).still
    expected = align_image(image)
    if alignment == "dlib":
        points = landmarks.find_landmarks(image[None]).points
        expected = landmarks.align_landmarks(image[None], points)[0]
    np.testing.assert_array_equal(still, expected.transpose(1, 2, 0))


@needs_dlib
def test_faces_are_aligned_to_the_places_of_a_run():
    image, places = photo(2.0), landmarks.PLACES * 0.8 + [9.0, 14.0]
    still = find_portrait(image, (128, 96), "dlib", targets=places.tolist()).still
    points = landmarks.find_landmarks(image[None]).points
    expected = landmarks.align_landmarks(image[None], points, (128, 96), places)[0]
    np.testing.assert_array_equal(still, expected.transpose(1, 2, 0))
    usual = find_portrait(image, (128, 96), "dlib").still
    assert np.abs(still.astype(int) - usual).mean() > 5


def test_without_dlib_the_eye_detector_stands_in_and_says_so(monkeypatch):
    for module in ("model.portrait", "train.data.landmarks"):
        monkeypatch.setattr(f"{module}.installed", lambda: False)
    portrait = find_portrait(photo(2.0), (128, 96), "dlib")
    assert "aligned by OpenCV's eye detector" in portrait.remarks[0]
    np.testing.assert_array_equal(portrait.still, align_image(photo(2.0)).transpose(1, 2, 0))


@needs_dlib
def test_a_predictor_that_is_gone_is_named():
    portrait = find_portrait(photo(2.0), (128, 96), "/gone/points.dat")
    assert portrait.remarks[0].endswith("those of the run, /gone/points.dat, are not here")


def test_the_weights_that_ship_are_the_default():
    animation = Animator()(photo(2.0), speech(0.4), sample_rate=16000)
    frames, still = animation.frames.astype(int), animation.portrait.still
    assert frames.shape == (10, 128, 96, 3)
    assert np.abs(frames - still).mean() < 8  # the same person
    change = np.abs(frames - still).max(0).max(-1)
    assert change[80:116, 30:66].mean() > 2 * change[:40].mean()  # the mouth moves, not the hair


def test_aligned_pictures_are_taken_as_they_are(animator, command):
    crop = face(1.0)
    portrait = aligned_portrait(crop, (128, 96))
    np.testing.assert_array_equal(portrait.still, crop)
    assert not portrait.remarks
    wide = np.pad(crop, ((0, 0), (50, 50), (0, 0)))
    portrait = aligned_portrait(wide, (128, 96))
    np.testing.assert_array_equal(portrait.still, crop)
    assert portrait.remarks == ("cut: from 196 x 128 to 96 x 128, the frame's shape",)
    code, said = command("--aligned", "--paste")
    assert code == 2
    assert "--paste with --aligned" in said


def test_paste_is_seamless():
    image = photo(2.2, size=(320, 500))
    portrait = find_portrait(image, (128, 96), "haar")
    paste = Paste(portrait)
    np.testing.assert_array_equal(paste(portrait.still[None])[0], image)  # nothing moved
    changed = portrait.still.copy()
    changed[88:104, 36:60] = 20, 20, 250  # a mouth
    changed[:, 0] = changed[0] = 0  # what happens at the border is not pasted
    pasted = paste(changed[None])[0].astype(int)
    difference = np.abs(pasted - image).max(2)
    rows, columns = np.nonzero((pasted - image)[..., 2] > 60)
    inverse = cv2.invertAffineTransform(portrait.place)
    centre = inverse @ [47.5, 95.5, 1]
    assert np.abs([columns.mean(), rows.mean()] - centre).max() < 1
    blue = pasted[round(centre[1]), round(centre[0])]
    assert np.abs(blue - [20, 20, 250]).max() < 12
    corner = (inverse @ [0, 0, 1]).round().astype(int)
    assert difference[corner[1] - 2 : corner[1] + 5, corner[0] - 2 : corner[0] + 5].max() <= 2


def test_paste_of_a_huge_photo_and_of_a_face_at_the_border(command):
    write_photo(Path("huge.jpg"), cv2.resize(photo(2.0, size=(280, 900)), (10000, 3111)))
    assert command("--paste", image="huge.jpg")[0] == 0
    assert read_media("talk.mp4", 16000)[0].shape == (15, 398, 1280, 3)
    write_photo(Path("border.png"), face(2.0)[:, :170])
    assert command("--paste", "--overwrite", image="border.png")[0] == 0
    assert read_media("talk.mp4", 16000)[0].shape == (15, 256, 170, 3)


def test_long_sound_is_streamed_to_disk(animator, tmp_path):
    animation = animator(photo(2.0), speech(8.0), sample_rate=16000, paste=True)
    tracemalloc.start()
    try:
        assert animation.save(tmp_path / "long.mp4") == 200
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6  # all the frames would be 86 MB


def save_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_silent_film(path: Path) -> None:
    """A video without sound."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


#: What is wrong: how to make the file, and what is said of it
BAD_SOUND = {
    "no such.wav": (lambda path: None, "no such file"),
    "empty.wav": (lambda path: path.touch(), "zero bytes"),
    "folder": (lambda path: path.mkdir(), "not a file"),
    "text.mp3": (lambda path: path.write_text("no sound" * 99), "cannot be decoded|no audio"),
    "silent film.mp4": (write_silent_film, "no audio stream to decode"),
    "blink.wav": (lambda path: write_wav(path, speech(0.02)), "a frame alone takes 0.040 s"),
    "photo.jpg": (lambda path: write_photo(path, photo(1.0)), "no audio stream"),
}
BAD_PHOTO = {
    "no such.jpg": (lambda path: None, "no such file"),
    "empty.jpg": (lambda path: path.touch(), "zero bytes"),
    "half.png": (lambda path: save_half(write_photo(path, photo(2.0))), "truncated|damaged"),
    "film.jpg": (write_silent_film, "a film or sound; give a photo"),
    "nobody.png": (lambda path: write_photo(path, np.full((99, 99, 3), 9)), "no face found"),
    "profile.png": (lambda path: write_photo(path, face(3.0)[:, :130]), "seen from the front"),
    "upside down.png": (lambda path: write_photo(path, photo(2.0)[::-1]), "no face found"),
    "tiny.png": (lambda path: write_photo(path, photo(2.0)[:3, :3]), "no face found"),
    "no folder/face.jpg": (lambda path: None, "no such file"),
    "empty folder": (lambda path: path.mkdir(), "no photos in this folder"),
}


@pytest.mark.parametrize("name", BAD_SOUND)
def test_bad_sound_is_one_line(command, name):
    make, message = BAD_SOUND[name]
    make(Path(name))
    code, said = command(audio=name)
    assert code == 2
    assert name in said.splitlines()[-1]
    assert said.count("error: ") == 1
    assert any(part in said for part in message.split("|")), said
    assert not Path("talk.mp4").exists()


@pytest.mark.parametrize("name", BAD_PHOTO)
def test_bad_photos_are_one_line(command, name):
    make, message = BAD_PHOTO[name]
    make(Path(name))
    code, said = command(image=name)
    assert code == 2
    assert name in said.splitlines()[-1]
    assert any(part in said for part in message.split("|")), said
    assert not Path("talk.mp4").exists()


def test_odd_sound_is_animated_and_said(command):
    write_wav(Path("silence.wav"), np.zeros(16000))
    write_wav(Path("a tenth.wav"), speech(0.1))
    code, said = command(audio="silence.wav")
    assert code == 0
    assert "silence.wav: silent: nothing is louder than -60 dB" in said
    code, said = command("--overwrite", audio="a tenth.wav")
    assert code == 0
    assert "talk.mp4: 2 frames" in said
    Path("speech.wav").rename("speech.mp3")
    assert command("--overwrite", audio="speech.mp3")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "-1"], "--seed -1: expected a number from 0"),
        (["--face", "1", "--aligned"], "--face with --aligned"),
        (["--device", "cuda:77"], "--device cuda:77: not usable here"),
    ],
)
def test_settings_that_make_no_sense(command, words, message):
    code, said = command(*words)
    assert code == 2
    assert message in said


def test_a_run_that_is_none_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        Animator(tmp_path)


def test_the_sound_of_a_video_is_taken_and_the_video_kept(command):
    assert command("--out", "talk.mp4")[0] == 0
    before = Path("talk.mp4").read_bytes()
    code, said = command("--out", "again.mp4", audio="talk.mp4")
    assert code == 0, said
    code, said = command("--overwrite", audio="talk.mp4")
    assert code == 2
    assert "--out talk.mp4: it is the recording" in said
    assert Path("talk.mp4").read_bytes() == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("talk.avi", "expected a name that ends in .mp4"),
        ("no/talk.mp4", "there is no folder no"),
        ("face.jpg/talk.mp4", "there is no folder face.jpg"),
        ("/proc/talk.mp4", "cannot be written"),
    ],
)
def test_out_that_cannot_be_written(command, out, message):
    code, said = command("--out", out)
    assert code == 2
    assert message in said


def test_a_full_disk_leaves_nothing(command):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        code, said = command()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "error: cannot write talk.mp4" in said
    assert sorted(os.listdir()) == ["face.jpg", "speech.wav"]


def test_what_exists_is_kept_unless_the_user_says_so(command, checkpoint):
    Path("talk.mp4").write_text("dear")
    code, said = command()
    assert code == 2
    assert "talk.mp4: exists; --overwrite replaces it" in said
    settings = AnimateConfig(Path("face.jpg"), (Path("speech.wav"),), checkpoint=checkpoint)
    with pytest.raises(UserError, match="exists"):
        animate(settings, ask=lambda question: "n")
    assert Path("talk.mp4").read_text() == "dear"
    assert animate(settings, ask=lambda question: "y") == [Path("talk.mp4")]
    assert command("--overwrite")[0] == 0
    assert Path("talk.mp4").stat().st_size > 1000


def test_no_face_of_an_array(animator):
    with pytest.raises(NoFace, match="image: no face found"):
        animator.portrait(np.zeros((100, 100), np.uint8))
    assert TINY.fps == animator.fps
