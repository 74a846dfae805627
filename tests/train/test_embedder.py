"""ACD and ``python -m train.embedder``: definitions, unseen speakers, hostile input."""

import sys

import pytest
import torch

from train import embedder
from train.data.prepared import PreparedSet
from train.embedder import EmbedderConfig, augment, train_embedder
from train.metrics.identity import OurEmbedder, identity_scores, load_embedder
from train.metrics.score import MetricError
from train.metrics.weights import save_network
from train.prepare import prepare_synthetic


def command(monkeypatch, capsys, *args):
    """Run ``python -m train.embedder ARGS`` in this process; exit code and last error."""
    monkeypatch.setattr(sys, "argv", ["embedder", *map(str, args)])
    try:
        code = embedder.main()
    except SystemExit as stop:  # tyro's own usage errors
        code = stop.code
    return code, capsys.readouterr().err.strip().splitlines()[-1:]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A built-in set of 9 clips of 9 speakers, 0.4 s."""
    root = tmp_path_factory.mktemp("few") / "set"
    return prepare_synthetic(root, clips=9, speakers=9, seconds=0.4, workers=1)


def first_pixel(pictures):
    """Embeds a picture as its first two red values."""
    return pictures[:, 0, 0, :2].float()


def test_three_definitions_of_acd():
    still = torch.zeros(3, 4, 4, dtype=torch.uint8)
    frames = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    frames[0, 0, 0, :2] = torch.tensor([3, 4])
    frames[1, 0, 0, :2] = torch.tensor([6, 8])
    scores = identity_scores(first_pixel, still, frames)
    assert scores["acd"].value == pytest.approx((5 + 10 + 0) / 3)
    assert scores["acd_squared"].value == pytest.approx((25 + 100 + 0) / 3 / 2)
    assert scores["acd_pairwise"].value == pytest.approx((5 + 5 + 10) / 3)


def test_one_frame_has_no_pairs():
    frame = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    scores = identity_scores(first_pixel, frame[0], frame)
    assert scores["acd"].value == 0
    assert scores["acd_pairwise"].value is None
    assert scores["acd_pairwise"].reason == "one frame has no pairs"


def test_unsuitable_input_is_one_line():
    frames = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(MetricError, match=r"still of \(3, 4, 6\) and frames of \(3, 4, 4\)"):
        identity_scores(first_pixel, torch.zeros(3, 4, 6, dtype=torch.uint8), frames)
    with pytest.raises(MetricError, match="one clip, got 2"):
        identity_scores(first_pixel, frames[0], frames.expand(2, 2, 3, 4, 4))
    with pytest.raises(MetricError, match=r"embedder: expected \(3, E\) features, got \(3,\)"):
        identity_scores(lambda x: first_pixel(x)[:, 0], frames[0], frames)
    with pytest.raises(MetricError, match="still: expected a uint8 tensor"):
        identity_scores(first_pixel, frames[0].float(), frames)


def test_trains_and_writes_what_the_metric_reads(few, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "embedder.safetensors"
    code, _ = command(monkeypatch, capsys, "--data", few, "--out", out, "--steps", 2)
    assert code == 0
    network = load_embedder(out)
    frames = PreparedSet(few, "test")[0]["frames"]
    features = network(frames)
    assert features.shape == (len(frames), 128)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(frames)))
    assert identity_scores(network, frames[0], frames)["acd"].value >= 0


def test_size_of_the_pictures_hardly_matters(few):
    frames = PreparedSet(few, "test")[0]["frames"]
    small = PreparedSet(few, "test", size=(64, 48))[0]["frames"]
    network = OurEmbedder().eval()
    assert (network(frames) - network(small)).norm(dim=1).max() < 0.05


def test_augmentation_keeps_shape_and_is_reproducible():
    pictures = torch.rand(5, 3, 64, 48) * 2 - 1
    once, again = (augment(pictures, torch.Generator().manual_seed(1)) for _ in range(2))
    assert once.shape == pictures.shape
    assert torch.equal(once, again)
    assert (once - pictures).abs().mean() > 0.05


@pytest.fixture
def one_thread():
    """Threads of small networks mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_tells_unseen_speakers_apart(tmp_path):
    root = prepare_synthetic(
        tmp_path / "set", clips=80, speakers=40, seconds=0.4, seed=5, workers=2
    )
    config = EmbedderConfig(tmp_path / "embedder", str(root), steps=120, batch_size=32)
    result = train_embedder(config)
    assert result["speakers"] >= 15
    assert result["equal_error"] < 0.05
    assert result["same"] < 0.5 * result["different"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "-1"], "--steps -1: expected a positive number"),
        (["--data", "nowhere"], "prepared set nowhere does not exist"),
        (["--learning-rate", "inf"], "--learning-rate inf: expected a positive number"),
    ],
)
def test_mistakes_are_one_line(few, tmp_path, monkeypatch, capsys, args, message):
    args = args if "--data" in args else ["--data", few, *args]
    code, error = command(monkeypatch, capsys, "--out", tmp_path / "x", *args)
    assert code == 2
    assert message in error[0]
    assert not (tmp_path / "x").exists()


def test_too_few_speakers_is_one_line(tmp_path, monkeypatch, capsys):
    root = prepare_synthetic(tmp_path / "set", clips=4, speakers=3, seconds=0.4, workers=1)
    code, error = command(monkeypatch, capsys, "--out", tmp_path / "x", "--data", root)
    assert code == 2
    assert "one speaker in the training split" in error[0]


def test_nobody_unseen_is_one_line(tmp_path, monkeypatch, capsys):
    root = prepare_synthetic(tmp_path / "set", clips=8, speakers=2, seconds=0.4, workers=1)
    code, error = command(monkeypatch, capsys, "--out", tmp_path / "x", "--data", root)
    assert code == 2
    assert "at least two speakers outside the training split" in error[0]


def test_one_picture_of_a_speaker_is_one_line(tmp_path, monkeypatch, capsys):
    root = prepare_synthetic(tmp_path / "set", clips=12, speakers=12, seconds=0.2, workers=1)
    code, error = command(
        monkeypatch, capsys, "--out", tmp_path / "x", "--data", root, "--steps", "1"
    )
    assert code == 2
    assert "one picture of every speaker outside" in error[0]


def test_file_of_another_network_is_one_line(tmp_path):
    path = tmp_path / "weights"
    save_network(path, "our SyncNet", torch.nn.Linear(2, 2), {})
    with pytest.raises(MetricError, match="expected weights of our identity embedder, found our S"):
        load_embedder(path)
    save_network(path, OurEmbedder.title, torch.nn.Linear(2, 2), {})
    with pytest.raises(MetricError, match="not the weights of our identity embedder"):
        load_embedder(path)
