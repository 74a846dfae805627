"""CP, CMF and CMF with a shared row space by the CUDA extension: ``csrc/fusion.cu``."""

from collections.abc import Sequence

from torch import Tensor

from polyfusion.kernels.cuda import bits, check_two, operators, tf32

FORMS = {"cp": 0, "cmf": 1, "shared": 2}


def hadamard_forward(
    form: str,
    views: Sequence[Tensor],
    linear: Sequence[Tensor],
    rows: Sequence[Tensor],
    out: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    """[y, noise] of form ``"cp"``, ``"shared"`` or ``"cmf"`` in one launch; ``linear`` for CMF."""
    check_two(views)
    first, second = (linear, rows) if form == "cmf" else (rows, [])
    forward = operators(out).gated_forward
    return forward(FORMS[form], views, first, second, out, bias, noise, tf32())


def hadamard_backward(
    form: str,
    grad: Tensor,
    views: Sequence[Tensor],
    linear: Sequence[Tensor],
    rows: Sequence[Tensor],
    out: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of views, linear, rows, out, and of the bias for the forms that have one.

    An empty tensor stands for one that is not needed.
    """
    first, second = (linear, rows) if form == "cmf" else (rows, [])
    backward = operators(out).gated_backward
    return backward(grad, FORMS[form], views, first, second, out, bits(needs), tf32())
