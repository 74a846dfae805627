"""Machines that lack something: a run works, or ends with one line and exit code 2."""

from pathlib import Path

import pytest

from tests.train.helpers import TINY, run
from train import loop
from train.data.batches import next_batch
from train.data.prepared import DataError


def refusal(args: list[str], monkeypatch, capsys) -> str:
    """Run a training that is refused; its one line."""
    assert run([*TINY, "--steps", "1", *args], monkeypatch) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    line = said.splitlines()[-1]  # after the bar, if there was one
    assert line.startswith("error: ")
    return line


def test_seed_of_date_and_time(monkeypatch, capsys):
    said = refusal(["--seed", "20260101123456789000"], monkeypatch, capsys)
    assert "--seed 20260101123456789000: expected a number from 0 to 4294967295" in said


def test_no_home(monkeypatch, capsys):
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert "no home directory" in refusal([], monkeypatch, capsys)


def test_folder_that_cannot_be_written_to(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()  # root may write anywhere, but not into a file
    said = refusal(["--data", str(data)], monkeypatch, capsys)
    assert "--out runs: cannot make this directory (File exists); choose another" in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory."
        ),
        RuntimeError("unable to write to file </torch_7_123_4>: No space left on device (28)"),
    ],
)
def test_small_shared_memory(error, data, tmp_path, monkeypatch, capsys):
    def full(_batches):
        raise error

    monkeypatch.setattr(loop, "next_batch", lambda _: next_batch(map(full, [1])))
    said = refusal(["--data", str(data), "--out", str(tmp_path / "run")], monkeypatch, capsys)
    assert "use --workers 0" in said


def test_other_errors_of_a_loader_stay(monkeypatch):
    def damaged(_):
        raise DataError("a clip")

    with pytest.raises(DataError, match="a clip"):
        next_batch(map(damaged, [1]))
