"""Runs pieces of work as processes, some at a time, each with a log of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

POLL = 0.5  # seconds


class TaskFailed(RuntimeError):
    """Work that others wait for failed; the message is one line for the user."""


def _zero() -> int:
    return 0


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Task:
    """``call(*arguments)`` in a process of its own, once the tasks it ``needs`` are done.

    ``steps`` and ``at()`` measure its progress; it is left out where ``done()`` already.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()
    steps: int = 0
    at: Callable[[], int] = _zero
    done: Callable[[], bool] = _never


def run_tasks(
    tasks: list[Task], out: Path, at_once: int, on_done: Callable[[Task], Any] = lambda _: None
) -> list[str]:
    """Run ``tasks`` in order, ``at_once`` at a time, with logs OUT/<name>.log and a progress bar.

    A failure does not stop the others, but for those that need it; their names are returned.
    :class:`TaskFailed` if the failed one was needed.
    """
    waiting = [task for task in tasks if not task.done()]
    finished = {task.name for task in tasks if task not in waiting}
    failed: list[str] = []
    running: dict[SpawnProcess, Task] = {}
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
    threads = max(1, (os.cpu_count() or 1) // at_once)
    total = sum(task.steps for task in tasks)
    before = sum(task.steps for task in tasks if task.name in finished)
    before += sum(min(task.at(), task.steps) for task in waiting)
    bar = tqdm(total=total, initial=before, unit="step", dynamic_ncols=True, smoothing=0.02)
    try:
        while waiting or running:
            for task in [j for j in waiting if finished.issuperset(j.needs)]:
                if len(running) >= at_once:
                    break
                waiting.remove(task)
                log = out / f"{task.name}.log"
                process = context.Process(
                    target=_work, args=(task.call, task.arguments, str(log), threads)
                )
                process.start()
                running[process] = task
            if not running:
                lost = [name for name in failed if any(name in task.needs for task in waiting)]
                raise TaskFailed(f"{', '.join(lost)} failed: {_last_line(out / f'{lost[0]}.log')}")
            time.sleep(POLL)
            for process in [p for p in running if not p.is_alive()]:
                process.join()
                task = running.pop(process)
                if process.exitcode == 0:
                    finished.add(task.name)
                    bar.write(f"done    {task.name}")
                    on_done(task)
                else:
                    failed.append(task.name)
                    bar.write(f"failed  {task.name}: {_last_line(out / f'{task.name}.log')}")
            done = sum(task.steps for task in tasks if task.name in finished)
            done += sum(min(task.at(), task.steps) for task in running.values())
            bar.set_postfix_str(" ".join(sorted(task.name for task in running.values())))
            bar.update(max(0, done - bar.n))
    finally:
        bar.close()
        for process in running:
            process.terminate()
        for process in running:
            process.join()
    return failed


def _work(call: Callable[..., Any], arguments: tuple[Any, ...], log: str, threads: int) -> None:
    """In the task's process: its output goes to the log, and it ends with its parent."""
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        call(*arguments)
    except Exception as error:
        traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _end_with(parent: int) -> None:
    """A killed parent must not leave a run that goes on writing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    lines = [line.removeprefix("error: ") for line in lines if line.strip()]
    return f"{lines[-1]} (see {log})" if lines else f"see {log}"
