"""What the launchers share: where a kernel runs, what it computes in, and how it is launched."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from polyfusion.dispatch import interpreted
from polyfusion.kernels.layout import sum_dtype, tf32

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_pretended: int | None = None
_dry = False


def jit(function: Any) -> Any:
    """Make a kernel: ``triton.jit``, or without a GPU one that the interpreter runs.

    The choice is ours and not ``TRITON_INTERPRET``'s, which children inherit and which would keep
    everybody's kernels in this process from being compiled.
    """
    return interpreter.InterpretedFunction(function) if interpreted() else triton.jit(function)


@functools.cache
def _library() -> tuple[tuple[Any, str, Any], ...]:
    """Where Triton's own functions are found, and what the interpreter runs in their place."""
    with contextlib.suppress(ImportError):  # the interpreter's launch imports it, and it checks
        importlib.import_module("triton.experimental.gluon")  # that they are not replaced
    made: dict[int, Any] = {}
    found = []
    for place in (tl, tl.standard, tl.tensor):
        for name, value in vars(place).items():
            if isinstance(value, triton.JITFunction):
                other = made.setdefault(id(value), interpreter.InterpretedFunction(value.fn))
                found.append((place, name, other))
    return tuple(found)


@contextlib.contextmanager
def pretend(capability: int) -> Iterator[None]:
    """Choose configurations as on a GPU of this capability (80, 90, ...), to compile them."""
    global _pretended
    previous, _pretended = _pretended, capability
    try:
        yield
    finally:
        _pretended = previous


@contextlib.contextmanager
def dry() -> Iterator[None]:
    """Launch nothing: results keep what was in their memory."""
    global _dry
    before, _dry = _dry, True
    try:
        yield
    finally:
        _dry = before


def capability(tensor: Tensor) -> int | None:
    """The compute capability (80, 90, ...) a kernel on this tensor runs on; None: interpreter."""
    if _pretended is not None:
        return _pretended
    if not tensor.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def arithmetic(tensor: Tensor, convolution: bool = False) -> dict[str, Any]:
    """Constants of a kernel on this tensor: dtype of operands and of sums, precision of products.

    The interpreter cannot compute in half precision, so operands are raised to float32 there.
    """
    dtype, total = _TYPES[tensor.dtype], _TYPES[sum_dtype(tensor)]
    precision = "ieee"
    if dtype == tl.float32 and tf32(convolution):
        precision = "tf32"
    operands = total if capability(tensor) is None else dtype
    return {"COMPUTE": operands, "ACC": total, "PRECISION": precision}


def uses_tensor_cores(constants: dict[str, Any]) -> bool:
    """Whether products with these :func:`arithmetic` constants run on tensor cores."""
    return constants["COMPUTE"].primitive_bitwidth == 16 or constants["PRECISION"] == "tf32"


def cdiv(size: int, step: int) -> int:
    """size / step, rounded up; Triton's own takes as long as a launch."""
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    """The least power of two that is ``size`` or more, at least 1."""
    return 1 << max(0, size - 1).bit_length()


def setting(tensor: Tensor) -> tuple[Any, ...]:
    """All that :func:`capability` and :func:`arithmetic` go by, quick to make and to compare."""
    return tensor.dtype, tensor.device, tf32(), tf32(convolution=True), _pretended


def remember(plans: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` returned for this key; it is called once, or again after 1000 other keys."""
    if key not in plans:
        if len(plans) >= 1000:  # clips of ever other lengths
            plans.clear()
        plans[key] = make()
    return plans[key]


def planned(make: Callable[..., Any]) -> Callable[..., Any]:
    """Remember what ``make(tensors, ...)`` returns: it is made once for tensors that look alike.

    It is to depend on nothing but the shapes of the tensors, the first one's :func:`setting`, and
    the other arguments.
    """
    plans: dict[Any, Any] = {}

    def find(tensors: Sequence[Tensor], *rest: Any, **more: int) -> Any:
        shapes = tuple([x.shape for x in tensors])
        key = (shapes, setting(tensors[0]), rest, *more.items())
        return remember(plans, key, lambda: make(tensors, *rest, **more))

    return find


def block(size: int, low: int = 16, high: int = 1024) -> int:
    """The power of two that covers ``size``, within limits."""
    return max(low, min(high, next_power_of_2(max(size, 1))))


@dataclass(frozen=True)
class Rows:
    """How the N rows of a result lie: clips of ``frames`` rows, and which views have them all."""

    leading: tuple[int, ...]
    count: int
    clips: int
    frames: int
    framed: tuple[bool, ...]


def lay_out(views: Sequence[Tensor], block_t: int) -> Rows:
    """Clips as they are, or cut to tiles if no view is shared by the frames of a clip."""
    framed = tuple(view.ndim == 3 for view in views)
    leading = next((view.shape[:-1] for view in views if view.ndim == 3), views[0].shape[:-1])
    count = leading.numel()
    if len(set(framed)) == 1:
        clips = cdiv(count, block_t)
        return Rows(tuple(leading), count, clips, block_t, (True,) * len(views))
    return Rows(tuple(leading), count, *leading, framed)


def dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, laid out contiguously."""
    return tuple([x.contiguous() for x in tensors])


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run ``kernel`` over ``grid`` on the device of its first tensor; nothing if it is empty.

    Its first argument is a tensor, or a tuple of tensors.
    """
    if 0 in grid:
        return
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    with torch.cuda.device(first.device) if first.is_cuda else _patched_once():
        if not _dry:
            kernel[grid](*arguments, **constants)


def _index(x: Any) -> int:
    """A bound of a loop, for Triton 3.6: its own takes arrays that NumPy 2.4 makes no number of."""
    return int(x.handle.data.item())


@contextlib.contextmanager
def _patched_once() -> Iterator[None]:
    """Let the interpreter replace the functions of ``triton.language`` once per launch and module.

    It does so for every call of a device function, ``tl.zeros`` and ``tl.sum`` included, although
    they are replaced already: a third of the time of a small launch.
    """
    original = getattr(interpreter, "_patch_lang", None)
    if original is None or _dry or not interpreted():  # or compiled for a GPU that is elsewhere
        yield
        return
    scopes: dict[int, Any] = {}

    def patch(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in scopes:
            scopes[module] = original(function)
            tl.tensor.__index__ = _index
        return scopes[module]

    library = _library()
    # The interpreter restores what launches patch, but not what device functions do.
    places = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.core.tensor_descriptor_base)
    before = [(place, dict(vars(place))) for place in places]
    interpreter._patch_lang = patch
    for place, name, other in library:
        setattr(place, name, other)
    try:
        yield
    finally:
        interpreter._patch_lang = original
        for place, names in before:
            for name, value in list(vars(place).items()):
                if name not in names and isinstance(place, type):  # a module's are its helpers
                    delattr(place, name)
                elif value is not names.get(name, value):
                    setattr(place, name, names[name])


@jit
def project(
    view, weight, rows, live, k, SIZE: tl.constexpr, RANK: tl.constexpr, BIASED: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """(BLOCK_T, BLOCK_K): the frames' rows of z W, or of [z, 1] W."""
    acc = tl.zeros((BLOCK_T, BLOCK_K), ACC)
    for start in range(0, SIZE, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        z = tl.load(
            view + rows[:, None] * SIZE + d[None, :],
            mask=live[:, None] & (d[None, :] < SIZE), other=0.0,
        )
        w = tl.load(
            weight + d[:, None] * RANK + k[None, :],
            mask=(d[:, None] < SIZE) & (k[None, :] < RANK), other=0.0,
        )
        acc = tl.dot(
            z.to(COMPUTE), w.to(COMPUTE), acc, input_precision=PRECISION, out_dtype=ACC
        )
    if BIASED:
        acc += tl.load(weight + SIZE * RANK + k, mask=k < RANK, other=0.0).to(ACC)[None, :]
    return acc
