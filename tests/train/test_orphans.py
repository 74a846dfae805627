"""Processes end with the one that started them, whatever ended it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: A parent with a loader's worker and two jobs: one at work, one in the first moments of its start.
PARENT = """
import time
import torch
from train.data.batches import StepSampler, make_loader
from train.jobs import Children, Job

class Slow(torch.utils.data.Dataset):
    def __getitem__(self, index):
        time.sleep(60)

if __name__ == "__main__":
    children = Children()
    batches = iter(make_loader(Slow(), StepSampler(["s1"], 1, 0, 0, 9), 1, pin=False))
    children.start(Job("echo", time.time))
    assert children.finished()[0].problem == ""
    children.start(Job("at work", time.sleep, (60,)))
    children.start(Job("starting", time.sleep, (60,)))
    pids = [child.process.pid for child in children.busy]
    print(*pids, *(worker.pid for worker in batches._workers), flush=True)
    time.sleep(60)
"""


#: A parent that ends on an error while somebody still holds the loader.
FAILING = """
import sys
import torch
from train.data.batches import StepSampler, make_loader

class Broken(torch.utils.data.Dataset):
    def __getitem__(self, index):
        raise ValueError("broken")

batches = iter(make_loader(Broken(), StepSampler(["s1"], 1, 0, 0, 9), 1, pin=False))
sys.kept = batches
next(batches)
"""


def running(pid: int) -> bool:
    """Whether the process exists and is more than an entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_jobs_and_loaders_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, script]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3, parent.wait(60)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 12  # 1 s, and what a start takes on a busy machine
    while left := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_parent_that_fails_ends_with_its_loader():
    words = [sys.executable, "-c", FAILING]
    failed = subprocess.run(words, capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert failed.returncode == 1
    assert failed.stderr.rstrip().endswith("ValueError: broken")
