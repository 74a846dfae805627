"""Runs that are stopped, killed or started twice: nothing is lost, and one command goes on."""

import os
import pty
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch

from tests.train.helpers import TINY
from train.errors import UserError
from train.files import remove_leftovers, replacing
from train.run.checkpoint import checkpoints, read_checkpoint
from train.run.directory import read_metrics
from train.run.lock import LOCK_FILE, locked
from train.run.stopping import SIGNALS, stopping

#: One thread, for results that are equal to the bit.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
#: A tiny run whose every step takes a while longer, so that a signal finds it at one.
SLOW = """
import sys, time
from train.__main__ import main
from train.trainer.gan import Trainer
step, seconds = Trainer.step, float(sys.argv.pop(1))
Trainer.step = lambda *args: (time.sleep(seconds), step(*args))[1]
sys.exit(main())
"""
STEPS = 30
#: What a run says that was killed between its last checkpoint and its end.
ALREADY = f"already at step {STEPS} of {STEPS}"
#: Kills at random moments; 50 by hand.
KILLS = int(os.environ.get("POLYFUSION_KILLS", "3"))


def hear_signals() -> None:
    """Undo in the child what ``nohup`` or a background job did to this process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def begin(*args: object, seconds: float = 0.3, **options) -> subprocess.Popen:
    """Start a training whose steps take so long."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    words = [sys.executable, "-c", SLOW, str(seconds), *map(str, args)]
    return subprocess.Popen(words, env=ENVIRONMENT, preexec_fn=hear_signals, **options)


def train(*args: object) -> subprocess.CompletedProcess:
    """Train to the end."""
    words = [sys.executable, "-m", "train", *map(str, args)]
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def wait_for_step(process: subprocess.Popen, out, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_metrics(out)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same(one, other) -> None:
    """The two runs have the same checkpoint to the bit and logged the same, but for their speed."""
    a, b = read_checkpoint(one), read_checkpoint(other)
    assert a[1]["step"] == b[1]["step"] == STEPS
    assert a[0].keys() == b[0].keys()
    assert [name for name in a[0] if not torch.equal(a[0][name], b[0][name])] == []
    logs = [
        [{k: v for k, v in line.items() if "speed" not in k} for line in read_metrics(run)]
        for run in (one, other)
    ]
    assert logs[0] == logs[1]


def hidden(out) -> list[str]:
    return [path.name for path in out.rglob(".*")]


@pytest.fixture(scope="module")
def common(data) -> list[object]:
    never = ["--checkpoint-every", 1000, "--sample-every", 1000, "--validate-every", 7]
    return [*TINY, "--data", data, "--steps", STEPS, *never]


@pytest.fixture(scope="module")
def whole(common, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = train(*common, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_and_the_printed_command_goes_on(number, common, whole, tmp_path):
    out = tmp_path / "a run"
    workers = ["--workers", 1] if number == signal.SIGTERM else []
    process = begin(*common, *workers, "--out", out, start_new_session=True)
    wait_for_step(process, out, 3)
    # to all of its processes, as a terminal and most schedulers do
    os.killpg(process.pid, number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, error
    step = read_checkpoint(out)[1]["step"]
    assert 3 <= step == read_metrics(out)[-1]["step"] < 10
    said = error.splitlines()[-1]
    assert said.startswith(f"stopped at step {step} of {STEPS}, saved in {out}; ")
    assert hidden(out) == []
    words = shlex.split(said.split("go on with: ")[1])
    assert words[:3] == ["python", "-m", "train"]
    done = train(*words[3:])
    assert done.returncode == 0, done.stderr
    assert_same(whole, out)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(common, tmp_path):
    out = tmp_path / "run"
    process = begin(*common, "--out", out, seconds=60)
    while not (out / "config.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert any("SIGINT: saving" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
    process.communicate()
    assert not (out / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_a_run_outlives_its_terminal_long_enough_to_save(common, tmp_path):
    """Where writing to the terminal fails from the signal on."""
    out = tmp_path / "run"
    words = [sys.executable, "-c", SLOW, "0.3", *map(str, common), "--out", str(out)]
    child, terminal = pty.fork()
    if not child:
        hear_signals()
        os.execve(sys.executable, words, ENVIRONMENT)
    deadline = time.monotonic() + 120
    while len(read_metrics(out)) < 2 and time.monotonic() < deadline:
        os.read(terminal, 1 << 16)
    os.close(terminal)  # the system sends SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert read_checkpoint(out)[1]["step"] >= 2


@pytest.mark.slow
def test_a_run_whose_reader_is_gone_saves(common, tmp_path):
    """Ctrl-C ends ``python -m train 2>&1 | tee`` at both of its ends."""
    out = tmp_path / "run"
    process = begin(*common, "--out", out, stderr=subprocess.STDOUT)
    wait_for_step(process, out, 2)
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.wait(60) == 130
    assert read_checkpoint(out)[1]["step"] >= 2


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_goes_on(common, whole, tmp_path):
    out = tmp_path / "run"
    process = begin(*common, "--out", out)
    wait_for_step(process, out, 8)  # past a validation
    process.kill()
    process.communicate()
    assert not (out / "checkpoint.safetensors").exists()
    (out / f".checkpoint.{process.pid}.tmp.safetensors").write_bytes(b"half")
    again = train(*common, "--out", out)
    assert again.returncode == 2
    assert f"go on with: python -m train --resume {out}" in again.stderr
    done = train("--resume", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{out}: no checkpoint yet, so the run starts again at step 0\n") == 1
    assert hidden(out) == []
    assert_same(whole, out)


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_the_same(data, whole, tmp_path):
    """In steps, validations, samples and saves, before the first checkpoint and after the last."""
    rng = random.Random(KILLS)
    often = ["--checkpoint-every", 2, "--sample-every", 3, "--validate-every", 7]
    begun = killed = 0
    while killed < KILLS:
        out = tmp_path / f"run-{begun}"
        begun += 1
        while killed < KILLS:
            fresh = [*TINY, "--data", data, "--steps", STEPS, *often, "--out", out]
            go_on = ["--resume", out] if (out / "config.json").exists() else fresh
            process = begin(*go_on, seconds=0, stdout=subprocess.DEVNULL)
            while not (out / LOCK_FILE).exists() and process.poll() is None:
                time.sleep(0.01)
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 4))
            process.kill()
            error = process.communicate()[1]
            if process.returncode == 0 or ALREADY in error:
                break
            assert process.returncode == -signal.SIGKILL, error
            (out / LOCK_FILE).unlink(missing_ok=True)  # to see the next process take it
            killed += 1
        else:
            go_on = ["--resume", out] if (out / "config.json").exists() else fresh
            done = train(*go_on)
            assert done.returncode == 0 or ALREADY in done.stderr, done.stderr
        assert_same(whole, out)
        assert hidden(out) == []
        assert len(checkpoints(out)) == 2


@pytest.mark.slow
def test_a_second_process_is_refused_by_the_name_of_the_first(common, tmp_path):
    out = tmp_path / "run"
    process = begin(*common, "--out", out, seconds=3.0)  # far longer than the two others live
    wait_for_step(process, out, 1)
    for args in (["--resume", out], [*common, "--out", out]):
        second = train(*args)
        assert second.returncode == 2
        assert second.stderr.splitlines()[-1].startswith(f"error: {out}: process {process.pid} on ")
        assert "Traceback" not in second.stderr
    assert process.poll() is None
    process.terminate()
    process.communicate()
    assert process.returncode == 143


def test_a_lock_ends_with_its_holder_even_if_that_has_forked(tmp_path):
    """As a loader does: its workers notice some seconds later that the run is gone."""
    code = (
        "import os, sys, time; from pathlib import Path; from train.run.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child: print(child, flush=True)\n"
        "    time.sleep(60)"
    )
    words = [sys.executable, "-c", code, tmp_path]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {holder.pid} on"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        with locked(tmp_path) as run:
            assert str(os.getpid()) in (run / LOCK_FILE).read_text()
        assert list(tmp_path.iterdir()) == []
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_only_leftovers_of_dead_processes_are_removed(tmp_path):
    (tmp_path / "samples").mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    with replacing(tmp_path / "samples" / "a.mp4") as mine:
        mine.touch()
    kept = [
        tmp_path / ".config.1.tmp.json",  # alive, somebody else's
        tmp_path / f".config.{os.getppid()}.tmp.json",
        tmp_path / f"config.{dead.pid}.tmp.json",
        tmp_path / f".config.{dead.pid}.json",
    ]
    theirs = mine.with_name(mine.name.replace(str(os.getpid()), str(dead.pid)))
    gone = [mine, theirs, tmp_path / f".notes.{dead.pid}.tmp"]
    for path in kept + gone:
        path.touch()
    remove_leftovers(tmp_path)
    assert [path for path in kept + gone if path.exists()] == kept


def test_handlers_are_put_back_and_stay_out_of_other_threads():
    def handlers() -> list[object]:
        return [signal.getsignal(number) for number in SIGNALS]

    before = handlers()
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with stopping() as stop:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert stop.code == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.code == 143
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, hangup)
        signal.signal(signal.SIGTERM, terminate)
    assert handlers() == before

    seen = []

    def elsewhere() -> None:
        with stopping():
            seen.extend(handlers())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == before
