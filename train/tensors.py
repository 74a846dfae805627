"""Safetensors files that know their content: checksums, compared when a file is read.

A checksum is the CRC-32 of a tensor's name, dtype, shape and bytes. It finds any damage of up to 32
bits in a row, misses one in four billion of the rest, and takes a second for a gigabyte.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

#: The entry of a file's metadata that holds them: JSON, {name of a tensor or an entry: checksum}.
CHECKSUMS = "checksums"


class Damaged(ValueError):
    """A tensor or an entry is not what was written; the message names it."""


def checksum(name: str, value: Tensor | np.ndarray | str) -> int:
    """Return the CRC-32 of a tensor with its name, dtype and shape, or of a text with its name."""
    if isinstance(value, str):
        return zlib.crc32(value.encode(), zlib.crc32(name.encode()))
    form = f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Tensor):  # by bytes: NumPy does not have all dtypes
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(np.ascontiguousarray(value).data, zlib.crc32(form.encode()))


def checksums(content: Mapping[str, Any]) -> str:
    """Return the metadata entry with the checksums of tensors and of other entries."""
    return json.dumps({name: checksum(name, value) for name, value in content.items()})


def compare(recorded: str | None, content: Mapping[str, Any]) -> None:
    """Raise :class:`Damaged` unless ``content`` has the checksums of the entry ``recorded``.

    A file of an earlier version has no such entry, and there is nothing to compare.
    """
    if recorded is None:
        return
    expected = json.loads(recorded)
    if not isinstance(expected, dict):
        raise Damaged(f"its {CHECKSUMS} are damaged")
    for name in sorted(expected.keys() ^ content.keys()):
        raise Damaged(f"{name} is missing" if name in expected else f"{name} does not belong there")
    for name, value in content.items():
        if checksum(name, value) != expected[name]:
            raise Damaged(f"{name} is damaged: its checksum differs")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, None if none does."""
    for name, value in tensors.items():
        # the sum is far quicker, and finite only if every value is
        if value.is_floating_point() and not (value.sum().isfinite() or value.isfinite().all()):
            return name
    return None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with checksums of its tensors and of ``metadata``; not atomic.

    Raises ``OSError`` if the disk does not take it.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    entries = {**metadata, CHECKSUMS: checksums({**metadata, **tensors})}
    try:
        save_file(tensors, path, metadata=entries)
    except SafetensorError as error:  # "… I/O error: File too large (os error 27)"
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file whole; return its tensors and metadata.

    Raises ``OSError``, ``SafetensorError``, or ``ValueError`` (:class:`Damaged` by name) if that is
    not what was written or has a value that is not finite.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        # copies: what is compared may not change, or end the process, with the file under it
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    recorded = metadata.pop(CHECKSUMS, None)
    compare(recorded, {**metadata, **tensors})
    bad = not_finite(tensors)
    if bad is not None:
        raise Damaged(f"{bad} has a value that is not finite")
    return tensors, metadata
