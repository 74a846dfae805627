"""Which of a launch's few configurations is used: the fastest here, measured once and remembered.

On a GPU the first call of a launch with new sizes times every candidate, each with its buffers; the
choice is kept in this process and in ``tuned.json`` in the cache (``POLYFUSION_CACHE``, default
~/.cache/polyfusion), under the GPU, the version of Triton, the launch, its sizes rounded up to
powers of two, and what it computes in. ``POLYFUSION_AUTOTUNE=0`` takes the first candidate always;
so does a call that cannot be timed: without a GPU, or while a CUDA graph is captured. Every
candidate is deterministic, but two may round differently: switch tuning off, or copy the file, for
the same bits on another machine.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from polyfusion.build import cache_directory
from polyfusion.kernels.triton.common import capability, next_power_of_2, uses_tensor_cores

Tile = dict[str, int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """The configurations a launch can choose from, the first without measuring; never none."""

    name: str
    sizes: tuple[int, ...]
    tiles: list[Tile]


_chosen: dict[tuple[Any, ...], Tile] = {}
_sweeping = False
_record: list[tuple[Options, Tile | None]] | None = None


def vary(
    tile: Tile,
    tensor: Tensor,
    constants: dict[str, Any],
    cores: Sequence[Tile] = (),
    plain: Sequence[Tile] = (),
) -> list[Tile]:
    """The tile, and it with each of the changes: ``cores`` if it uses tensor cores, else ``plain``.

    Doubles, and the interpreter, have one configuration each.
    """
    if capability(tensor) is None or constants["ACC"].primitive_bitwidth == 64:
        return [tile]
    changed = [{**tile, **change} for change in (cores if uses_tensor_cores(constants) else plain)]
    return [tile, *(other for other in changed if other != tile)]


def tuned(
    options: Options, tensor: Tensor, constants: dict[str, Any], run: Callable[[Tile], Result]
) -> Result:
    """``run(tile)`` with the best of the options for a launch on a device like the tensor's.

    ``run`` makes its own buffers, so that it can be repeated. Raises the first candidate's error if
    none of them launches.
    """
    if _record is not None:
        _record.append((options, find(options, tensor, constants)))
        return run(options.tiles[0])
    if _sweeping:
        first, *_ = [run(tile) for tile in options.tiles]
        return first
    tile = find(options, tensor, constants)
    if tile is None and len(options.tiles) > 1 and _can_time(tensor):
        with _device(tensor):
            tile = _fastest(options.tiles, run)
        _remember(options, tensor, constants, tile)
    return run(tile or options.tiles[0])


def find(options: Options, tensor: Tensor, constants: dict[str, Any]) -> Tile | None:
    """The tile chosen for such a launch, in this process or an earlier one; None: none yet."""
    if not _on_gpu(tensor) or not enabled():
        return None
    here = _exactly(options, tensor, constants)
    if here not in _chosen:
        kept = _kept().get(key(options, tensor, constants))
        if kept not in options.tiles:
            return None
        _chosen[here] = options.tiles[options.tiles.index(kept)]
    return _chosen[here]


def key(options: Options, tensor: Tensor, constants: dict[str, Any]) -> str:
    """What a choice that is kept depends on, in words."""
    bucket = "x".join(str(next_power_of_2(max(1, size))) for size in options.sizes)
    kind = str(tensor.dtype).removeprefix("torch.") + "_tf32" * (constants["PRECISION"] == "tf32")
    gpu = f"{_gpu(tensor)} {capability(tensor)}"
    return f"{gpu}, triton {triton.__version__}, {options.name} {bucket} {kind}"


def _exactly(options: Options, tensor: Tensor, constants: dict[str, Any]) -> tuple[Any, ...]:
    """The same for this process, quick to make."""
    return options.name, options.sizes, tensor.device, tensor.dtype, constants["PRECISION"]


@contextlib.contextmanager
def sweep() -> Iterator[None]:
    """Run every candidate of every launch, to compile them all."""
    global _sweeping
    before, _sweeping = _sweeping, True
    try:
        yield
    finally:
        _sweeping = before


@contextlib.contextmanager
def record() -> Iterator[list[tuple[Options, Tile | None]]]:
    """Collect the options of every launch, and what was chosen if anything was; time nothing."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def cache_file() -> Path:
    """Where choices outlive the process."""
    return cache_directory() / "tuned.json"


def enabled() -> bool:
    """Whether candidates are measured at all."""
    return os.environ.get("POLYFUSION_AUTOTUNE", "1") != "0"


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _gpu(tensor: Tensor) -> str:
    return torch.cuda.get_device_name(tensor.device)


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device)


def _can_time(tensor: Tensor) -> bool:
    return _on_gpu(tensor) and enabled() and not torch.cuda.is_current_stream_capturing()


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the GPU, by CUDA events, the L2 cache cleared before each."""
    return triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")


def _fastest(tiles: Sequence[Tile], run: Callable[[Tile], Any]) -> Tile:
    times: dict[int, float] = {}
    errors: list[Exception] = []
    for index, tile in enumerate(tiles):
        try:
            times[index] = _milliseconds(functools.partial(run, tile))
        except Exception as error:  # too much shared memory here, say: the others may fit
            errors.append(error)
    if errors and not times:
        raise errors[0]
    return tiles[min(times, key=times.__getitem__)]


def _remember(options: Options, tensor: Tensor, constants: dict[str, Any], tile: Tile) -> None:
    _chosen[_exactly(options, tensor, constants)] = tile
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False
        ) as file:
            entries = {**_read(path), key(options, tensor, constants): tile}
            json.dump(entries, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        _complain(f"{path} cannot be written ({error.strerror}): every process tunes anew")
    _kept.cache_clear()


@functools.cache
def _kept() -> dict[str, Tile]:
    return _read(cache_file())


def _read(path: Path) -> dict[str, Tile]:
    """The choices in a file; none if it is missing, damaged or of another kind."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@functools.cache
def _complain(message: str) -> None:
    print(f"polyfusion: {message}", file=sys.stderr)
