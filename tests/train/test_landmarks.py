"""Landmarks and the alignment by them, on drawn points and on real clips of GRID."""

import json
import shutil
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from train import prepare
from train.config import load_config, parse
from train.data import grid, landmarks
from train.data.align import EYES, NoFace, locate_eyes, similarity, warp
from train.data.landmarks import (
    FIVE,
    PLACES,
    align_landmarks,
    choose,
    find_landmarks,
    load_predictor,
    model_file,
    predict,
    smooth,
)
from train.data.media import read_media
from train.data.prepared import DataError, read_manifest
from train.loop import train

needs_dlib = pytest.mark.skipif(not landmarks.installed(), reason=landmarks.INSTALL)
FACE_BOX = np.array([3.0, 21.0, 95.0, 108.0])  # dlib's box in an aligned frame


@pytest.fixture(scope="module")
def clip(grid_dir):
    """Frames of a speaker who moves his head, and their landmarks."""
    frames = read_media(grid_dir / "s1" / "lgaf5s.mpg", 16000)[0]
    return SimpleNamespace(frames=frames, found=find_landmarks(frames))


def moved(points, transform):
    return points @ transform[:, :2].T + transform[:, 2]


def test_similarity_is_exact_where_it_can_be_and_else_of_least_squares():
    rng = np.random.default_rng(0)
    points = rng.normal(0, 20, (5, 2))
    true = np.array([[1.2, -0.3, 7], [0.3, 1.2, -4]])
    np.testing.assert_allclose(similarity(points, moved(points, true)), true, atol=1e-12)
    target = moved(points, true) + rng.normal(0, 2, (5, 2))
    found = similarity(points, target)
    error = np.square(moved(points, found) - target).sum()
    for a, b in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        other = found + np.array([[a, -b, 0], [b, a, 0]])
        assert np.square(moved(points, other) - target).sum() > error


def test_every_frame_has_its_own_transform():
    """A dot at the nose of a face that shifts, turns and grows stays at the nose's place."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:200, :220]
    frames, points = [], []
    for t in range(4):
        scale, angle = 1.0 + 0.1 * t, 0.1 * t
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        face = PLACES @ turn.T + rng.uniform(30, 50, 2)
        dot = 255 * np.exp(-((x - face[0, 0]) ** 2 + (y - face[0, 1]) ** 2) / 18)
        frames.append(np.repeat(dot[..., None], 3, axis=2).astype(np.uint8))
        points.append(face)
    aligned = warp(np.stack(frames), np.stack(points), places=PLACES)[:, 0].astype(float)
    rows, columns = np.mgrid[:128, :96]
    for frame in aligned:
        centre = (frame * columns).sum() / frame.sum(), (frame * rows).sum() / frame.sum()
        np.testing.assert_allclose(centre, PLACES[0], atol=0.2)


def test_smoothing_neither_lags_nor_shifts():
    ramp = np.arange(20.0)[:, None, None] * [1.0, 2.0]
    np.testing.assert_allclose(smooth(ramp)[3:-3], ramp[3:-3])
    np.testing.assert_allclose(smooth(ramp * 0 + 5), ramp * 0 + 5)
    peak = np.zeros((20, 1, 2))
    peak[10] = 7
    assert np.flatnonzero(smooth(peak)[:, 0, 0]).tolist() == list(range(7, 14))


@needs_dlib
def test_landmarks_sit_on_the_face(clip):
    found, points = clip.found, clip.found.points
    assert points.shape == (75, 68, 2)
    assert (found.found, found.searched, found.by_haar, found.remarks) == (15, 15, False, [])
    eyes = np.stack([points[:, [36, 39]].mean(1), points[:, [42, 45]].mean(1)], axis=1)
    by_haar, _ = locate_eyes(clip.frames)
    assert np.abs(eyes - by_haar).mean() < 2.5
    assert (points[:, 66, 1] >= points[:, 62, 1] - 0.5).all()  # the lower lip is the lower one
    assert len(np.unique(points[:, 30] % 1)) > 2  # finer than whole pixels


@needs_dlib
def test_landmarks_follow_the_size_of_the_picture(clip):
    large = [cv2.resize(frame, None, fx=3, fy=3) for frame in clip.frames[:6]]
    points = find_landmarks(np.stack(large)).points
    back = (points + 0.5) / 3 - 0.5
    assert np.abs(back - clip.found.points[:6]).mean() < 1.0


def drift(points):
    """RMS deviation in pixels of the five points' centre from its mean over a clip."""
    centre = points[:, FIVE].mean(1)
    return np.sqrt(np.square(centre - centre.mean(0)).sum(1).mean())


@needs_dlib
def test_aligned_faces_stand_still_at_their_places(clip):
    aligned = align_landmarks(clip.frames, clip.found.points)
    assert aligned.shape == (75, 3, 128, 96)
    points = predict(aligned.transpose(0, 2, 3, 1), FACE_BOX, load_predictor())
    assert np.abs(points[:, FIVE].mean(0) - PLACES).max() < 1.5
    eyes = clip.frames, locate_eyes(clip.frames)[0]
    by_haar = predict(warp(*eyes).transpose(0, 2, 3, 1), FACE_BOX, load_predictor())
    still = [np.repeat(x.mean(0, keepdims=True), len(clip.frames), 0) for x in eyes[1:]]
    by_one = predict(warp(eyes[0], *still).transpose(0, 2, 3, 1), FACE_BOX, load_predictor())
    assert drift(points) < 0.6 < drift(by_haar) < 0.7 * drift(by_one)


@needs_dlib
@pytest.mark.parametrize("name", ["s14/lrwq7p", "s24/brby3p", "u1/unknown", "s31/lbig7s"])
def test_the_cascades_offset_is_made_good(grid_dir, name):
    frames = read_media(grid_dir / f"{name}.mpg", 16000)[0][:25]
    five = find_landmarks(frames).points[:, FIVE]
    eyes, _ = locate_eyes(frames)
    by_eyes = [moved(p, similarity(e, EYES)) for p, e in zip(five, eyes, strict=True)]
    by_five = [moved(p, similarity(p, PLACES)) for p in five]
    # 1.4 and 1.8 px on average over 22 clips without the correction
    assert np.abs((np.stack(by_eyes) - by_five).mean((0, 1))).max() < 1.3


@needs_dlib
def test_haar_finds_the_face_where_the_detector_does_not(clip, monkeypatch):
    monkeypatch.setattr(landmarks, "detect_all", lambda *_: [])
    found = find_landmarks(clip.frames[:10])
    assert found.by_haar
    assert found.remarks == ["no face for dlib's detector: placed by the Haar cascade"]
    assert np.abs(found.points - clip.found.points[:10]).mean() < 1.5
    with pytest.raises(NoFace, match="no face"):
        find_landmarks(np.full((6, 120, 160, 3), 128, np.uint8))


@needs_dlib
def test_faces_in_few_frames_are_said(clip):
    hidden = clip.frames.copy()
    hidden[20:] = 128
    found = find_landmarks(hidden)
    assert (found.found, found.searched) == (4, 15)
    assert found.remarks == ["few faces: found in 4 of 15 frames searched"]


@needs_dlib
def test_what_is_no_predictor_is_one_line(tmp_path):
    assert (choose("auto"), choose("haar"), choose("dlib")) == ("dlib", "haar", "dlib")
    path = model_file(landmarks.PREDICTOR)
    assert choose(str(path)) == str(path)
    (tmp_path / "text.dat").write_text("no predictor")
    five = model_file("shape_predictor_5_face_landmarks.dat")
    for chosen, says in (
        (tmp_path / "none.dat", "no such file; expected auto, haar, dlib or the path"),
        (tmp_path / "text.dat", "no shape predictor of dlib"),
        (five, "a predictor of 5 points, expected 68"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            choose(str(chosen))
        assert "\n" not in str(caught.value)


def test_without_dlib_it_is_haar_or_a_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(landmarks.importlib.util, "find_spec", lambda name: None)
    assert choose("auto") == choose("haar") == "haar"
    for chosen in ("dlib", "some.dat"):
        with pytest.raises(DataError, match="pip install dlib-bin face_recognition_models"):
            choose(chosen)
    with pytest.raises(DataError, match="is not installed; pip install"):
        model_file(landmarks.PREDICTOR)


@pytest.mark.parametrize("chosen", ["haar", pytest.param("dlib", marks=needs_dlib)])
def test_the_alignment_is_a_setting_of_the_set(chosen, grid_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "raw" / "s1").mkdir(parents=True)
    shutil.copy(grid_dir / "s1" / "bbir6n.mpg", tmp_path / "raw" / "s1")
    out = tmp_path / "out"

    def command(landmarks):
        args = ["grid", tmp_path / "raw", out, "--workers", "1", "--landmarks", landmarks]
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args)])
        return prepare.main()

    assert command(chosen) == 0
    assert read_manifest(out)["settings"]["landmarks"] == chosen
    printed = capsys.readouterr().out
    assert ("commercial use" in printed) == (chosen == "dlib")
    assert command({"haar": "none.dat", "dlib": "haar"}[chosen]) == 2
    expected = {"haar": "none.dat", "dlib": "landmarks = dlib, not haar"}[chosen]
    assert expected in capsys.readouterr().err


def test_a_speaker_is_called_as_in_the_tree_not_as_where_a_link_leads(tmp_path):
    real, tree = tmp_path / "store" / "s1", tmp_path / "tree"
    real.mkdir(parents=True)
    (real / "aaaa.mpg").touch()
    (tree / "s8").mkdir(parents=True)
    (tree / "s7").symlink_to(real)
    (tree / "s8" / "bbbb.mpg").symlink_to(real / "aaaa.mpg")
    (tree / "s8" / "again").symlink_to(tree)  # round in a circle
    found = {(source.speaker, source.name) for source in grid.find_clips(tree)}
    assert found == {("s7", "aaaa"), ("s8", "bbbb")}


def test_the_contact_sheet_shows_every_speaker():
    def clips(counts):
        return [
            {"speaker": f"s{i}", "file": f"s{i:03d}/{j:03d}"}
            for i, count in enumerate(counts)
            for j in range(count)
        ]

    shown = prepare._shown(clips([200, 1, 1, 3]))
    assert len(shown) == prepare.CONTACT_CLIPS
    counts = [sum(clip["speaker"] == f"s{i}" for clip in shown) for i in range(4)]
    assert counts == [59, 1, 1, 3]
    assert shown == sorted(shown, key=lambda clip: clip["file"])
    many = prepare._shown(clips([2] * 70))
    assert [clip["file"] for clip in many] == [f"s{i:03d}/000" for i in range(70)]
    assert len(prepare._shown(clips([2, 2]))) == 4


def test_a_run_knows_how_its_faces_were_aligned(tmp_path):
    data = prepare.prepare_synthetic(
        tmp_path / "set", clips=6, speakers=3, seconds=0.4, size=(64, 48), workers=1
    )
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["settings"]["landmarks"] = "dlib"  # as `prepare grid` writes it
    (data / "manifest.json").write_text(json.dumps(manifest))
    args = "--preset demo --kernels eager --workers 0 --frames 6 --batch-size 2 --steps 1"
    args += " --model.base-channels 4 --model.audio-dim 16 --model.identity-dim 8"
    args += f" --model.fused-dim 12 --model.rank 4 --data {data} --out {tmp_path / 'run'}"
    assert load_config(train(parse(args.split()))).alignment == "dlib"
