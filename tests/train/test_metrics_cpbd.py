"""CPBD against the numbers of the ``cpbd`` package, on real frames and drawn ones."""

import numpy as np
import pytest
import torch

from train.data.media import read_media
from train.metrics.cpbd import cpbd, cpbd_score, edge_widths
from train.metrics.score import MetricError

# Computed with cpbd 1.0.7 (PyPI; its missing `scipy.ndimage.imread` supplied, SciPy 1.17,
# scikit-image 0.26) on the grey picture `cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)`. In the same
# comparison every pixel's edge width agreed, on these and 30 further pictures.
WHOLE = {
    ("s1/bbir6n", 0): 0.324020,
    ("s1/bbir6n", 37): 0.360803,
    ("s5/lbax4n", 0): 0.357930,
    ("s5/lbax4n", 37): 0.366821,
    ("s22/lbbc2a", 0): 0.278321,
    ("s22/lbbc2a", 37): 0.297076,
    ("s32/sbwe5n", 0): 0.297564,
    ("s32/sbwe5n", 37): 0.298328,
}
# Frame 37, rows 100..227 and columns 132..227: the size of the models' frames.
CROPPED = {"s1/bbir6n": 0.252101, "s5/lbax4n": 0.317935, "s22/lbbc2a": 0.230380}
CROPPED |= {"s32/sbwe5n": 0.133803}
FORMULA = 0.750433
CAMERA = 0.748166  # skimage.data.camera()


def as_frames(picture):
    """(1, 3, H, W) from a grey picture, whose luma is the picture again."""
    return torch.from_numpy(np.repeat(picture[None, None], 3, axis=1))


@pytest.fixture(scope="module")
def clips(grid_dir):
    names = sorted({name for name, _ in WHOLE})
    clips = {name: read_media(grid_dir / f"{name}.mpg", 16000)[0][[0, 37]] for name in names}
    return {name: torch.from_numpy(c.transpose(0, 3, 1, 2).copy()) for name, c in clips.items()}


def drawn():
    """A picture of curved ridges beside a ramp, 150 x 200, from integer arithmetic alone."""
    rows, columns = np.mgrid[:150, :200]
    curves = (rows * rows // 7 + columns * columns // 5 + rows * columns // 11) % 256
    return np.where(columns > 60, curves, 2 * columns).astype(np.uint8)


@pytest.mark.parametrize(("name", "frame"), WHOLE)
def test_real_frames_score_as_in_the_package(clips, name, frame):
    value = cpbd(clips[name])[0, [0, 37].index(frame)].item()
    # exact on the same pixels; 0.003 for decoders that round a colour otherwise
    assert value == pytest.approx(WHOLE[name, frame], abs=3e-3)


@pytest.mark.parametrize("name", CROPPED)
def test_small_frames_score_as_in_the_package(clips, name):
    value = cpbd(clips[name][1:, :, 100:228, 132:228]).item()
    assert value == pytest.approx(CROPPED[name], abs=5e-3)


def test_drawn_picture_scores_as_in_the_package():
    assert cpbd(as_frames(drawn())).item() == pytest.approx(FORMULA, abs=1e-6)


def test_standard_picture_scores_as_in_the_package():
    data = pytest.importorskip("skimage.data")
    assert cpbd(as_frames(data.camera())).item() == pytest.approx(CAMERA, abs=1e-6)


def widths_of(row):
    """Edge widths along a row, repeated to a picture with one brighter line to make a ridge."""
    picture = np.tile(np.asarray(row, np.float64), (9, 1))
    return edge_widths(torch.from_numpy(picture)[None])[0, 4].tolist()


def test_width_of_an_edge_is_its_monotone_run():
    widths = widths_of([10, 10, 10, 20, 60, 110, 130, 130, 130, 130])
    assert widths[4] == 4  # from 10 to 130 over four steps
    assert widths_of([130, 130, 130, 110, 60, 20, 10, 10, 10, 10])[4] == 4


def test_only_whole_blocks_count_unless_asked(clips):
    frames = clips["s1/bbir6n"][1:, :, 100:228, 132:228].clone()
    before = cpbd(frames), cpbd(frames, blocks="cover")
    noise = torch.randint(0, 20, (128, 20), generator=torch.Generator().manual_seed(0))
    frames[..., 76:] += noise.byte()  # beyond the only column of blocks
    assert cpbd(frames).item() == pytest.approx(before[0].item(), abs=0.01)
    assert cpbd(frames, blocks="cover").item() != pytest.approx(before[1].item(), abs=0.02)
    whole = frames[..., :64]
    assert cpbd(whole, blocks="cover") == cpbd(whole)


def test_blur_lowers_it_and_chunks_do_not_matter(clips):
    frames = clips["s5/lbax4n"]
    blurred = torch.nn.functional.avg_pool2d(frames.float(), 5, 1, 2).to(torch.uint8)
    sharp, soft = cpbd(frames, chunk=1), cpbd(blurred)
    assert torch.equal(sharp, cpbd(frames, chunk=7))
    assert (soft < 0.6 * sharp).all()


def test_pictures_without_edges():
    flat = torch.full((2, 3, 64, 64), 7, dtype=torch.uint8)
    assert cpbd(flat).tolist() == [[0, 0]]
    with pytest.raises(MetricError, match="frames of 64 x 7: CPBD needs sides of 8"):
        cpbd(flat[..., :7])


def test_a_frame_smaller_than_a_block_is_one_block(clips):
    frames = clips["s5/lbax4n"][:2].float()
    soft = torch.nn.functional.avg_pool2d(frames, 5, 1, 2)
    small, blurred = (x[:, :, 60:124, 130:178].to(torch.uint8) for x in (frames, soft))
    sharp = cpbd(small)
    assert ((sharp > 0) & (sharp <= 1)).all()
    assert (cpbd(blurred) < 0.8 * sharp).all()
    assert torch.equal(cpbd(small, blocks="cover"), sharp)
    assert cpbd_score(small)["cpbd"].value == pytest.approx(sharp.mean().item())
