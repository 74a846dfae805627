"""A call with one argument spoilt is refused by the name of an argument, or is right all the same.

Whatever is drawn, no other exception comes out, and nothing is computed that the equations do not
say: what an operator accepts, its oracle accepts too, and both have the same value.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polyfusion.ops import KernelsUnavailable
from tests.properties.arguments import DTYPES, Arguments
from tests.properties.calls import Call, calls, double, map_tensors, tensors_of
from tests.properties.operators import OPERATORS

OTHER_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, *DTYPES)
NO_TENSORS = (None, 1.0, "text", np.ones((2, 3), np.float32), [], range(3), Tensor, {})
NO_NUMBERS = (None, "1", 1j, -1, -0.5, math.nan, math.inf, 10**400, [], torch.ones(2))
NO_CHOICES = (None, "fast", 3, [], {}, b"eager")


def more_axes(x: Tensor, axis: int) -> Tensor:
    return x.unsqueeze(axis % (x.ndim + 1))


def fewer_axes(x: Tensor, axis: int) -> Tensor:
    return x.sum(axis % x.ndim)


def longer(x: Tensor, axis: int) -> Tensor:
    axis %= x.ndim
    return torch.cat([x, x.sum(axis, keepdim=True)], axis)


def shorter(x: Tensor, axis: int) -> Tensor:
    axis %= x.ndim
    return x.narrow(axis, 0, max(0, x.shape[axis] - 1))


def swapped(x: Tensor, axis: int) -> Tensor:
    return x.transpose(axis % x.ndim, -1)


SHAPES: tuple[Callable[[Tensor, int], Tensor], ...] = (
    more_axes,
    fewer_axes,
    longer,
    shorter,
    swapped,
)


@st.composite
def wrong_tensors(draw: Callable[..., Any], x: Tensor) -> Any:
    """The tensor with another shape, dtype, device or layout, or something else in its place."""
    kind = draw(st.sampled_from(("shape", "shape", "shape", "dtype", "device", "layout", "type")))
    if kind == "shape":
        return draw(st.sampled_from(SHAPES))(x, draw(st.integers(0, 3)))
    if kind == "dtype":
        return x.to(draw(st.sampled_from(OTHER_DTYPES)))
    if kind == "device":
        return x.to("meta")
    if kind == "layout":
        return x.to_sparse()
    return draw(st.sampled_from(NO_TENSORS))


@st.composite
def wrong_lists(draw: Callable[..., Any], items: list[Tensor]) -> Any:
    """The list with one item spoilt, too few or too many, or no list at all."""
    kind = draw(st.sampled_from(("item", "item", "item", "item", "fewer", "more", "type")))
    if kind == "item":
        at = draw(st.integers(0, len(items) - 1))
        return [*items[:at], draw(wrong_tensors(items[at])), *items[at + 1 :]]
    if kind == "fewer":
        return items[:-1]
    if kind == "more":
        return [*items, items[-1]]
    return draw(
        st.sampled_from((items[0], iter(items), dict(enumerate(items)), set(), *NO_TENSORS))
    )


@st.composite
def spoilt(draw: Callable[..., Any], name: str) -> Call:
    """A right call, but for one argument."""
    call = draw(calls(name, ["auto", "eager", "triton"]))
    where, spoil = call.arguments, draw(st.sampled_from([*call.arguments, *call.options]))
    if spoil in call.options:
        wrong = draw(st.sampled_from(NO_CHOICES))
        return Call(name, where, {**call.options, spoil: wrong}, call.dtype)
    value = where[spoil]
    if isinstance(value, Tensor):
        wrong = draw(wrong_tensors(value))
    elif isinstance(value, list):
        wrong = draw(wrong_lists(value))
    elif value is None:
        wrong = draw(st.sampled_from((torch.ones(()), torch.ones(1, 2, 3), *NO_TENSORS)))
    else:
        wrong = draw(st.sampled_from(NO_NUMBERS))
    return Call(name, {**where, spoil: wrong}, call.options, call.dtype)


def right_all_the_same(call: Call, results: tuple[Any, ...]) -> None:
    """Compare what was computed with the oracle's results on the same arguments, if loosely."""
    tensors = tensors_of(call.arguments)
    if all(x.is_meta for x in tensors):
        return
    least = max(
        torch.finfo(x.dtype).eps for x in [*tensors, torch.ones(1)] if x.is_floating_point()
    )
    exact: Arguments = map_tensors(call.arguments, double)
    for found, expected in zip(results, call.operator.oracle(**exact), strict=True):
        if isinstance(expected, Tensor):
            assert found.shape == expected.shape
            size = 1 + expected.abs().max() if expected.numel() else 1.0
            assert ((found.double() - expected).abs() <= 1000 * least * size).all()


@pytest.mark.parametrize("name", OPERATORS)
@given(data=st.data())
def test_a_wrong_argument_is_named(name, data):
    call = data.draw(spoilt(name))
    names = "|".join([*call.arguments, *call.options])
    try:
        results = call.run(call.arguments)
    except (ValueError, TypeError, KernelsUnavailable) as error:
        message = str(error)
    else:
        right_all_the_same(call, results)
        return
    assert re.match(rf"({names})\b", message), message
    assert "\n" not in message
