"""Work in child processes: starts them, watches them, and ends them.

A child has one job at a time, so that one that dies (a crash, or out of memory) costs its own job
only. Children end with their parent, even if that is killed, and leave Ctrl-C to it.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch

from train.errors import UserError, one_line, print_anything

DIED = "the worker process died (crash, or out of memory)"


class JobFailed(UserError):
    """Work that others wait for failed."""


@dataclass(frozen=True)
class Job:
    """``call(*arguments)``, and its name in reports. Both have to be picklable."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class Outcome(NamedTuple):
    """What a job returned, or in one line why it did not; ``error`` is an error of the system."""

    job: Any  # the Job, or what its caller made of one
    value: Any
    problem: str = ""
    error: OSError | None = None


def usable_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(jobs: Iterable[Job], workers: int) -> Generator[Outcome, None, None]:
    """Do the jobs in so many processes, or in this one if ``workers`` is 1; yield their outcomes.

    Raises ``OSError`` if a job does: the disk is full or gone, and no other will fare better; and
    :class:`JobFailed` if processes die before any job is done. Closed early, it lets the jobs
    that are under way finish.
    """
    if workers == 1:
        for job in jobs:
            yield _raised(attempt(job))
        return
    queue = iter(jobs)
    finished = died = 0
    with Children() as children:
        while True:
            for job in itertools.islice(queue, workers - len(children.busy)):
                children.start(job)
            if not children.busy:
                return
            for outcome in children.finished():
                died += outcome.problem == DIED
                finished += outcome.problem != DIED
                if died > workers and not finished:
                    raise JobFailed(
                        "worker processes die as they start: out of memory, or called from a "
                        'script without `if __name__ == "__main__":`; try one worker'
                    )
                yield _raised(outcome)


def attempt(job: Job) -> Outcome:
    """Do a job in this process."""
    try:
        return Outcome(job, job.call(*job.arguments))
    except Exception as error:
        kind = "" if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: "
        system = error if isinstance(error, OSError) else None
        return Outcome(job, None, kind + one_line(error), system)


def _raised(outcome: Outcome) -> Outcome:
    if outcome.error is not None:
        raise outcome.error
    return outcome


class Children:
    """Child processes at work; as a context, it leaves none behind.

    Args:
        threads: threads that PyTorch and OpenCV use in each.
        keep: whether a child takes the next job, or every job gets a fresh one.
        patient: whether the jobs under way may finish when the context is left early.
    """

    def __init__(self, *, threads: int = 1, keep: bool = True, patient: bool = True) -> None:
        self.threads, self.keep, self.patient = threads, keep, patient
        self.busy: dict[_Child, Job] = {}
        self._idle: list[_Child] = []

    def start(self, job: Job, log: Path | None = None) -> None:
        """Begin a job; ``log`` gets what it prints, and the traceback if it fails."""
        child = self._idle.pop() if self._idle else _Child(self.threads)
        self.busy[child] = job
        child.send((job.call, job.arguments, log))

    def finished(self, timeout: float | None = None) -> list[Outcome]:
        """Wait until a job ends, at most ``timeout`` seconds; the outcomes of those that ended."""
        handles = [h for child in self.busy for h in (child.connection, child.process.sentinel)]
        ready = wait(handles, timeout)
        outcomes = []
        for child, job in list(self.busy.items()):
            if child.connection in ready or child.process.sentinel in ready:
                del self.busy[child]
                answer = child.receive()
                if answer is None:
                    answer = Outcome(job, None, DIED)
                elif self.keep:
                    self._idle.append(child)
                else:
                    child.end()
                outcomes.append(answer._replace(job=job))
        return outcomes

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.busy:
            if not self.patient:
                child.process.terminate()
        for child in (*self.busy, *self._idle):
            child.end()


class _Child:
    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads))
        # the child inherits the mask: Ctrl-C is left to the parent
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def send(self, work: tuple[Any, ...]) -> None:
        with contextlib.suppress(BrokenPipeError):  # if it has died, `receive` will tell
            self.connection.send(work)

    def receive(self) -> Outcome | None:
        """The outcome of its job, without the job; None if it died."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, ConnectionResetError):
            return None

    def end(self) -> None:
        """Let it finish its job, then end it."""
        self.connection.close()
        self.process.join()


def _serve(connection: Connection, threads: int) -> None:
    """Do the jobs that come, until the parent closes the connection."""
    end_with_parent()
    with contextlib.suppress(OSError):  # when memory runs out, not the parent but this one goes
        Path("/proc/self/oom_score_adj").write_text("1000")
    print_anything()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    while True:
        try:
            call, arguments, log = connection.recv()
        except EOFError:
            return
        if log is not None:
            with open(log, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            call = _Told(call)
        outcome = attempt(Job("", call, arguments))
        sys.stdout.flush()
        try:
            connection.send(outcome._replace(job=None))
        except BrokenPipeError:
            return  # the parent has gone on without it


class _Told:
    """A call that prints how it fails."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.call(*arguments)
        except Exception as error:
            traceback.print_exc()
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise


def end_with_parent() -> None:
    """End this process, started by ``multiprocessing``, within a second of its parent's end.

    Nothing that kills the parent prevents it, and a parent that is gone already counts: left
    alone, this process would go on writing, or wait for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this process was not started by multiprocessing")
    # Its number as it started this process: by now ours may be that of who adopts orphans.
    threading.Thread(target=_end_after, args=(parent.pid,), daemon=True).start()


def _end_after(parent: int | None) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
