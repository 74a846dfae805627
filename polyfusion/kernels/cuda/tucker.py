"""Tucker by the CUDA extension: ``csrc/tucker.cu``."""

from collections.abc import Sequence

from torch import Tensor

from polyfusion.extension import operators
from polyfusion.kernels.cuda.common import bits, check_two
from polyfusion.kernels.layout import tf32


def _frames_first(
    views: Sequence[Tensor], core: Tensor, factors: Sequence[Tensor]
) -> tuple[bool, Sequence[Tensor], Tensor, Sequence[Tensor]]:
    """Whether the views had to be exchanged, and all with the view that has frames first."""
    if len(views) == 2 and views[0].ndim < views[1].ndim:
        return True, views[::-1], core.transpose(1, 2), factors[::-1]
    return False, views, core, factors


def tucker_forward(
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    noise: Tensor | None,
) -> Tensor:
    """[y, noise] in two launches."""
    check_two(views)
    _, views, core, factors = _frames_first(views, core, factors)
    return operators(out).tucker_forward(views, core, factors, out, noise, tf32())


def tucker_backward(
    grad: Tensor,
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of views, core, factors and out; an empty tensor for one that is not needed."""
    exchanged, views, core, factors = _frames_first(views, core, factors)
    order = [1, 0, 2, 4, 3, 5] if exchanged else range(6)
    needed = bits([needs[i] for i in order])
    backward = operators(out).tucker_backward
    grads = backward(grad, views, core, factors, out, needed, tf32())
    grads = [grads[i] for i in order]
    if exchanged and needs[2]:
        grads[2] = grads[2].transpose(1, 2).contiguous()
    return grads
