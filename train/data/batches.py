"""From a prepared set to the batches of a training run, reproducible from the step number alone."""

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Sampler

from model import ModelConfig
from train.data.prepared import DataError, PreparedSet
from train.jobs import end_with_parent
from train.run.stopping import SIGNALS


class StepSampler(Sampler[list[int]]):
    """Batches of indices for steps [start, stop), reproducible from (seed, step) alone.

    Epoch after epoch of shuffled clips; with ``balance`` above 0 clips are drawn one by one
    instead, a speaker of n clips in proportion to n^(1 − balance), so that at 1 every speaker is
    seen equally often. The indices count on (passes · clips + clip), so that every time a clip is
    taken it is cropped differently; a resumed run sees the batches that it would have seen.
    """

    def __init__(
        self,
        speakers: Sequence[str],
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        balance: float = 0.0,
    ):
        self.clips, self.batch_size, self.seed = len(speakers), batch_size, seed
        self.start, self.stop = start, stop
        counts = Counter(speakers)
        weights = [counts[speaker] ** -balance for speaker in speakers]
        self.weights = torch.tensor(weights, dtype=torch.float64) if balance else None

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        for step in range(self.start, self.stop):
            positions = range(step * self.batch_size, (step + 1) * self.batch_size)
            if self.weights is not None:
                rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
                drawn = torch.multinomial(self.weights, self.batch_size, True, generator=rng)
                yield [p * self.clips + i for p, i in zip(positions, drawn.tolist(), strict=True)]
                continue
            batch = []
            for position in positions:
                if position // self.clips != epoch:
                    epoch = position // self.clips
                    rng = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.clips, generator=rng).tolist()
                batch.append(epoch * self.clips + order[position % self.clips])
            yield batch


def open_set(root: Path, split: str, model: ModelConfig, **options) -> PreparedSet:
    """Open a split and check that its rates and shape suit the model; ``DataError`` if not."""
    data = PreparedSet(root, split, size=(model.height, model.width), **options)
    for flag, value, expected in (
        ("fps", data.fps, model.fps),
        ("sample-rate", data.sample_rate, model.sample_rate),
    ):
        if value != expected:
            raise DataError(
                f"{root} has {flag} {value:g} and the model {expected:g}; pass "
                f"--model.{flag} {value:g}, or prepare the set again at the model's rate"
            )
    height, width = data.stored_size
    if abs(height * model.width - width * model.height) > 0.02 * height * model.width:
        raise DataError(
            f"{root} holds frames of {height} x {width} and the model makes {model.height} x "
            f"{model.width}: another aspect ratio; change --model.height and --model.width"
        )
    return data


def by_turns(data: PreparedSet, count: int) -> PreparedSet:
    """Keep at most ``count`` clips: every speaker's first one, then every second one, …"""
    turns: dict[str, int] = {}
    order = []
    for clip in data.clips:
        turns[clip["speaker"]] = turns.get(clip["speaker"], 0) + 1
        order.append(turns[clip["speaker"]])
    chosen = sorted(range(len(order)), key=order.__getitem__)[:count]
    data.clips = [data.clips[i] for i in chosen]
    data.speakers = sorted({clip["speaker"] for clip in data.clips})
    return data


def make_loader(data: PreparedSet, sampler: StepSampler, workers: int, pin: bool) -> DataLoader:
    """A loader of dict(frames uint8 (B, T, 3, H, W), audio (B, T·s), index)."""
    return DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )


def stop_workers(batches: Iterator[Any]) -> None:
    """End the processes behind an iterator of :func:`make_loader` at once.

    The traceback of an error in one of them would keep it alive until this process ends, which
    would then wait for ever for processes that ignore its signals.
    """
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


def next_batch(batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Give the loader's next batch; ``DataError`` if its workers have no memory to hand it over."""
    try:
        return next(batches)
    except (RuntimeError, OSError) as error:
        if not re.search(r"shared memory|shm|bus error|torch_\d+_\d+", str(error), re.IGNORECASE):
            raise
        raise DataError(
            "the loader's processes have too little shared memory (/dev/shm); use --workers 0, "
            "or give the container more (docker run --shm-size 1g)"
        ) from None


def _start_worker(_worker: int) -> None:
    for number in SIGNALS:  # which may reach all processes: this one is needed for the last step
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in the threads to come as well
    end_with_parent()
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _obey(parent: int) -> None:
    """End this process when ``parent`` terminates it: ignored, it would be waited for for ever."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(1)
