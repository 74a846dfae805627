"""What every fusion operator does with its arguments first: autocast and validation.

Letters: B clips, T frames per clip, V views of sizes d_1..d_V, k rank, m outputs, n noise.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyfusion.dispatch import DTYPES

_LARGEST = sys.float_info.max  # an integer can be larger, and is no number to a kernel then


def autocast(*arguments: Any) -> tuple[Any, ...]:
    """Cast floating tensors, also inside lists, to the autocast dtype where autocast is enabled.

    Doubles stay doubles, as in PyTorch's own autocast. Sequences come back as lists.
    """
    enabled = torch._C._is_any_autocast_enabled()

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _cast(value) if enabled else value
        if isinstance(value, (list, tuple, torch.nn.ParameterList)):
            return [cast(item) for item in value]
        return value

    return tuple([cast(argument) for argument in arguments])


def _cast(value: Tensor) -> Tensor:
    device = value.device.type
    if value.dtype == torch.float64 or not value.is_floating_point():
        return value
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return value.to(torch.get_autocast_dtype(device))
    return value


def once(check: Callable[..., None]) -> Callable[..., None]:
    """Let a check look once at arguments of the same shapes, dtypes, devices and layouts.

    It is to depend on nothing else. What it refuses, it refuses again.
    """
    passed: set[Any] = set()

    def checked(*arguments: Any) -> None:
        looks = None if torch.compiler.is_compiling() else _looks(arguments)
        if looks is None or looks not in passed:
            check(*arguments)
            if looks is not None:
                if len(passed) >= 1000:  # clips of ever other lengths
                    passed.clear()
                passed.add(looks)

    return functools.wraps(check)(checked)


def _looks(values: Sequence[Any]) -> tuple[Any, ...] | None:
    """All that :func:`once` goes by; None if there is more than tensors, lists of them and None."""
    looks: list[Any] = []
    for x in values:
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            looks.append((x.shape, x.dtype, x.device, x.layout))
        elif x is None:
            looks.append(None)
        else:
            inside = _looks(x) if kind is list else None
            if inside is None:
                return None
            looks.append(inside)
    return tuple(looks)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, for messages."""
    return tuple(tensor.shape)


def describe(value: Any) -> Any:
    """The shape of a tensor, the type's name of anything else, for messages."""
    return shape_of(value) if isinstance(value, Tensor) else type(value).__name__


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` unless the operators support the dtype."""
    if tensor.dtype not in DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected one of {expected}")
    check_layout(name, tensor)


def check_layout(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` for a sparse tensor: the kernels read strided memory."""
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}, expected a dense (strided) tensor")


def check_number(name: str, value: Any, least: float = -math.inf) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number, at least ``least``."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or not (
        least <= value and -_LARGEST <= value <= _LARGEST
    ):
        bound = "" if least == -math.inf else f" of at least {least}"
        raise ValueError(f"{name}={value!r}: expected a finite number{bound}")


def check_sequence(name: str, value: Any, expected: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a list or tuple; ``expected`` is for the message."""
    if not isinstance(value, (list, tuple, torch.nn.ParameterList)):
        got = "one tensor" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected {expected} in a list or tuple, got {got}")


def check_shape(name: str, value: Any, letters: str, expected: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is a tensor of the expected shape."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor {letters}, got {type(value).__name__}")
    if shape_of(value) != expected:
        raise ValueError(
            f"{name} has shape {shape_of(value)}, expected {letters} = {tuple(expected)}"
        )


def check_views(views: Sequence[Tensor]) -> tuple[int, ...]:
    """Check the views and return the leading sizes of the result: (B, T), or (B,) without frames.

    Each view is (B, T, d_v), or (B, d_v) if it is constant over the clip.
    """
    check_sequence("views", views, "a sequence of at least 2 tensors")
    if len(views) < 2:
        raise ValueError(f"views: expected a sequence of at least 2 tensors, got {len(views)}")
    for v, view in enumerate(views):
        if not isinstance(view, Tensor) or view.ndim not in (2, 3):
            got = describe(view)
            raise ValueError(f"views[{v}]: expected (B, T, d) or (B, d), got {got}")
    batch = views[0].shape[0]
    frames = next((view.shape[1] for view in views if view.ndim == 3), None)
    for v, view in enumerate(views):
        if view.shape[0] != batch or (view.ndim == 3 and view.shape[1] != frames):
            want = (batch, frames) if view.ndim == 3 else (batch,)
            letters = "(B, T, ...)" if view.ndim == 3 else "(B, ...)"
            raise ValueError(
                f"views[{v}] has shape {shape_of(view)}, expected {letters} with "
                f"{', '.join(f'{x} = {y}' for x, y in zip('BT', want, strict=False))} "
                "as in the other views"
            )
    return (batch,) if frames is None else (batch, frames)


def check_list(name: str, tensors: Sequence[Tensor], count: int) -> None:
    """Raise ``ValueError`` unless there is one tensor per view."""
    expected = f"one tensor for each of the {count} views"
    check_sequence(name, tensors, expected)
    if len(tensors) != count:
        raise ValueError(f"{name}: expected {expected}, got {len(tensors)}")


def check_matrix(name: str, value: Any, letters: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a matrix."""
    if not isinstance(value, Tensor) or value.ndim != 2:
        got = describe(value)
        raise ValueError(f"{name}: expected a matrix {letters}, got {got}")


def check_noise(noise: Tensor | None, leading: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless the noise has the leading sizes of the result."""
    if noise is None:
        return
    letters = "(B, T, n)" if len(leading) == 2 else "(B, n)"
    if not isinstance(noise, Tensor) or noise.ndim != len(leading) + 1:
        got = describe(noise)
        raise ValueError(f"noise: expected {letters} with leading sizes {leading}, got {got}")
    check_shape("noise", noise, letters, (*leading, noise.shape[-1]))


def check_alike(**arguments: Any) -> None:
    """Raise ``ValueError`` unless all tensors are floating, of one dtype and on one device."""
    named: list[tuple[str, Tensor]] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            named.append((name, value))
        elif value is not None:
            named.extend((f"{name}[{i}]", item) for i, item in enumerate(value))
    first_name, first = named[0]
    check_dtype(first_name, first)
    for name, value in named:
        if value.dtype != first.dtype:
            raise ValueError(
                f"{name} has dtype {value.dtype}, expected {first.dtype} as {first_name}; "
                "cast them to one dtype or use torch.autocast"
            )
        if value.device != first.device:
            raise ValueError(
                f"{name} is on {value.device}, expected {first.device} as {first_name}"
            )
        check_layout(name, value)
