"""The work behind a table: what there is to do, and doing it in child processes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.config import CONFIG_FILE, TrainConfig
from train.embedder import EmbedderConfig, train_embedder
from train.evaluate import EVALUATION_FILE, EvaluateConfig, evaluate
from train.jobs import Children, Job, JobFailed
from train.run.checkpoint import checkpoints, read_checkpoint
from train.run.directory import read_metrics, stalled
from train.syncnet import SyncNetConfig, train_syncnet
from train.table1.config import Table1Config
from train.table1.report import PRETRAIN, TRUTH
from train.table1.rows import ROWS

SYNCNET, EMBEDDER = "syncnet.safetensors", "embedder.safetensors"
POLL = 0.5  # seconds between two looks at the progress


def _zero() -> int:
    return 0


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Task(Job):
    """A job of the table, begun once the tasks it ``needs`` are done.

    ``steps`` and ``at()`` measure its progress; it is left out where ``done()`` already.
    """

    needs: tuple[str, ...] = ()
    steps: int = 0
    at: Callable[[], int] = _zero
    done: Callable[[], bool] = _never


def plan(config: Table1Config, root: Path) -> list[Task]:
    """List every piece of work in the order in which it is begun, whether done already or not."""
    out = config.out
    base = dataclasses.replace(config.base(), data=str(root))
    measuring = EvaluateConfig(
        out,
        data=str(root),
        clips=config.clips,
        syncnet=out / SYNCNET,
        embedder=out / EMBEDDER,
        baselines=False,  # they are the same beside every row
        kernels=config.kernels,
        device=config.device,
    )

    def fill(name: str, training: TrainConfig, *needs: str) -> Task:
        run = out / name
        training = dataclasses.replace(training, out=run)
        return Task(
            name,
            fill_row,
            (training, dataclasses.replace(measuring, target=run)),
            needs,
            training.steps,
            at=lambda: progress(run),
            done=lambda: (run / EVALUATION_FILE).exists(),
        )

    pretraining = config.scheduled(
        dataclasses.replace(base, fusion="concat"), config.pretrain_steps
    )
    truth = dataclasses.replace(
        measuring,
        target=out / PRETRAIN,
        ground_truth=True,
        baselines=True,
        out=out / f"{TRUTH}.json",
    )
    tasks = [
        fill(PRETRAIN, pretraining, "networks"),
        Task(
            "networks",
            train_networks,
            (out, str(root), config.device),
            done=lambda: (out / SYNCNET).exists() and (out / EMBEDDER).exists(),
        ),
        Task(
            TRUTH,
            evaluate,
            (truth,),
            ("networks", PRETRAIN),
            done=lambda: (out / f"{TRUTH}.json").exists(),
        ),
    ]
    for seed in range(config.seeds):
        for key in config.rows:
            row = ROWS[key]
            training = dataclasses.replace(
                row.configure(config.scheduled(base, config.steps)),
                seed=seed,
                encoders=str(out / PRETRAIN) if row.pretrained else "joint",
            )
            needs = ("networks", PRETRAIN) if row.pretrained else ("networks",)
            tasks.append(fill(f"{key}-{seed}", training, *needs))
    return tasks


def fill_row(training: TrainConfig, measuring: EvaluateConfig) -> None:
    """Train a run, or go on with it, then test it."""
    from train.loop import train  # in the row's own process: the table itself needs no loop

    run = measuring.target
    step = read_checkpoint(run)[1]["step"] if checkpoints(run) else 0
    if step < training.steps and not stalled(run, training.patience, step):
        begun = (run / CONFIG_FILE).exists()
        train(dataclasses.replace(training, resume=run if begun else None))
    evaluate(measuring)


def train_networks(out: Path, root: str, device: str) -> None:
    """Train the two networks that measure; one that is there already is kept."""
    if not (out / EMBEDDER).exists():
        train_embedder(EmbedderConfig(out / EMBEDDER, data=root, device=device))
    if not (out / SYNCNET).exists():
        train_syncnet(SyncNetConfig(out / SYNCNET, data=root, device=device))


def progress(run: Path) -> int:
    """The last step that a run has logged."""
    lines = read_metrics(run)
    return lines[-1]["step"] if lines else 0


def run_tasks(
    tasks: list[Task], out: Path, at_once: int, on_done: Callable[[Task], Any] = lambda _: None
) -> list[str]:
    """Run ``tasks`` in order, ``at_once`` at a time, with logs OUT/<name>.log and a progress bar.

    A failure does not stop the others, but for those that need it; their names are returned.
    Raises :class:`JobFailed` if the failed one was needed.
    """
    waiting = [task for task in tasks if not task.done()]
    finished = {task.name for task in tasks if task not in waiting}
    failed: dict[str, str] = {}  # and why
    threads = max(1, (os.cpu_count() or 1) // at_once)

    def steps_done(under_way: Iterable[Task]) -> int:
        done = sum(task.steps for task in tasks if task.name in finished)
        return done + sum(min(task.at(), task.steps) for task in under_way)

    with (
        Children(threads=threads, keep=False, patient=False) as children,
        tqdm(
            total=sum(task.steps for task in tasks),
            initial=steps_done(waiting),
            unit="step",
            dynamic_ncols=True,
            smoothing=0.02,
        ) as bar,
    ):
        running = children.busy
        while waiting or running:
            for task in [task for task in waiting if finished.issuperset(task.needs)]:
                if len(running) >= at_once:
                    break
                waiting.remove(task)
                children.start(task, out / f"{task.name}.log")
            if not running:
                lost = [name for name in failed if any(name in task.needs for task in waiting)]
                raise JobFailed(f"{', '.join(lost)} failed: {failed[lost[0]]}")
            for task, _, problem, _ in children.finished(POLL):
                if problem:
                    failed[task.name] = f"{problem} (see {out / f'{task.name}.log'})"
                    bar.write(f"failed  {task.name}: {failed[task.name]}")
                else:
                    finished.add(task.name)
                    bar.write(f"done    {task.name}")
                    on_done(task)
            bar.set_postfix_str(" ".join(sorted(task.name for task in running.values())))
            bar.update(max(0, steps_done(running.values()) - bar.n))  # type: ignore[arg-type]
    return list(failed)
