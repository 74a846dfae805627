"""Register an operator once: schema, fake, autograd, and a backward that is an operator too.

The backward operator is differentiable: its own gradient recomputes with the operator's plain
PyTorch form, so gradients of any order are right.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op, register_autograd

from polyfusion.dispatch import backend, transformed
from polyfusion.kernels.layout import empty_rows


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``polyfusion::name``, computed by ``run``; ``fake`` makes its results without values.

    Both take the arguments of the schema in its order. What is returned calls the operator, and
    raises ``NotImplementedError`` for an argument that carries a forward-mode derivative or belongs
    to a transform of ``torch.func``: PyTorch would take the derivative for zero.

    Where nothing but autograd can tell the difference, it calls ``run`` itself, or what
    :func:`_differentiable` made of it: PyTorch's dispatcher takes longer than a small operator.
    """
    operator = custom_op(f"polyfusion::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)

    def call(*arguments: Any) -> Any:
        if transformed():
            _refuse_transformed(name, arguments)
        if not _watched():
            flat = flatten(arguments)
            if _plain(flat):
                if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*flat)):
                    return run(*arguments)
                if differentiable is not None:
                    return differentiable(_sizes(arguments), *flat)
        return operator(*arguments)

    return call


def _watched() -> bool:
    """Whether somebody waits for operators: the compiler, a mode, a profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch.autograd._profiler_enabled()
    )


def _plain(values: Sequence[Any]) -> bool:
    """Whether every tensor lies in the memory of a CPU or GPU, with nothing lazy about it."""
    for x in values:
        if type(x) is Tensor or type(x) is torch.nn.Parameter:
            if torch._C._dispatch_keys(x).raw_repr() & ~_KEYS:
                return False
        elif isinstance(x, Tensor):
            return False
    return True


_KEYS = torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
for _key in ("CUDA", "AutogradCUDA", "AutocastCUDA"):
    _KEYS |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key)).raw_repr()


def _differentiable(
    run: Callable[..., Any], save: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    """``run`` with a gradient, given ``save`` and ``backward`` as for ``register_autograd``.

    It takes the :func:`_sizes` of the operator's arguments, and these in a flat list.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, sizes: Sequence[Any], *flat: Any) -> Any:
            ctx.set_materialize_grads(False)
            ctx.sizes, arguments = sizes, _nest(flat, sizes)
            result = run(*arguments)
            save(ctx, arguments, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            needs = ctx.needs_input_grad
            if grads[0] is None:
                return (None,) * len(needs)
            ctx.needs_input_grad = _nest(needs[1:], ctx.sizes)  # as the operator's autograd has it
            try:
                return (None, *flatten(backward(ctx, *grads)))
            finally:
                ctx.needs_input_grad = needs

    # Without the search for tensors of torch.func, which are not plain.
    apply: Callable[..., Any] = super(torch.autograd.Function, Direct).apply
    return apply


def _refuse_transformed(name: str, arguments: Sequence[Any]) -> None:
    for x in flatten(arguments):
        if not isinstance(x, Tensor):
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            _refuse(name, "transforms of torch.func (jvp, vmap, grad, jacrev, ...)")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            _refuse(name, "forward-mode derivatives")


def _refuse(name: str, what: str) -> NoReturn:
    raise NotImplementedError(
        f"polyfusion::{name} does not support {what}; use kernels='eager' and the default conv=None"
    )


def register(
    name: str,
    operands: str,
    constants: str = "",
    *,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]],
    eager: Callable[..., Tensor],
    returns: str = "Tensor",
    saved: str = "",
    keep: Callable[..., Sequence[Any]] = lambda ctx, constants, result: (),
    others: Callable[[Any, Tensor], Sequence[Tensor | None]] | None = None,
    fake_backward: Callable[..., list[Any]] | None = None,
) -> Callable[..., Any]:
    """Register ``polyfusion::name`` and ``polyfusion::name_backward``; return the former.

    Its first result is differentiable in the operands. They are saved, and nothing else but what
    ``keep`` returns.

    Args:
        name: the operator's name.
        operands: schema of the inputs that have gradients.
        constants: schema of the other inputs; ``str kernels`` follows them.
        forward: ``(*operands, *constants, kernels) -> result``.
        fake: ``(*operands, *constants, kernels) -> result`` without values.
        backward: ``(grad, *operands, *saved, needs, kernels) -> gradients`` of the operands in one
            flat list; what stands where ``needs`` is false is left out.
        eager: ``(*operands, *saved) -> first result`` in plain PyTorch.
        returns: schema of the results.
        saved: schema of what the backward needs beside the operands.
        keep: ``(ctx, constants, result) -> saved``; may tell autograd more by its ``ctx``.
        others: ``(ctx, grad) -> gradients`` of the constants, None where they have none.
        fake_backward: ``(*operands) -> gradients`` without values; contiguous by default.
    """
    count = len(operands.split(", "))
    number = len(constants.split(", ")) if constants else 0

    def run_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
        needs = arguments[-2]
        grads = backward(grad, *arguments)
        pairs = zip(grads, needs, strict=True)
        return [g if need and g is not None else grad.new_empty(0) for g, need in pairs]

    def run_fake_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
        needs, inputs = arguments[-2], arguments[:count]
        if fake_backward is not None:
            grads = fake_backward(*inputs)
        else:
            grads = [x.new_empty(x.shape) for x in flatten(inputs)]
        return [g if need else grad.new_empty(0) for g, need in zip(grads, needs, strict=True)]

    given = ", ".join(filter(None, (operands, constants, "str kernels")))
    kept = ", ".join(filter(None, ("Tensor grad", operands, saved, "bool[] needs, str kernels")))
    backward_op = define(
        f"{name}_backward", f"({kept}) -> Tensor[]", run_backward, run_fake_backward
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *values, ctx.kernels = inputs
        store(ctx, [*values[:count], *keep(ctx, values[count:], output)])

    def first_order(ctx: Any, grad: Tensor, *_unused: Any) -> tuple[Any, ...]:
        values = restore(ctx)
        needs = flatten(ctx.needs_input_grad[:count])
        grads = backward_op(grad, *values, needs, ctx.kernels) if any(needs) else needs
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        rest = [None] * number if others is None else others(ctx, grad)
        return (*nest(grads, values[:count]), *rest, None)

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        *values, ctx.needs, _kernels = inputs
        store(ctx, values)

    def second_order(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
        higher = torch.is_grad_enabled()
        grad, *values = restore(ctx)
        inputs, rest = values[:count], values[count:]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            grad, *flat = aliases = [_alias(x) for x in (grad, *flatten(inputs))]
            result = eager(*nest(flat, inputs), *rest)
            wanted = [x for x, need in zip(flat, ctx.needs, strict=True) if need]
            along = [x for x, need in zip(cotangents, ctx.needs, strict=True) if need]
            first = torch.autograd.grad(
                result, wanted, grad[..., : result.shape[-1]], create_graph=True
            )
            present = [x for x in aliases if x is not None]
            found = iter(
                torch.autograd.grad(first, present, along, create_graph=higher, allow_unused=True)
            )
        second = [None if x is None else next(found) for x in aliases]
        return (second[0], *nest(second[1:], inputs), *[None] * (len(rest) + 2))

    forward_op = define(
        name,
        f"({given}) -> {returns}",
        forward,
        fake,
        _differentiable(forward, save, first_order),
    )
    register_autograd(f"polyfusion::{name}", first_order, setup_context=save)
    register_autograd(f"polyfusion::{name}_backward", second_order, setup_context=save_backward)
    return forward_op


def register_fusion(
    name: str, operands: str, eager: Any, outputs: Callable[..., int]
) -> Callable[..., Any]:
    """Register a fused fusion operator: the one adapter between it and every backend's kernel.

    Args:
        name: the operator's name, ``<form>_fusion``.
        operands: schema of its differentiable operands, the views first. Noise and ``kernels``
            follow them.
        eager: the module of :mod:`polyfusion.kernels.eager` with ``<form>_forward``; in the other
            backends the module of the same name has it and ``<form>_backward`` too.
        outputs: the number m of outputs, given the operands.
    """
    form, stem = name.removesuffix("_fusion"), eager.__name__.rpartition(".")[2]
    count = len(operands.split(", "))

    def forward(*arguments: Any) -> Tensor:
        *inputs, kernels = arguments
        return getattr(backend(kernels, stem), f"{form}_forward")(*inputs)

    def backward(*arguments: Any) -> list[Tensor]:
        *inputs, kernels = arguments
        return getattr(backend(kernels, stem), f"{form}_backward")(*inputs)

    def fake(*arguments: Any) -> Tensor:
        *inputs, noise, kernels = arguments
        views = inputs[0]
        leading = next((view.shape[:-1] for view in views if view.ndim == 3), views[0].shape[:-1])
        width = outputs(*inputs) + (0 if noise is None else noise.shape[-1])
        shape = (*leading, width)
        return empty_rows(views[0], shape) if kernels == "triton" else views[0].new_empty(shape)

    def keep(ctx: Any, constants: Sequence[Tensor | None], result: Tensor) -> Sequence[Any]:
        (noise,) = constants
        ctx.width = result.shape[-1] - (0 if noise is None else noise.shape[-1])
        return ()

    def noise_gradient(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
        return [grad[..., ctx.width :] if ctx.needs_input_grad[count] else None]

    return register(
        name,
        operands,
        "Tensor? noise",
        forward=forward,
        fake=fake,
        backward=backward,
        eager=lambda *operands: getattr(eager, f"{form}_forward")(*operands, None),
        keep=keep,
        others=noise_gradient,
    )


def store(ctx: Any, values: Sequence[Any]) -> None:
    """Save tensors, also inside lists, for the backward; and the other values beside them."""
    tensors: list[Tensor] = []
    ctx.plan = []  # what is no tensor, and in place of what is, how many tensors to take
    for x in values:
        if isinstance(x, Tensor):
            tensors.append(x)
            ctx.plan.append(_ONE)
        elif isinstance(x, (list, tuple)):
            tensors.extend(x)
            ctx.plan.append([len(x)])
        else:
            ctx.plan.append(x)
    ctx.save_for_backward(*tensors)


def restore(ctx: Any) -> list[Any]:
    """The values that :func:`store` saved."""
    tensors = iter(ctx.saved_tensors)
    values = []
    for x in ctx.plan:
        if x is _ONE:
            values.append(next(tensors))
        elif isinstance(x, list):
            values.append([next(tensors) for _ in range(*x)])
        else:
            values.append(x)
    return values


_ONE = object()


def flatten(operands: Sequence[Any]) -> list[Any]:
    """The operands, and those inside lists, in one list."""
    flat: list[Any] = []
    for x in operands:
        if isinstance(x, (list, tuple)):
            flat.extend(x)
        else:
            flat.append(x)
    return flat


def nest(flat: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """The inverse of :func:`flatten` for operands nested as in ``like``."""
    return _nest(flat, _sizes(like))


def _sizes(operands: Sequence[Any]) -> list[int | None]:
    """The lengths of the lists among the operands, None for what is no list."""
    return [len(x) if isinstance(x, (list, tuple)) else None for x in operands]


def _nest(flat: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    values = iter(flat)
    return [next(values) if size is None else [next(values) for _ in range(size)] for size in sizes]


def _alias(x: Tensor | None) -> Any:
    """A tensor of its own in the graph: inputs made from each other are not counted twice."""
    if x is None:
        return None
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
