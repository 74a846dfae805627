"""The published system's checkpoints: imported, they make its frames; exported, they are equal."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch

from model import Animator
from model.published import STATES, published_config, published_tensors
from tests.train.helpers import CPU, TINY, run
from tests.train.published import CREMA, GRID, PUBLISHED, SMALL, TIMIT, System, save, system
from train import sda
from train.data.landmarks import FIVE, align_landmarks
from train.errors import UserError
from train.evaluate import EvaluateConfig, evaluate
from train.export import ExportConfig, export
from train.run.checkpoint import load_run, read_checkpoint


@pytest.mark.parametrize("rates", [GRID, CREMA, TIMIT])
def test_an_imported_checkpoint_makes_the_published_frames(tmp_path, rates):
    published = system(SMALL, rates)
    whole = published.checkpoint()
    source = save(tmp_path / "grid.dat", whole | {"epoch": 3, "remarks": ["extra"]})
    out = sda.import_checkpoint(source, tmp_path / "out")
    config, model = load_run(out, CPU, "eager")
    assert (config.model.sample_rate, config.model.fps) == rates
    still, sound, noise = published.inputs()
    made = model(still, sound[None], torch.Generator().manual_seed(1))[0]
    expected = published.double()(still.double(), sound.double(), noise.double())
    assert made.shape == expected.shape
    assert expected.std() > 0.05
    assert (expected[1:] - expected[:-1]).abs().mean() > 0.005  # sound and noise count
    assert (made - expected).abs().max() < 1e-5
    cut = published(still.double(), sound[: 7 * published.stride].double(), noise.double())
    assert (cut - expected)[-1].abs().max() > 1e-3  # sound beyond the last whole frame is heard

    sda.export_checkpoint(out, tmp_path / "again.dat")
    again = torch.load(tmp_path / "again.dat", weights_only=False)  # as the published code does
    assert again.keys() == whole.keys()
    for name, value in whole.items():
        if isinstance(value, dict):
            assert again[name].keys() == value.keys()
            for key, tensor in value.items():
                other = again[name][key]
                assert other.dtype == tensor.dtype, key
                assert other.is_contiguous(), key
                assert torch.equal(other, tensor), key
        elif name == "mean_face":
            assert again[name].dtype == value.dtype
            assert np.array_equal(again[name], value)
        else:
            assert (again[name], type(again[name])) == (value, type(value)), name


@pytest.mark.parametrize(
    ("rates", "speech"), [(GRID, 1_492_816), (CREMA, 1_490_896), (TIMIT, 1_493_456)]
)
def test_the_published_sizes(rates, speech):
    """Tensor counts and shapes of the published files, which are not at hand."""
    with torch.device("meta"):
        whole = System(PUBLISHED, rates).checkpoint()
    config = published_config(whole, 64)
    expected = {f"{s}.{name}": x.shape for s in STATES for name, x in whole[s].items()}
    found = published_tensors(config)
    assert {name: x.shape for name, x in found.items()} == expected
    counts = [sum(name.startswith(s + ".") for name in found) for s in STATES]
    assert counts == [45, 31, 59]
    sizes = [
        sum(x.numel() for name, x in whole[s].items() if "running" not in name and x.ndim)
        for s in STATES
    ]
    assert sizes == [speech, 12_721_024, 41_061_652]


@pytest.fixture(scope="module")
def small():
    return system().checkpoint()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run at the rates of the prepared set of the tests."""
    folder = tmp_path_factory.mktemp("sda")
    whole = system(SMALL, (16_000, 25)).checkpoint()
    return sda.import_checkpoint(save(folder / "a.dat", whole), folder / "run")


def test_an_imported_run_is_evaluated_and_exported(imported, data, tmp_path):
    row = evaluate(
        EvaluateConfig(imported, data=str(data), landmarks="none", clips=1, kernels="eager")
    )
    assert row["psnr"].value is not None
    small = export(ExportConfig(imported, tmp_path / "half"))
    assert load_run(small, CPU)[0].places == load_run(imported, CPU)[0].places
    with pytest.raises(UserError, match="half: no run of"):
        sda.export_checkpoint(small, tmp_path / "back.dat")


def test_an_imported_run_animates_a_photo(imported):
    animator = Animator(imported)
    assert np.array(animator.places).shape == (5, 2)
    photo = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    animation = animator(photo, np.zeros(16_000, np.float32), sample_rate=16_000, aligned=True)
    assert animation.frames.shape == (25, 32, 24, 3)


def test_training_takes_the_encoders_of_an_imported_run(imported, data, tmp_path, monkeypatch):
    sizes = ["--model.audio-layers", "2", "--model.noise-dim", "3"]
    where = ["--encoders", str(imported), "--data", str(data), "--out", str(tmp_path / "run")]
    assert run([*TINY, *sizes, *where, "--steps", "1"], monkeypatch) == 0
    before, after = read_checkpoint(imported)[0], read_checkpoint(tmp_path / "run")[0]
    encoders = ("model.identity.", "model.audio.", "model.noise.")
    names = [name for name in before if name.startswith(encoders)]
    assert len(names) == 45 + 19 + 4
    for name in names:
        assert torch.equal(before[name], after[name]), name


def test_faces_are_aligned_to_the_mean_face(imported, small):
    config, _ = load_run(imported, CPU)
    five = small["mean_face"][list(FIVE)]
    places = np.array(config.places)
    # Frames of 32×24 are a quarter of those that places are given in, pixel by pixel.
    np.testing.assert_allclose((places + 0.5) / 4 - 0.5, five)
    landmarks = np.zeros((1, 68, 2))
    landmarks[0, FIVE] = [10, 150] + 5 * five[:, ::-1] * [1, -1]  # turned, and five times as large
    for (x, y), place in zip(landmarks[0, FIVE].round().astype(int), five, strict=True):
        picture = np.zeros((1, 200, 200, 3), np.uint8)
        picture[0, y - 4 : y + 5, x - 4 : x + 5] = 255
        aligned = align_landmarks(picture, landmarks, (32, 24), places)[0, 0].astype(float)
        seen = np.array([aligned.sum(0) @ np.arange(24), aligned.sum(1) @ np.arange(32)])
        np.testing.assert_allclose(seen / aligned.sum(), place, atol=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["encoder"].pop("rnn.bias_hh_l1"), "encoder.rnn.bias_hh_l1 is missing"),
        (lambda w: w["generator"].update(extra=torch.ones(1)), "generator.extra is unknown"),
        (lambda w: w["generator"].update({"dcl.3.weight": [1]}), "dcl.3.weight is a list"),
        (
            lambda w: w.update(audio_rate=40_000, audio_feat_samples=8000),
            r"encoder.encoder.cl.0.weight has shape \(1, 1, 80\), expected \(1, 1, 200\)",
        ),
        (lambda w: w["encoder_id"]["cl.0.1.bias"].fill_(torch.nan), "cl.0.1.bias has values"),
        (lambda w: w["encoder_id"]["cl.0.1.running_var"].neg_(), "cl.0.1.running_var has a neg"),
        (
            lambda w: w["generator"].update({"dcl.3.weight": torch.zeros(4, 3, 4, 4).half()}),
            "generator.dcl.3.weight is of torch.float16",
        ),
        (
            lambda w: w["generator"].update({"dcl.3.weight": torch.zeros(1).expand(4, 3, 4, 4)}),
            "generator.dcl.3.weight is not contiguous",
        ),
        (lambda w: w["encoder_id"].pop("cl.0.0.weight"), "cl.0.0.weight is missing"),
        (lambda w: w.pop("generator"), "no generator there"),
        (lambda w: w.update(encoder=[1]), "encoder is a list"),
        (lambda w: w.pop("mean_face"), "no mean_face there"),
        (lambda w: w.update(mean_face=np.zeros((68, 3))), r"mean_face of shape \(68, 3\)"),
        (lambda w: w.update(mean_face=np.zeros((68, 2))), "mean_face .* apart"),
        (lambda w: w.update(mean_face="face"), "mean_face is a str"),
        (lambda w: w.update(mean_face=np.zeros((68, 2), int)), "mean_face .* floats"),
        (lambda w: w.update(img_size=(32, 25)), "frames of 32×25"),
        (lambda w: w.update(img_size=32), "img_size is 32"),
        (lambda w: w.update(img_size=(2**70, 24)), "img_size"),
        (lambda w: w.update(aux_latent=3.5), "aux_latent is 3.5"),
        (lambda w: w.update(aux_latent=torch.ones(3)), "aux_latent is a Tensor"),
        (lambda w: w.update(id_enc_dim=9), r"encoder_id.cl.3.0.weight has shape"),
        (lambda w: w.update(audio_rate=44_100, audio_feat_samples=8820), "sample_rate=44100"),
        (lambda w: w.update(audio_feat_len=0.3), "audio_feat_len is 0.3: expected 0.2"),
        (lambda w: w.update(audio_feat_len=torch.ones(2)), "audio_feat_len is a Tensor"),
        (lambda w: w.update(rnn_gen_dim=128), "rnn_gen_dim is 128: expected 16"),
        (lambda w: w.update(sequential_noise=False), "sequential_noise is False"),
        (lambda w: w.update(video_rate=0), "video_rate is 0"),
        (lambda w: w.update(video_rate=float("nan")), "video_rate is nan"),
    ],
)
def test_what_is_wrong_is_named(small, tmp_path, change, message):
    whole = {
        name: {k: v.clone() for k, v in value.items()} if isinstance(value, dict) else value
        for name, value in small.items()
    }
    change(whole)
    with pytest.raises(UserError, match=message) as error:
        sda.import_checkpoint(save(tmp_path / "bad.dat", whole), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


class Hostile:
    """Unpickled without care, it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("form", ["whole", "value", "state", "array", "pickle", "archive", "newer"])
def test_a_hostile_file_runs_nothing(small, tmp_path, form):
    trap = tmp_path / "trap"
    evil, path = Hostile(trap), tmp_path / "bad.dat"
    match form:
        case "whole":
            save(path, evil)
        case "value":
            save(path, small | {"audio_rate": evil})
        case "state":
            save(path, small | {"encoder": {**small["encoder"], "rnn.bias_ih_l0": evil}})
        case "array":
            save(path, small | {"mean_face": np.array([[evil]], dtype=object)})
        case "pickle":
            path.write_bytes(pickle.dumps(evil))
        case "archive":
            torch.save(small | {"audio_rate": evil}, path)
        case "newer":
            save(path, small | {"audio_rate": evil}, pickle_protocol=4)
    with pytest.raises(UserError, match=r"bad\.dat: (asks for 'posix\.system'|not a file)"):
        sda.import_checkpoint(path, tmp_path / "out")
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


def test_damage_anywhere_is_one_line_or_harmless(small, tmp_path):
    """Bytes changed at random: another value of a weight, or an error that says so."""
    content = save(tmp_path / "good.dat", small).read_bytes()
    rng, path, messages = np.random.default_rng(7), tmp_path / "bad.dat", []
    for _ in range(60):
        damaged = bytearray(content)
        damaged[rng.integers(20_000)] ^= int(rng.integers(1, 256))  # most of it is the pickle's
        path.write_bytes(damaged)
        try:
            sda.read_published(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert "\n" not in "".join(messages)


def test_files_from_before_numpy_2_and_archives_are_read(small, tmp_path):
    whole = small | {"audio_rate": np.int64(16_000), "mean_face": small["mean_face"].astype("f4")}
    path = save(tmp_path / "new.dat", whole)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    (tmp_path / "old.dat").write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    torch.save(whole, tmp_path / "archive.dat")
    for name in ("new", "old", "archive"):
        found = sda.read_published(tmp_path / f"{name}.dat")
        assert found.values["audio_rate"] == 16_000
        assert np.array_equal(found.mean_face, whole["mean_face"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"not a checkpoint", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n", "Git LFS pointer"),
        (None, "No such file"),
        ("cut", "damaged"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    small, tmp_path, monkeypatch, capsys, content, message
):
    path = tmp_path / "grid.dat"
    if content == "cut":
        content = save(path, small).read_bytes()[:-4000]
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["sda", "import", str(path), str(tmp_path / "out")])
    assert sda.main() == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(imported, tmp_path, small, monkeypatch, capsys):
    kept = tmp_path / "kept.dat"
    kept.write_bytes(b"mine")
    for arguments in (
        ["export", imported, kept],
        ["import", save(tmp_path / "a", small), tmp_path],
    ):
        monkeypatch.setattr(sys, "argv", ["sda", *map(str, arguments)])
        assert sda.main() == 2
    assert "exists already" in (said := capsys.readouterr().err)
    assert "not empty" in said
    assert kept.read_bytes() == b"mine"
