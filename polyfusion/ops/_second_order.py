"""Second-order gradients of a fused operator, by its plain PyTorch form."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def second_order(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of Σ cotangent · (gradient of ``function`` at ``inputs`` against ``grad``).

    Returns those of ``grad`` and of every input, differentiable if gradients are recorded. An input
    that is None has a cotangent, which is ignored, and no gradient.
    """
    higher = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        grad_alias, *aliases = (_alias(x) for x in (grad, *inputs))
        present = [x for x in aliases if x is not None]
        given = [c for c, x in zip(cotangents, aliases, strict=True) if x is not None]
        first = torch.autograd.grad(function(*aliases), present, grad_alias, create_graph=True)
        second = iter(
            torch.autograd.grad(
                first, [grad_alias, *present], given, create_graph=higher, allow_unused=True
            )
        )
    return [None if x is None else next(second) for x in (grad_alias, *aliases)]


def _alias(x: Tensor | None) -> Any:
    """A tensor of its own in the graph: inputs made from each other must not be counted twice."""
    if x is None:
        return None
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
