"""Register a fused operator: schema, fake, autograd, and a backward that is an operator too.

The forward saves its inputs only. The backward operator is differentiable: its own gradient
recomputes with the operator's plain PyTorch form, so gradients of any order are right.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

Operands = Sequence[Tensor | Sequence[Tensor]]


def flatten(operands: Sequence[Any]) -> list[Any]:
    """The operands, and those inside lists, in one list."""
    return [x for item in operands for x in (item if isinstance(item, (list, tuple)) else [item])]


def nest(flat: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """The inverse of :func:`flatten` for operands nested as in ``like``."""
    values, nested = iter(flat), []
    for item in like:
        lists = isinstance(item, (list, tuple))
        nested.append([next(values) for _ in item] if lists else next(values))
    return nested


def register_fusion(
    name: str,
    operands: str,
    eager: Callable[..., Tensor],
    forward: Callable[..., Tensor],
    backward: Callable[..., list[Tensor]],
    outputs: Callable[..., int],
) -> Callable[..., Tensor]:
    """Register ``polyfusion::name`` and ``polyfusion::name_backward``; return the former.

    Args:
        name: the operator's name.
        operands: schema of its differentiable operands, the views first.
        eager: the same function of the operands in plain PyTorch, without noise.
        forward: ``(kernels, operands, noise) -> result``, the fused one.
        backward: ``(kernels, grad, operands, needs) -> gradients`` of the operands in one flat
            list, an empty tensor where ``needs`` is false.
        outputs: the number m of outputs, given the operands.
    """

    def run_forward(*arguments: Any) -> Tensor:
        *inputs, noise, kernels = arguments
        return forward(kernels, inputs, noise)

    def run_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
        *inputs, needs, kernels = arguments
        return backward(kernels, grad, inputs, needs)

    signature = f"({operands}, Tensor? noise, str kernels) -> Tensor"
    backward_signature = f"(Tensor grad, {operands}, bool[] needs, str kernels) -> Tensor[]"
    forward_op = custom_op(f"polyfusion::{name}", run_forward, mutates_args=(), schema=signature)
    backward_op = custom_op(
        f"polyfusion::{name}_backward", run_backward, mutates_args=(), schema=backward_signature
    )

    @forward_op.register_fake
    def _(*arguments: Any) -> Tensor:
        *inputs, noise, _kernels = arguments
        views = inputs[0]
        leading = next((view.shape[:-1] for view in views if view.ndim == 3), views[0].shape[:-1])
        width = outputs(*inputs) + (0 if noise is None else noise.shape[-1])
        return views[0].new_empty((*leading, width))

    @backward_op.register_fake
    def _(_grad: Tensor, *arguments: Any) -> list[Tensor]:
        *inputs, needs, _kernels = arguments
        flat = flatten(inputs)
        return [x.new_empty(x.shape if n else 0) for x, n in zip(flat, needs, strict=True)]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *values, noise, ctx.kernels = inputs
        ctx.like = [[None] * len(x) if isinstance(x, (list, tuple)) else None for x in values]
        ctx.width = output.shape[-1] - (0 if noise is None else noise.shape[-1])
        ctx.save_for_backward(*flatten(values))

    def first_order(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = nest(ctx.saved_tensors, ctx.like)
        needs = flatten(ctx.needs_input_grad[: len(inputs)])
        noise_grad = grad[..., ctx.width :] if ctx.needs_input_grad[len(inputs)] else None
        grads = backward_op(grad, *inputs, needs, ctx.kernels) if any(needs) else needs
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*nest(grads, ctx.like), noise_grad, None)

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        grad, *values, ctx.needs, _kernels = inputs
        ctx.like = [[None] * len(x) if isinstance(x, (list, tuple)) else None for x in values]
        ctx.save_for_backward(grad, *flatten(values))

    def second_order(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
        higher = torch.is_grad_enabled()
        device = ctx.saved_tensors[0].device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            grad, *flat = aliases = [_alias(x) for x in ctx.saved_tensors]
            inputs = nest(flat, ctx.like)
            fused = eager(*inputs)
            wanted = [x for x, need in zip(flat, ctx.needs, strict=True) if need]
            given = [x for x, need in zip(cotangents, ctx.needs, strict=True) if need]
            first = torch.autograd.grad(
                fused, wanted, grad[..., : fused.shape[-1]], create_graph=True
            )
            second = torch.autograd.grad(
                first, aliases, given, create_graph=higher, allow_unused=True
            )
        return (second[0], *nest(second[1:], ctx.like), None, None)

    forward_op.register_autograd(first_order, setup_context=save)
    backward_op.register_autograd(second_order, setup_context=save_backward)
    return forward_op


def _alias(x: Tensor) -> Tensor:
    """A tensor of its own in the graph: inputs made from each other are not counted twice."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
