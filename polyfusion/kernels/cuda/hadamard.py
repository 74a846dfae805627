"""CP and both forms of CMF by the CUDA extension: ``csrc/hadamard.cu``."""

from collections.abc import Sequence

from torch import Tensor

from polyfusion.extension import operators
from polyfusion.kernels.cuda.common import bits, check_two
from polyfusion.kernels.layout import tf32


def cp_forward(
    views: Sequence[Tensor], factors: Sequence[Tensor], out: Tensor, noise: Tensor | None
) -> Tensor:
    """[y, noise] in one launch."""
    check_two(views)
    return operators(out).cp_forward(views, factors, out, noise, tf32())


def cp_backward(
    grad: Tensor,
    views: Sequence[Tensor],
    factors: Sequence[Tensor],
    out: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of views, factors and out; an empty tensor for one that is not needed."""
    return operators(out).cp_backward(grad, views, factors, out, bits(needs), tf32())


def cmf_forward(
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    out: Tensor,
    bias: Tensor,
    noise: Tensor | None,
) -> Tensor:
    """[y, noise] in one launch; ``second`` is empty for the shared row space."""
    check_two(views)
    return operators(out).cmf_forward(views, first, second, out, bias, noise, tf32())


def cmf_backward(
    grad: Tensor,
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    out: Tensor,
    bias: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of views, first, second, out and bias; empty for one that is not needed."""
    backward = operators(out).cmf_backward
    return backward(grad, views, first, second, out, bias, bits(needs), tf32())
