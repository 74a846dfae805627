"""Calls of operators that hypothesis draws: their values and gradients, and those of the oracle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from polyfusion import ops
from tests.properties.arguments import DTYPES, Arguments, Maker
from tests.properties.operators import OPERATORS, Operator


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The value with every tensor in it, also inside dicts and lists, changed; each once."""
    changed: dict[int, Any] = {}

    def walk(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: walk(part) for name, part in item.items()}
        if isinstance(item, list):
            return [walk(part) for part in item]
        if not isinstance(item, Tensor):
            return item
        if id(item) not in changed:
            changed[id(item)] = change(item)
        return changed[id(item)]

    return walk(value)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in the value once, in order."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def double(x: Tensor) -> Tensor:
    """Floating values in float64, others as they are."""
    return x.detach().double() if x.is_floating_point() else x


@dataclass
class Call:
    """An operator by its name, its arguments by theirs, and how to compute it."""

    name: str
    arguments: Arguments
    options: dict[str, Any]
    dtype: torch.dtype

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.name]

    def run(self, arguments: Arguments) -> tuple[Any, ...]:
        """The results of the operator, as a tuple."""
        results = getattr(ops, self.name)(**arguments, **self.options)
        return results if isinstance(results, tuple) else (results,)

    def __repr__(self) -> str:
        def show(x: Tensor) -> str:
            dtype = str(x.dtype).removeprefix("torch.")
            return f"<{dtype} {tuple(x.shape)} by {x.stride()}>"

        return f"{self.name}({map_tensors(self.arguments, show)}, {self.options}, {self.dtype})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print shapes and strides, not values, in hypothesis' examples."""
        printer.text(repr(self))


@st.composite
def calls(draw: Callable[..., Any], name: str, backends: Sequence[str]) -> Call:
    """Right calls of an operator, with one of the backends if it has several."""
    operator = OPERATORS[name]
    dtype = draw(st.sampled_from(DTYPES))
    options: dict[str, Any] = {}
    if operator.fused:
        options["kernels"] = draw(st.sampled_from(backends))
    if name in ("skip_conv_block", "up_conv_block"):
        own = ("own",) if options["kernels"] == "triton" else ()
        options["conv"] = draw(st.sampled_from((None, "library", "taps", *own)))
    return Call(name, operator.arguments(Maker(draw, dtype, operator.letters)), options, dtype)


def derivatives(
    function: Callable[[Arguments], tuple[Any, ...]],
    arguments: Arguments,
    cotangents: Sequence[Tensor],
) -> list[list[Any]]:
    """Results, gradients, and, for more than one cotangent, gradients of the gradients.

    The first cotangent belongs to the first result, the others to its gradients. Given statistics
    are constants.
    """
    constant = {name: arguments[name] for name in ("mean", "var") if name in arguments}
    variable = {name: x for name, x in arguments.items() if name not in constant}
    variable = map_tensors(variable, lambda x: x.detach().requires_grad_())
    leaves = tensors_of(variable)
    results = function({**variable, **constant})
    first, *others = cotangents
    first = first.to(results[0].dtype)
    gradients = torch.autograd.grad(results[0], leaves, first, create_graph=bool(others))
    levels = [list(results), list(gradients)]
    if others:
        pairs = [(g, c) for g, c in zip(gradients, others, strict=True) if g.requires_grad]
        second: Sequence[Tensor | None] = [None] * len(leaves)
        if pairs:
            wanted, along = [g for g, _ in pairs], [c.to(g.dtype) for g, c in pairs]
            second = torch.autograd.grad(wanted, leaves, along, allow_unused=True)
        levels.append(
            [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, second, strict=True)]
        )
    return levels
