"""Checkpoints that are damaged, emptied or not finite: named when read, and never written."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.train.helpers import CONFIG, TINY, batch, trainer
from tests.train.helpers import run as command
from train.errors import UserError
from train.export import ExportConfig, export
from train.files import write_json
from train.loop import resume
from train.metrics.score import MetricError
from train.metrics.weights import load_network, save_network
from train.run.checkpoint import (
    BEST_FILE,
    CHECKPOINT_FILE,
    checkpoints,
    load_run,
    read_checkpoint,
    save_checkpoint,
)
from train.run.directory import read_metrics
from train.tensors import not_finite

WEIGHT = "model.generator.final.weight"
INFO = {"step": 1, "config": CONFIG.to_dict()}


@pytest.fixture(scope="module")
def trained():
    """A trainer after one step."""
    made = trainer()
    made.step(batch(), torch.Generator().manual_seed(0))
    return made


@pytest.fixture(scope="module")
def original(trained, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_json(run / "config.json", CONFIG.to_dict())
    save_checkpoint(run / CHECKPOINT_FILE, trained.modules, trained.optimizers, INFO)
    return run


@pytest.fixture
def run(original, tmp_path) -> Path:
    """A run directory to damage."""
    return shutil.copytree(original, tmp_path / "run")


def rewrite(run: Path, change, *, checksums: bool) -> None:
    """Change the tensors as another program would, with the metadata of before or without it."""
    path = run / CHECKPOINT_FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    if not checksums:
        metadata.pop("checksums")
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("damage", ["a bit", "zeros"])
def test_a_flipped_bit_and_a_hole_are_found_by_name(run, damage):
    path = run / CHECKPOINT_FILE
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    if damage == "a bit":
        header = json.loads(content[8:start])
        content[start + header[WEIGHT]["data_offsets"][0] + 5] ^= 4
        expected = f"{WEIGHT} is damaged"
    else:
        content[-(16 << 10) :] = bytes(16 << 10)
        expected = "is damaged: its checksum differs"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_run(run, torch.device("cpu"), "eager")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", [WEIGHT, "adam.generator.3.exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(run, key, value):
    rewrite(run, lambda tensors, _: tensors[key].view(-1)[0:1].fill_(value), checksums=False)
    with pytest.raises(UserError, match=f"{key} has a value that is not finite"):
        read_checkpoint(run)


def test_nothing_is_saved_of_a_model_that_is_not_finite(run, trained):
    before = (run / CHECKPOINT_FILE).read_bytes()
    broken = trainer()
    with torch.no_grad():
        broken.model.generator.final.weight[0] = float("-inf")
    with pytest.raises(UserError, match=f"not written, because {WEIGHT} has"):
        save_checkpoint(run / CHECKPOINT_FILE, broken.modules, broken.optimizers, INFO)
    assert [path.name for path in run.iterdir() if path.suffix != ".json"] == [CHECKPOINT_FILE]
    assert (run / CHECKPOINT_FILE).read_bytes() == before


def drop(prefix):
    def change(tensors, metadata) -> None:
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]

    return change


def forget(prefix):
    """As a file of an earlier version, which did not say what had a state either."""

    def change(tensors, metadata) -> None:
        drop(prefix)(tensors, metadata)
        metadata["polyfusion"] = json.dumps(INFO)

    return change


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (drop("adam.frame."), r"adam\.frame\.0\.exp_avg is missing"),
        (drop("adam.generator.2."), r"adam\.generator\.2\.exp_avg is missing"),
        (drop("adam.generator.2.exp_avg_sq"), r"adam\.generator\.2\.exp_avg_sq is missing"),
        (forget("adam.generator."), r"adam\.generator\.0\.exp_avg is missing"),
        (forget("adam.generator.2.step"), r"adam\.generator\.2\.step is missing"),
    ],
)
def test_a_missing_optimiser_state_is_refused_by_name(run, change, missing):
    rewrite(run, change, checksums=False)
    with pytest.raises(UserError, match=missing):
        resume(trainer(), run)
    load_run(run, torch.device("cpu"), "eager")  # the model is all there


def test_a_tensor_that_the_checksums_know_may_not_be_missing(run):
    rewrite(run, drop("adam.frame.0.step"), checksums=True)
    with pytest.raises(UserError, match=r"adam\.frame\.0\.step is missing"):
        read_checkpoint(run)


def test_a_state_of_another_shape_is_refused_by_name(run):
    def shrink(tensors, _) -> None:
        tensors["adam.frame.0.exp_avg"] = torch.zeros(1)

    rewrite(run, shrink, checksums=False)
    with pytest.raises(UserError, match=r"adam\.frame\.0\.exp_avg has no parameter of its shape"):
        resume(trainer(), run)


def test_a_file_of_an_earlier_version_goes_on_as_one_with_checksums(run, original):
    rewrite(run, forget("nothing"), checksums=False)
    one, other = trainer(), trainer(dataclasses.replace(CONFIG, seed=7))
    assert resume(one, original) == resume(other, run) == 1
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    states = (t.optimizers["generator"].state_dict()["state"] for t in (one, other))
    for a, b in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_large_values_are_finite_although_their_sum_is_not():
    assert not_finite({"half": torch.full((9,), 6e4, dtype=torch.float16)}) is None
    assert not_finite({"a": torch.zeros(()), "b": torch.tensor([1.0, float("nan")])}) == "b"
    opposite = torch.tensor([float("inf"), float("-inf")], dtype=torch.bfloat16)
    assert not_finite({"count": torch.tensor(3), "empty": torch.zeros(0), "c": opposite}) == "c"


def test_a_measuring_network_is_checked_too(tmp_path):
    path = tmp_path / "network.safetensors"
    save_network(path, "a", torch.nn.Linear(5, 3), {})
    load_network(path, "a", torch.nn.Linear(5, 3), "…")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MetricError, match="weight is damaged"):
        load_network(path, "a", torch.nn.Linear(5, 3), "…")


@pytest.fixture(scope="module")
def six_steps(data, tmp_path_factory):
    """A run of six steps, checkpoints at 2, 4 and 6, validated at 3 and 6."""
    out = tmp_path_factory.mktemp("six") / "run"
    args = [*TINY, "--data", str(data), "--out", str(out), "--steps", "6", "--validate-every", "3"]
    with pytest.MonkeyPatch.context() as patch:
        assert command([*args, "--sample-every", "100"], patch) == 0
    return out


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def logged(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if "speed" not in k} for line in read_metrics(run)]


def test_a_damaged_newest_checkpoint_falls_back_and_the_run_ends_the_same(
    six_steps, tmp_path, monkeypatch, capsys
):
    assert [path.name for path in checkpoints(six_steps)] == [
        CHECKPOINT_FILE,
        "checkpoint-000004.safetensors",
    ]
    run = shutil.copytree(six_steps, tmp_path / "run")
    damage(run / CHECKPOINT_FILE)
    capsys.readouterr()
    load_run(run, torch.device("cpu"), "eager")
    assert export(ExportConfig(run, tmp_path / "small")).is_dir()
    said = capsys.readouterr().err.splitlines()
    assert len(set(said)) == 1
    assert said[0].startswith(f"{run / CHECKPOINT_FILE}: not a readable checkpoint (")
    assert said[0].endswith(f"of step 4: {run / 'checkpoint-000004.safetensors'}")

    assert command(["--resume", str(run)], monkeypatch) == 0
    for one, other in zip(checkpoints(six_steps), checkpoints(run), strict=True):
        a, b = read_checkpoint(one), read_checkpoint(other)
        assert one.name == other.name
        assert a[1]["step"] == b[1]["step"]
        assert a[0].keys() == b[0].keys()
        assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    assert logged(run) == logged(six_steps)


def test_a_run_without_a_good_checkpoint_is_refused(six_steps, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(six_steps, tmp_path / "run")
    for path in checkpoints(run):
        damage(path)
    assert command(["--resume", str(run), "--steps", "7"], monkeypatch) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {run / CHECKPOINT_FILE}: not a readable checkpoint")


def test_a_kill_while_the_names_change_leaves_a_checkpoint(six_steps, tmp_path, monkeypatch):
    run = shutil.copytree(six_steps, tmp_path / "run")
    (run / CHECKPOINT_FILE).unlink()
    assert read_checkpoint(run)[1]["step"] == 4
    assert command(["--resume", str(run), "--steps", "5", "--keep", "1"], monkeypatch) == 0
    assert checkpoints(run) == [run / CHECKPOINT_FILE]
    assert read_checkpoint(run)[1]["step"] == 5


def test_the_best_model_by_validation_is_kept(six_steps, tmp_path, monkeypatch):
    found = {line["step"]: line["val/psnr"] for line in logged(six_steps) if "val/psnr" in line}
    assert sorted(found) == [3, 6]
    tensors, info = read_checkpoint(six_steps / BEST_FILE)
    assert info["step"] == max(found, key=lambda step: (found[step], -step))
    assert {key.split(".")[0] for key in tensors} == {"model"}
    run = shutil.copytree(six_steps, tmp_path / "run")
    monkeypatch.setattr("train.loop.validate", lambda _: {"val/psnr": 0.0})
    assert command(["--resume", str(run), "--steps", "7"], monkeypatch) == 0
    assert read_checkpoint(run / BEST_FILE)[1] == info
    config, model = load_run(run / BEST_FILE, torch.device("cpu"), "eager")
    assert config.steps == 7
    assert torch.equal(model.state_dict()[WEIGHT[6:]], tensors[WEIGHT])
