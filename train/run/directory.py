"""The run directory: configuration, environment, metrics.jsonl and TensorBoard logs.

RUN/config.json             the resolved configuration
RUN/environment.json        versions, device and command line
RUN/metrics.jsonl           one object a line: step, then every metric of that step
RUN/tensorboard/            the same for TensorBoard
RUN/checkpoint.safetensors  the last checkpoint; checkpoint-000120.safetensors an older one
RUN/best.safetensors        the model at the best validation
RUN/samples/                picture grids and videos
RUN/.lock                   while a process trains: which
"""

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.tensorboard import SummaryWriter

import polyfusion
from train.config import CONFIG_FILE, TrainConfig
from train.errors import UserError
from train.fields import NUMBER, STEP, wrong_field
from train.files import write_atomically, write_json
from train.run.lock import LOCK_FILE, locked

METRICS_FILE = "metrics.jsonl"


@contextmanager
def claimed(config: TrainConfig) -> Iterator[Path]:
    """Make and hold the directory of a new run; :class:`UserError` if it has something in it."""
    with locked(make_directory(config)) as run:
        if any(path.name != LOCK_FILE for path in run.iterdir()):
            hint = f"go on with: {how_to_go_on(run)}" if (run / CONFIG_FILE).exists() else "no run"
            raise UserError(f"--out {run}: not empty ({hint}); or choose another directory")
        yield run


def how_to_go_on(run: Path) -> str:
    """The command that goes on with a run."""
    return f"python -m train --resume {shlex.quote(str(run))}"


def make_directory(config: TrainConfig) -> Path:
    """Make the directory of a new run where there is none: ``--out``, or the next free name."""
    if config.out is None:
        runs, number = Path("runs"), 1
        _make(runs)
        name = config.fusion if config.system == "polyfusion" else config.system
        while True:
            out = runs / f"{name}-{number}"
            try:
                out.mkdir()
                return out
            except FileExistsError:
                number += 1
    _make(config.out)
    return config.out


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot make this directory ({error.strerror}); choose another"
        ) from None


def write_record(run: Path, config: TrainConfig, device: torch.device) -> None:
    """Write the configuration and the environment of this process."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    environment = {
        "command": sys.argv,
        "python": platform.python_version(),
        "polyfusion": polyfusion.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "device": str(device),
        "gpu": gpu,
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    write_json(run / CONFIG_FILE, config.to_dict())
    write_json(run / "environment.json", environment)


class MetricsLog:
    """Write metrics.jsonl and TensorBoard, and first drop what lies after step ``start``."""

    def __init__(self, run: Path, start: int = 0):
        path = run / METRICS_FILE
        kept = [line for line in read_metrics(run) if line["step"] <= start]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("ab", buffering=0)
        board = run / "tensorboard"
        self._board = SummaryWriter(board, purge_step=start + 1 if board.exists() else None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line; floats are rounded to 6 significant digits."""
        line: dict[str, Any] = {"step": step}
        line |= {name: float(f"{value:.6g}") for name, value in metrics.items()}
        text = f"{json.dumps(line)}\n".encode()
        try:
            while text:  # a full disk takes a part, and refuses the rest
                text = text[self._file.write(text) :]
        except OSError as error:
            error.filename = self._file.name
            raise
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl; a last line cut short by a kill is left out.

    Raises :class:`UserError` that names the line and the field for anything else.
    """
    path = run / METRICS_FILE
    try:
        content = path.read_text(errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    *whole, _ = content.split("\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = text
        kinds = dict.fromkeys(line, NUMBER) if isinstance(line, dict) else {}
        wrong = wrong_field(line, {**kinds, "step": STEP})
        if wrong is None and "step" not in line:
            wrong = "step is missing"
        if wrong:
            raise UserError(f"{path}, line {number}: {wrong}; delete this line")
        lines.append(line)
    return lines


def validations(run: Path, step: int) -> list[float]:
    """The PSNR of every validation up to ``step``.

    Those after do not count: a killed run logged them and kept no checkpoint.
    """
    lines = [line for line in read_metrics(run) if line["step"] <= step]
    return [line["val/psnr"] for line in lines if "val/psnr" in line]


def stalled(run: Path, patience: int, step: int) -> bool:
    """Whether the last ``patience`` validations (0: never) brought no better PSNR than before."""
    found = validations(run, step)
    return 0 < patience < len(found) and max(found[-patience:]) <= max(found[:-patience])


def improved(run: Path, step: int) -> bool:
    """Whether the validation of ``step`` is the best so far."""
    *before, last = validations(run, step)
    return not before or last > max(before)
