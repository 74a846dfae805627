"""The paper's Table 1: train and evaluate every row under one protocol, and print the table.

    python -m train.table1                                   built-in set, demo size, two CPU cores
    python -m train.table1 --data PREPARED --preset paper    the paper's sizes on a prepared set
    python -m train.table1 --rows cp cp-none --seeds 1       some rows only; all are named below

The protocol: a SyncNet and an identity embedder are trained for the metrics; the encoders are
pretrained with concatenation and frozen; every row then trains its fusion, generator and
discriminators (Speech2Vid trains everything) with the same number of steps, clips and frames, once
per seed, stops when the validation's PSNR no longer rises (not Speech2Vid), and is tested on
speakers of the test split. A run that was stopped or killed goes on with the same command.

OUT/table.md, table.json     the table so far, written after every row
OUT/report.html              table, pictures, videos and curves in one file
OUT/<row>-<seed>/            the runs; also pretrain, syncnet.safetensors, embedder.safetensors
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path

import torch

from train.data.batches import open_set
from train.errors import UserError, run
from train.files import as_json, write_json
from train.jobs import JobFailed
from train.source import find_data
from train.table1.config import Table1Config, parse
from train.table1.report import SETTINGS_FILE, write_report, write_table
from train.table1.rows import ROWS
from train.table1.tasks import plan, run_tasks

#: What may differ between a table and its continuation.
MAY_CHANGE = ("rows", "seeds", "jobs", "kernels", "device", "out")


def table1(config: Table1Config) -> Path:
    """Fill the table; return the report's path."""
    out = config.out
    check_out(config)
    root = check_trainings(config)
    claim(config)
    failed = run_tasks(plan(config, root), out, config.at_once(), lambda _: write_table(out))
    text = write_table(out)
    report = write_report(out, root)
    print(f"\n{text}\n{report}")
    if failed:
        raise JobFailed(
            f"failed: {', '.join(failed)}; see {out}/*.log; the same command tries again"
        )
    return report


def check_trainings(config: Table1Config) -> Path:
    """Check every row's settings, and that the data suit them; return the data's directory."""
    try:
        base = config.scheduled(config.base(), config.steps)
        for key in config.rows:
            ROWS[key].configure(base)
    except ValueError as error:
        raise UserError(str(error)) from None
    root = find_data(base, small=True)
    for split, frames in (("train", config.frames), ("val", None), ("test", None)):
        open_set(root, split, base.model, frames=frames)
    return root


def check_out(config: Table1Config) -> None:
    """UserError unless OUT is new or empty, or holds the same table."""
    path = config.out / SETTINGS_FILE
    try:
        if path.exists():
            old = json.loads(path.read_text())
            for key, value in as_json(dataclasses.asdict(config)).items():
                if key not in MAY_CHANGE and old.get(key) != value:
                    flag = key.replace("_", "-")
                    raise UserError(
                        f"{config.out} holds a table with --{flag} {old.get(key)}, not {value}; "
                        "leave the flag out or choose another --out"
                    )
        elif config.out.exists() and any(config.out.iterdir()):
            raise UserError(f"--out {config.out}: not empty and no table; choose another directory")
    except (OSError, ValueError) as error:
        raise UserError(f"--out {config.out}: cannot be used ({error})") from None


def claim(config: Table1Config) -> None:
    """Make OUT and keep the settings there."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / SETTINGS_FILE, as_json(dataclasses.asdict(config)))
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be used ({error})") from None


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    about = inspect.cleandoc(__doc__ or "")
    return run(lambda: table1(parse(about=about)), "the same command goes on")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
