"""Faces are aligned to the mean face of another run, as an imported checkpoint needs it."""

import numpy as np
import pytest

from train.config import TrainConfig
from train.data.decode import load_media
from train.data.landmarks import PLACES, installed
from train.data.media import write_video
from train.data.prepared import DataError, PreparedSet, read_places
from train.files import write_json
from train.prepare import prepare_grid

SHIFT = [6.0, 4.0]  # pixels to the right and down


def run_with(folder, places):
    folder.mkdir()
    write_json(folder / "config.json", TrainConfig(places=places).to_dict())
    return folder


@pytest.mark.parametrize("landmarks", ["haar", "dlib"])
def test_a_set_is_aligned_as_a_run(tmp_path, grid_dir, landmarks):
    if landmarks == "dlib" and not installed():
        pytest.skip("dlib is not installed")
    places = tuple(map(tuple, (PLACES + SHIFT).tolist()))
    like = run_with(tmp_path / "run", places)
    (tmp_path / "raw" / "s1").mkdir(parents=True)
    clip = next((grid_dir / "s1").glob("**/*.mpg"))
    media = load_media(clip, 16_000)
    short = tmp_path / "raw" / "s1" / "short.mp4"
    write_video(short, media.frames[:6], 25, media.audio[: 6 * 640], 16_000)
    made = {}
    for name, align_as in (("usual", None), ("like", like)):
        out = prepare_grid(
            tmp_path / "raw",
            tmp_path / name,
            landmarks=landmarks,
            align_as=align_as,
            min_frames=6,
            workers=1,
        )
        assert read_places(out) == (places if align_as else None)
        made[name] = next(iter(PreparedSet(out, None)))["frames"].numpy().astype(float)
    moved = made["like"][..., 4:, 6:] - made["usual"][..., :-4, :-6]
    assert np.abs(moved).mean() < 1.0
    assert np.abs(made["like"] - made["usual"]).mean() > 5


def test_a_run_without_a_mean_face_of_its_own(tmp_path):
    like = run_with(tmp_path / "run", None)
    with pytest.raises(DataError, match=r"align-as .*run: its faces have the usual places"):
        prepare_grid(tmp_path, tmp_path / "out", landmarks="haar", align_as=like)
