"""Count what a launch asks of memory and of the matrix units, in Triton's interpreter.

Every address and mask is computed as on a device, in the device's tiles, but nothing is read,
written or multiplied: loads give zeros. No kernel here goes another way for other values.
"""

import contextlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from polyfusion.kernels.triton import common
from polyfusion.kernels.triton.compile.gate import configuration


@dataclass
class Operand:
    """A tensor a launch was given: where it lies, its bytes, and how many programs asked for."""

    name: str
    start: int
    size: int
    loaded: float = 0
    stored: float = 0


@dataclass
class Launch:
    """What the programs of a launch ask for; ``counted`` of them were run, the rest scaled.

    ``flops`` are those of ``tl.dot``, padding included; ``masked`` is the share of the lanes of
    loads and stores that are masked off. Bytes are those of the other lanes.
    """

    kernel: str
    config: dict[str, int]
    grid: tuple[int, ...]
    counted: int
    operands: list[Operand]
    flops: float = 0
    masked: float = 0

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def requested(self) -> float:
        """Bytes of all loads and stores."""
        return sum(x.loaded + x.stored for x in self.operands)

    @property
    def compulsory(self) -> float:
        """Bytes of every operand, once if it is read and once if it is written."""
        return sum(min(x.size, x.loaded) + min(x.size, x.stored) for x in self.operands)


def count(call: Callable[[], Any], capability: int = 90, step: int = 1) -> list[Launch]:
    """What every launch of a call on CPU tensors would ask for on a GPU of this capability.

    Every ``step``-th program of a launch is run: all of them, unless they are alike. Raises
    ``RuntimeError`` where the kernels were made to be compiled.
    """
    if not common.interpreted():
        raise RuntimeError("Triton compiles its kernels here: counting needs its interpreter")
    launches: list[Launch] = []
    with common.pretend(capability), _counting(launches, step):
        call()
    return launches


@contextlib.contextmanager
def _counting(launches: list[Launch], step: int) -> Iterator[None]:
    """Replace the interpreter's memory, products and order of programs."""
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    run = interpreter.InterpretedFunction.run
    current = _Current()

    def counted_run(self: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        operands = find_operands(self.arg_names, arguments)
        counted = len(range(0, math.prod(grid), step))
        launch = Launch(self.__name__, configuration(constants), grid, counted, operands)
        launches.append(launch)
        current.begin(launch)
        run(self, *arguments, grid=(counted,), warmup=warmup, **constants)
        current.end()

    changes = [
        (interpreter.InterpretedFunction, "run", counted_run),
        (executor, "_init_args_hst", lambda self, arguments, constants: (arguments, constants)),
        (executor, "_restore_args_dev", lambda self, *_: None),
        (builder, "set_grid_dim", lambda *_: current.set_sizes(builder)),
        (builder, "set_grid_idx", lambda n, *_: current.set_program(builder, n * step)),
        (builder, "create_masked_load", current.load),
        (builder, "create_masked_store", current.store),
        (builder, "create_dot", current.dot),
        (builder, "get_bf16", current.bf16),  # Triton 3.6 has none
    ]
    before = [(place, name, vars(place).get(name)) for place, name, _ in changes]
    for place, name, value in changes:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in before:
            if value is None:  # the builder's own are its class's
                delattr(place, name)
            else:
                setattr(place, name, value)


class _Current:
    """The launch that is being counted."""

    def begin(self, launch: Launch) -> None:
        self.launch = launch
        self.starts = [x.start for x in launch.operands]
        self.lanes = self.live = 0

    def end(self) -> None:
        """Scale the sums to all programs."""
        launch = self.launch
        scale = launch.programs / launch.counted
        launch.flops *= scale
        launch.masked = 1 - self.live / max(1, self.lanes)
        for operand in launch.operands:
            operand.loaded, operand.stored = operand.loaded * scale, operand.stored * scale

    def set_sizes(self, builder: Any) -> None:
        builder.grid_dim = (*self.launch.grid, 1, 1)[:3]

    def set_program(self, builder: Any, program: int) -> None:
        """The coordinates of a program by its number; the first axis runs fastest, as on a GPU."""
        width, height, _ = builder.grid_dim
        builder.grid_idx = (program % width, program // width % height, program // width // height)

    def load(self, pointers: Any, mask: Any, *_: Any) -> Any:
        operand, size = self._ask(pointers, mask)
        if operand is not None:
            operand.loaded += size
        kind = pointers.get_element_ty()
        zeros = np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind))
        return interpreter.TensorHandle(zeros, kind)

    def store(self, pointers: Any, _value: Any, mask: Any, *_: Any) -> None:
        operand, size = self._ask(pointers, mask)
        if operand is not None:
            operand.stored += size

    def dot(self, a: Any, b: Any, total: Any, *_: Any) -> Any:
        self.launch.flops += 2 * math.prod(a.data.shape) * b.data.shape[-1]
        return total

    def bf16(self, _value: float) -> Any:
        return interpreter.TensorHandle(np.zeros(1, np.uint16), tl.bfloat16)

    def _ask(self, pointers: Any, mask: Any) -> tuple[Operand | None, int]:
        """Whose memory the lanes of one load or store ask for, and how many bytes of it."""
        live = int(np.count_nonzero(mask.data))
        self.lanes += mask.data.size
        self.live += live
        if not live:
            return None, 0
        address = int(pointers.data.flat[mask.data.argmax()])
        operand = self.launch.operands[bisect_right(self.starts, address) - 1]
        return operand, live * pointers.get_element_ty().primitive_bitwidth // 8


def find_operands(names: list[str], arguments: tuple[Any, ...]) -> list[Operand]:
    """The tensors among a launch's arguments, by where they lie; those that overlap are one."""
    found: list[tuple[int, int, str, int]] = []

    def look(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel():
            steps = zip(value.shape, value.stride(), strict=True)
            reach = 1 + sum((size - 1) * stride for size, stride in steps)
            start, width = value.data_ptr(), value.element_size()
            found.append((start, start + reach * width, name, value.numel() * width))
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                look(f"{name}[{i}]", item)

    for name, value in zip(names, arguments, strict=False):
        look(name, value)
    operands: list[Operand] = []
    end = 0
    for start, stop, name, size in sorted(found, key=lambda x: (x[0], -x[1])):
        if start >= end:
            operands.append(Operand(name, start, size))
        else:
            operands[-1].size = max(operands[-1].size, size)
        end = max(end, stop)
    return operands
