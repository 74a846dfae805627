"""Every operator, whatever it is given, has the value and the gradients of its equations.

Drawn are shapes (empty and 1 included), memory layouts, dtypes, views, optional arguments and
backends; the table is in ``operators.py``. To search for minutes instead of seconds:
``pytest tests/properties --hypothesis-profile long``.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.properties.calls import Call, calls, derivatives, double, map_tensors, tensors_of
from tests.properties.operators import OPERATORS
from tests.properties.oracles import largest

ROUNDINGS = 32
"""How many roundings of the largest intermediate value an error may amount to."""
FUSED = [name for name, operator in OPERATORS.items() if operator.fused]


def bounds(call: Call, exact: Any, cotangents: list[Tensor], expected: list[list[Any]]) -> Any:
    """One rounding of the largest intermediate value, for each of the expected values."""
    operator = call.operator
    if operator.condition is None:
        sizes, along = map_tensors(exact, torch.abs), [x.abs() for x in cotangents]
        found = derivatives(lambda given: operator.oracle(**given), sizes, along)
        return [[1 + x for x in level] for level in found]
    condition = operator.condition(**exact)
    return [
        [factor * (1 + largest(x)) if isinstance(x, Tensor) else 0.0 for x in level]
        for level, factor in zip(expected, (condition, condition, condition**2), strict=False)
    ]


def check(call: Call, second: bool) -> None:
    """Compare results and gradients with the oracle's, in float64 on the same rounded arguments."""
    operator = call.operator
    exact = map_tensors(call.arguments, double)
    rng = torch.Generator().manual_seed(0)

    def draw(x: Tensor) -> Tensor:
        values = torch.randn(x.shape, generator=rng, dtype=torch.float64)
        return values.to(call.dtype).double()

    def oracle(arguments: Any) -> tuple[Any, ...]:
        return operator.oracle(**arguments)

    cotangents: list[Tensor] = []
    if operator.differentiable:
        (first, *_) = oracle(exact)
        cotangents = [draw(first)]
        if operator.before_kink is not None:
            near = operator.before_kink(**exact)
            margin = ROUNDINGS * torch.finfo(call.dtype).eps * operator.condition(**exact)
            cotangents[0] *= near.abs() > margin * (1 + near.abs())
        if second:
            constant = {"mean", "var"}
            leaves = tensors_of({k: x for k, x in exact.items() if k not in constant})
            cotangents += [draw(x) for x in leaves]
        found = derivatives(call.run, call.arguments, cotangents)
        expected = derivatives(oracle, exact, cotangents)
    else:
        found, expected = [list(call.run(call.arguments))], [list(oracle(exact))]
    assert found[0][0] is not None
    unit = ROUNDINGS * torch.finfo(call.dtype).eps
    limits = bounds(call, exact, cotangents, expected)
    for order, (values, truths, scales) in enumerate(zip(found, expected, limits, strict=True)):
        for i, (value, truth, scale) in enumerate(zip(values, truths, scales, strict=True)):
            where = f"order {order}, number {i}"
            if not isinstance(truth, Tensor):
                assert truth is None or value == truth, where
                continue
            assert value.shape == truth.shape, where
            error = (value.detach().double() - truth.detach().double()).abs() / scale
            assert largest(error.nan_to_num(nan=torch.inf)) <= unit, where


@pytest.mark.parametrize("name", OPERATORS)
@given(data=st.data())
def test_plain_pytorch(name, data):
    check(data.draw(calls(name, ["eager"])), data.draw(st.booleans(), label="second order"))


@pytest.mark.parametrize("name", FUSED)
@given(data=st.data())
@settings(max_examples=max(1, settings().max_examples // 4))
def test_triton(name, data):
    check(data.draw(calls(name, ["triton"])), data.draw(st.booleans(), label="second order"))
