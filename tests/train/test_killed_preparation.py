"""Preparation killed at random moments: begun again it ends the same, and leaves nothing behind."""

import os
import random
import subprocess
import sys
import time
from contextlib import suppress

import pytest

KILLS = int(os.environ.get("POLYFUSION_KILLS", "1"))


def prepare(*words):
    command = [sys.executable, "-m", "train.prepare", *map(str, words), "--workers", "2"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    )


def processes(group):
    """Numbers of the group's processes that still run."""
    found = subprocess.run(["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True)
    lines = [line.split() for line in found.stdout.splitlines()[1:]]
    return [pid for pid, number, state in lines if number == str(group) and state[0] != "Z"]


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(params=["synthetic", "grid"])
def words(request, tmp_path):
    """What follows the set's directory and comes before it on the command line."""
    if request.param == "synthetic":
        return ["synthetic"], ["--clips", "8", "--speakers", "3", "--seconds", "1"]
    raw = tmp_path / "raw"
    for number, clip in enumerate(sorted(request.getfixturevalue("grid_dir").rglob("*.mpg"))[:6]):
        (raw / f"s{number}").mkdir(parents=True)
        (raw / f"s{number}" / clip.name).symlink_to(clip)
    return ["grid", raw], ["--landmarks", "haar"]


@pytest.mark.slow
def test_it_ends_the_same(words, tmp_path):
    before, after = words
    started = time.monotonic()
    process = prepare(*before, tmp_path / "whole", *after)
    assert process.wait(240) == 0, process.stderr.read()
    seconds, rng = time.monotonic() - started, random.Random(KILLS)
    command = [*before, tmp_path / "killed", *after]
    for _ in range(KILLS):
        process = prepare(*command)
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.1, 0.9) * seconds)
        process.kill()
        process.wait()
        # 5 s on a free machine: a worker looks for its parent once it has imported its work
        deadline = time.monotonic() + 15
        while processes(process.pid):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.1)
    process = prepare(*command)
    assert process.wait(240) == 0, process.stderr.read()
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
