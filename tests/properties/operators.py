"""The table of the operators: an operator is one entry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyfusion import ops
from polyfusion.ops import reference
from tests.properties import arguments as draw
from tests.properties import oracles
from tests.properties.arguments import Arguments, Maker


@dataclass(frozen=True)
class Operator:
    """One public operator.

    Attributes:
        arguments: draws the arguments by name from a :class:`Maker`.
        oracle: the results in float64, as a tuple; ``None`` in it for what is not defined. The
            first result is the one that has gradients.
        letters: the sizes that may be 0.
        fused: whether it has kernels in Triton.
        differentiable: whether its first result has gradients.
        condition: how much larger than the results the rounding errors may be, from the
            arguments; ``None`` for a polynomial with positive coefficients, whose errors are
            bounded by its value at the absolute arguments.
        before_kink: the first result before its (leaky) ReLU, whose derivative jumps.
    """

    arguments: Callable[[Maker], Arguments]
    oracle: Callable[..., tuple[Any, ...]]
    letters: str
    fused: bool = False
    differentiable: bool = True
    condition: Callable[..., float] | None = None
    before_kink: Callable[..., Tensor] | None = None


def _tuple(oracle: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda **arguments: (oracle(**arguments),)


def _before(oracle: Callable[..., tuple[Any, ...]]) -> Callable[..., Tensor]:
    """The first result with a slope of 1, which is no kink."""
    return lambda **arguments: oracle(**{**arguments, "slope": 1.0})[0]


FUSION, MAPS = "B T d_1 d m k n", "B T H W"
OPERATORS = {
    "cp_fusion": Operator(draw.cp, _tuple(reference.cp_fusion_reference), FUSION, fused=True),
    "tucker_fusion": Operator(
        draw.tucker, _tuple(reference.tucker_fusion_reference), FUSION, fused=True
    ),
    "cmf_fusion": Operator(draw.cmf, _tuple(reference.cmf_fusion_reference), FUSION, fused=True),
    "cmf_first_order_fusion": Operator(draw.cmf_first_order, oracles.cmf_first_order, FUSION),
    "dense_fusion": Operator(draw.dense, _tuple(reference.dense_fusion_reference), FUSION),
    "partial_tucker_fusion": Operator(draw.partial_tucker, oracles.partial_tucker, FUSION),
    "tensor_train_fusion": Operator(draw.tensor_train, oracles.tensor_train, FUSION),
    "concat_fusion": Operator(draw.concat, oracles.concat, "B T d_1 d n"),
    "norm_activation": Operator(
        draw.norm,
        oracles.norm,
        f"{MAPS} C",
        fused=True,
        condition=oracles.norm_condition,
        before_kink=_before(oracles.norm),
    ),
    "skip_conv_block": Operator(
        draw.skip_conv,
        oracles.skip_conv,
        "B T",
        fused=True,
        condition=oracles.skip_conv_condition,
        before_kink=_before(oracles.skip_conv),
    ),
    "up_conv_block": Operator(
        draw.up_conv,
        oracles.up_conv,
        "B T",
        fused=True,
        condition=oracles.up_conv_condition,
        before_kink=_before(oracles.up_conv),
    ),
    "final_block": Operator(
        draw.final, oracles.final, "B T", fused=True, condition=oracles.final_condition
    ),
    "norm_statistics": Operator(
        draw.statistics,
        oracles.statistics,
        f"{MAPS} C",
        fused=True,
        differentiable=False,
        condition=oracles.statistics_condition,
    ),
    "merge_statistics": Operator(
        draw.merge, oracles.merge, "P C", differentiable=False, condition=oracles.merge_condition
    ),
}
assert set(OPERATORS) == {name for name in ops.__all__ if name != "KernelsUnavailable"}
