"""Runs jobs in worker processes; neither a job that fails nor one that kills its worker ends it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import cv2

from .prepared import DataError


@dataclass(frozen=True)
class Job:
    """One file to make: its name in reports, and what writes it and returns its path."""

    label: str
    make: Callable[[], Path]


DIED = "the worker process died (crash, or out of memory)"
Outcome = tuple[Job, Path | None, str]


def usable_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(jobs: Iterable[Job], workers: int) -> Generator[Outcome, None, None]:
    """Does the jobs in `workers` processes; yields (job, its file or None, why not).

    A worker that dies takes the pool with it. The jobs it may have died of are then tried one by
    one in processes of their own, so that only the guilty one is lost.
    """
    if workers == 1:
        yield from map(_attempt, jobs)
        return
    queue = iter(jobs)
    pool = _pool(workers)
    waiting: dict[Future[Outcome], Job] = {}
    any_finished = False
    try:
        while True:
            lost: list[Job] = []
            for job in itertools.islice(queue, 2 * workers - len(waiting)):
                try:
                    waiting[_submit(pool, job)] = job
                except BrokenProcessPool:
                    lost.append(job)
            if not waiting and not lost:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    lost.append(job)
                else:
                    any_finished = True
                    yield future.result()
            if lost:
                wait(waiting)
                pool.shutdown()
                lost += waiting.values()
                waiting.clear()
                outcomes = list(map(_attempt_alone, lost))
                any_finished |= any(reason != DIED for _, _, reason in outcomes)
                if not any_finished:
                    raise DataError(
                        "worker processes die as they start: out of memory, or called from a "
                        'script without `if __name__ == "__main__":`; try one worker'
                    )
                yield from outcomes
                pool = _pool(workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(job: Job) -> Outcome:
    try:
        return job, job.make(), ""
    except OSError:
        raise  # the disk is full or gone: no other clip will fare better
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return job, None, kind + str(error)


def _attempt_alone(job: Job) -> Outcome:
    with _pool(1) as pool:
        try:
            return _submit(pool, job).result()
        except BrokenProcessPool:
            return job, None, DIED


def _pool(workers: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, initializer=cv2.setNumThreads, initargs=(1,))


def _submit(pool: ProcessPoolExecutor, job: Job) -> Future[Outcome]:
    # Submitting starts workers, and they inherit the mask: Ctrl-C is left to the parent, which
    # lets them finish their clips.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_attempt, job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
