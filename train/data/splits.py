"""The division of a corpus into train, val and test: by speakers, drawn or given."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from train.data.prepared import DataError
from train.files import write_json

Splits = dict[tuple[str, str], str]  # (speaker, name) -> "train", "val" or "test"
SPLITS = {"train": 16, "val": 7, "test": 10}  # speakers of each, the proportions of Vougioukas


def draw_splits(
    clips: Collection[tuple[str, str]], seed: int, shares: Mapping[str, int] = SPLITS
) -> Splits:
    """Assign (speaker, name) pairs to train, val and test in the proportions ``shares``.

    Whole speakers are assigned, at least one to val and to test, the one with most clips to train.
    One or two speakers cannot be kept apart: then the clips are split instead, and val and test
    show faces that were trained on.
    """
    counts = Counter(speaker for speaker, _ in clips)
    if len(counts) < 3:
        return _divide(sorted(clips), None, seed, shares)
    speakers = sorted(counts, key=natural)
    split = _divide(speakers, max(speakers, key=counts.__getitem__), seed, shares)
    return {(speaker, name): split[speaker] for speaker, name in clips}


def read_splits(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read {"train": [speakers], "val": [...], "test": [...]} as speaker -> split."""
    expected = 'expected {"train": ["s1", ...], "val": [...], "test": [...]}'
    try:
        lists = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read splits {path} ({error.strerror}); {expected}") from None
    except ValueError as error:
        raise DataError(f"splits {path} is not JSON ({error}); {expected}") from None
    if (
        not isinstance(lists, dict)
        or lists.keys() - SPLITS
        or not all(isinstance(speakers, list) for speakers in lists.values())
    ):
        raise DataError(f"splits {path} has another form; {expected}")
    pairs = [(str(speaker), split) for split, speakers in lists.items() for speaker in speakers]
    twice = [speaker for speaker, n in Counter(speaker for speaker, _ in pairs).items() if n > 1]
    if twice:
        raise DataError(f"splits {path} names {', '.join(twice)} more than once")
    return dict(pairs)


def write_splits(path: Path, assigned: Splits) -> None:
    """Write the speakers of each split for ``read_splits``, unless it is clips that are divided."""
    speakers: dict[str, set[str]] = {split: set() for split in SPLITS}
    for (speaker, _), split in assigned.items():
        speakers[split].add(speaker)
    if sum(map(len, speakers.values())) == len({speaker for speaker, _ in assigned}):
        write_json(path, {split: sorted(who, key=natural) for split, who in speakers.items()})


def _divide(items: list, first: object, seed: int, shares: Mapping[str, int]) -> dict:
    """Shuffle ``items``, bring ``first`` to the front, cut them into the splits."""
    order = [items[i] for i in np.random.default_rng(seed).permutation(len(items))]
    order.sort(key=lambda item: item != first)
    whole = sum(shares.values())
    val, test = (
        max(1, round(len(items) * shares[split] / whole)) if len(items) > 2 else 0
        for split in ("val", "test")
    )
    names = ["train"] * (len(items) - val - test) + ["val"] * val + ["test"] * test
    return dict(zip(order, names, strict=True))


def natural(value: object) -> list:
    """Sorting key that puts s2 before s10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(value))]
