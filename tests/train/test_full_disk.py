"""A disk that is full at any write: one line that names the file, and exit code 2."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from tests.train.helpers import TINY, run
from train import prepare
from train.files import write_atomically
from train.run.directory import MetricsLog
from train.table1.report import write_table


def fill_disk(monkeypatch, name: str) -> None:
    """Let the disk take no file of this name."""
    replace = os.replace

    def full(source, target) -> None:
        if os.path.basename(target) == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "metrics.jsonl",
        "best.safetensors",
        "step_000002.png",
        "step_000002.mp4",
        "checkpoint.safetensors",
        "curves.png",
    ],
)
def test_training_names_the_file_that_the_disk_does_not_take(
    data, tmp_path, monkeypatch, capsys, name
):
    fill_disk(monkeypatch, name)
    out = tmp_path / "run"
    args = [*TINY, "--data", str(data), "--out", str(out), "--steps", "2"]
    assert run(args, monkeypatch) == 2
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert name in last
    assert "No space left on device" in last
    assert "done" not in said.out
    assert not list(out.rglob(name))
    assert not list(out.rglob(".*"))  # nothing half written


@pytest.mark.parametrize("name", ["manifest.json", "contact.png"])
def test_preparing_names_the_file_that_the_disk_does_not_take(tmp_path, monkeypatch, capsys, name):
    fill_disk(monkeypatch, name)
    args = [
        "synthetic",
        "--clips",
        "3",
        "--speakers",
        "3",
        "--seconds",
        "0.2",
        "--size",
        "32",
        "24",
        "--workers",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["prepare", *args, str(tmp_path / "set")])
    assert prepare.main() == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("error: ")
    assert "No space left on device" in said.err.splitlines()[-1]
    assert "look at" not in said.out
    assert not list(tmp_path.rglob(name))


def test_a_full_disk_is_told_of_the_table_by_name(tmp_path, monkeypatch):
    (tmp_path / "settings.json").write_text(
        '{"rows": [], "preset": "demo", "steps": 1, "batch_size": 1, "frames": 1,'
        ' "pretrain_steps": 1}'
    )
    fill_disk(monkeypatch, "table.md")
    with pytest.raises(OSError, match=r"table\.md"):
        write_table(tmp_path)


def test_a_full_disk_is_told_of_the_log_by_name(tmp_path):
    log = MetricsLog(tmp_path)
    log._file.close()
    with open("/dev/full", "ab", buffering=0) as log._file:
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            log.write(1, {"loss/l1": 1.0})
        log.close()


def test_the_name_is_the_files_and_not_the_temporary_ones(tmp_path):
    (tmp_path / "gone").mkdir()
    path = tmp_path / "gone" / "notes.txt"
    path.parent.rmdir()
    with pytest.raises(FileNotFoundError, match=r"gone/notes\.txt'$"):
        write_atomically(path, "α")


@pytest.mark.slow
def test_weights_that_do_not_fit_are_one_line(data, tmp_path):
    """With the system's own refusal, in the middle of the file."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "train", *TINY, "--data", str(data), "--out", str(out)]
    done = subprocess.run(
        [*words, "--steps", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10,) * 2),
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == f"error: {out / 'best.safetensors'}: File too large"
    assert "Traceback" not in done.stderr
    assert not list(out.glob("*.safetensors"))
