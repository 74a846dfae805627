"""Batch normalisation of u + s and a (leaky) ReLU, with s constant over a clip's frames.

Shapes: u (B·T, C, H, W); s (B, C, H, W) or None; n = B·T·H·W values per channel.

Neither u + s nor the result is kept for the backward, and the convolution that takes the result
need not keep it either (:func:`recompute_activation`): of each layer only u is. The forward
allocates its result and the backward du, nothing else of that size. On a CPU that is where the time
goes: touching fresh memory costs ten times as much as a pass of arithmetic over memory in use.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from polyfusion.ops import _norm_eager
from polyfusion.ops._common import check_dtype, shape_of
from polyfusion.ops._dispatch import fused_kernels, resolve
from polyfusion.ops._norm_eager import accumulate, plain
from polyfusion.ops._second_order import second_order


def norm_activation(
    u: Tensor,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    slope: float = 0.0,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise u + s per channel, scale and shift it, and apply a (leaky) ReLU.

    Args:
        u: (B·T, C, H, W) in any memory format; the result has the same.
        s: (B, C, H, W) of u's dtype, constant over each clip's T frames, or None.
        weight: (C,), in a precision of its own; so is ``bias``.
        bias: (C,).
        mean: (C,) constants to normalise with, both or none. None: the statistics of the batch.
        var: (C,).
        eps: added to the variance.
        slope: the negative slope, 0 for ReLU.
        kernels: "auto", "eager", "triton" or "cuda".

    Returns:
        The result in u's dtype, and the mean and the biased variance of u + s it used. Gradients
        flow through the batch's statistics into the result, not out of the last two. Differentiable
        to any order.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
        KernelsUnavailable: the kernels asked for cannot run here.
    """
    check_norm(u, s)
    check_statistics("u", u, u.numel() // max(1, u.shape[1]), mean, var)
    check_channels(u, u.shape[1], weight=weight, bias=bias, mean=mean, var=var)
    chosen = resolve(kernels, [u])
    if mean is None or var is None:
        return norm_op(u, s, weight, bias, None, None, True, eps, slope, chosen)
    if chosen == "eager":
        return plain(u, s, weight, bias, mean, var, eps, slope), mean, var
    return norm_op(u, s, weight, bias, mean, var, False, eps, slope, chosen)[0], mean, var


def norm_statistics(
    u: Tensor, s: Tensor | None = None, *, kernels: str = "auto"
) -> tuple[int, Tensor, Tensor]:
    """Count, mean (C,) and M2 (C,) of u + s, M2 the sum of squared distances from the mean.

    :func:`merge_statistics` joins those of several processes. They carry no gradient. Arguments and
    errors are those of :func:`norm_activation`.
    """
    check_norm(u, s)
    chosen = resolve(kernels, [u])
    count = u.numel() // max(1, u.shape[1])
    with torch.no_grad():
        if chosen != "eager":
            return count, *fused_kernels("norm", chosen).statistics(u, s)
        one = u.new_ones(u.shape[1], dtype=accumulate(u))
        _, mean, var = _norm_eager.forward(u, s, one, torch.zeros_like(one), None, None, 0.0)
        return count, mean, var * count


def merge_statistics(count: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 of everything, from those of P parts: (P,), (P, C) and (P, C).

    Chan's formula: no difference of large sums, so nothing is lost at a large mean.
    """
    share = (count / count.sum().clamp_min(1)).to(mean.dtype).unsqueeze(1)
    merged = (mean * share).sum(0)
    apart = (mean - merged).square() * count.to(mean.dtype).unsqueeze(1)
    return count.sum(), merged, (square + apart).sum(0)


def check_norm(u: Tensor, s: Tensor | None) -> None:
    """Raise ``ValueError`` naming the argument that does not fit u."""
    if not isinstance(u, Tensor) or u.ndim != 4:
        got = shape_of(u) if isinstance(u, Tensor) else type(u).__name__
        raise ValueError(f"u: expected a tensor (B·T, C, H, W), got {got}")
    check_dtype("u", u)
    if s is not None:
        if s.ndim != 4 or s.shape[1:] != u.shape[1:]:
            raise ValueError(f"s has shape {shape_of(s)}, expected (B, *{shape_of(u)[1:]}) as u")
        check_clips("s", s, u.shape[0])
        if s.dtype != u.dtype or s.device != u.device:
            raise ValueError(f"s is {s.dtype} on {s.device}, expected {u.dtype} on {u.device} as u")


def check_channels(x: Tensor, channels: int, **values: Tensor | None) -> None:
    """Raise ``ValueError`` unless the values are one per channel, on the device of x."""
    for name, value in values.items():
        if value is None:
            continue
        if shape_of(value) != (channels,):
            raise ValueError(
                f"{name} has shape {shape_of(value)}, expected ({channels},), one per channel"
            )
        check_dtype(name, value)
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, expected {x.device}")


def check_statistics(
    name: str, x: Tensor, count: int, mean: Tensor | None, var: Tensor | None
) -> None:
    """Raise ``ValueError`` for one of mean and var, or neither and one value per channel."""
    if (mean is None) != (var is None):
        raise ValueError("mean and var: expected both or neither, got one of them")
    if mean is None and count == 1:
        raise ValueError(
            f"{name} has shape {shape_of(x)}: one value per channel has no variance; "
            "expected more frames, or mean and var"
        )


def check_clips(name: str, clip: Tensor, frames: int) -> None:
    """Raise ``ValueError`` unless the clips divide the frames."""
    clips = clip.shape[0]
    if (clips == 0 and frames > 0) or (clips > 0 and frames % clips):
        raise ValueError(f"{name} has {clips} clips, expected a divisor of the {frames} frames")


def _fused(
    u: Tensor,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    slope: float,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = fused_kernels("norm", kernels)
    batch_mean = batch_var = u.new_empty(0, dtype=accumulate(u))
    if mean is None or var is None:
        count = max(1, u.numel() // max(1, u.shape[1]))
        mean, var = batch_mean, batch_var = norm.statistics(u, s, count)
    else:
        batch_var = batch_var.clone()
    return norm.apply(u, s, weight, bias, mean, var, eps, slope), batch_mean, batch_var


def _fused_backward(
    grad: Tensor,
    u: Tensor,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    batch: bool,
    eps: float,
    slope: float,
    kernels: str,
) -> list[Tensor]:
    norm = fused_kernels("norm", kernels)
    du, ds, *rest = norm.backward(grad, u, s, weight, bias, mean, var, batch, eps, slope)
    dweight, dbias = (x.to(y.dtype) for x, y in zip(rest, (weight, bias), strict=True))
    return [du, u.new_empty(0) if ds is None else ds, dweight, dbias.clone()]


@custom_op("polyfusion::norm_activation", mutates_args=())
def norm_op(
    u: Tensor,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    batch: bool,
    eps: float,
    slope: float,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, mean and variance; the last two are empty if they were given.

    ``batch``: the statistics are those of u + s, so the gradient goes through them.
    """
    if kernels != "eager":
        return _fused(u, s, weight, bias, mean, var, eps, slope, kernels)
    y, batch_mean, batch_var = _norm_eager.forward(u, s, weight, bias, mean, var, eps)
    if mean is not None:
        batch_mean, batch_var = batch_mean.new_empty(0), batch_var.new_empty(0)
    return _norm_eager.like(_norm_eager.activate(y, slope), u), batch_mean, batch_var


@custom_op("polyfusion::norm_activation_backward", mutates_args=())
def norm_backward_op(
    grad: Tensor,
    u: Tensor,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    batch: bool,
    eps: float,
    slope: float,
    kernels: str,
) -> list[Tensor]:
    """Gradients of u, s (empty without it), weight and bias."""
    if kernels != "eager":
        return _fused_backward(grad, u, s, weight, bias, mean, var, batch, eps, slope, kernels)
    return _norm_eager.backward(grad, u, s, weight, bias, mean, var, eps, slope)


@norm_op.register_fake
def _(
    u: Tensor, s: Any, weight: Tensor, bias: Tensor, mean: Any, var: Any, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    size = u.shape[1] if mean is None else 0
    mean, var = (u.new_empty(size, dtype=accumulate(u)) for _ in range(2))
    return torch.empty_like(u), mean, var


@norm_backward_op.register_fake
def _(
    grad: Tensor, u: Tensor, s: Tensor | None, weight: Tensor, bias: Tensor, *_rest: Any
) -> list[Tensor]:
    ds = u.new_empty(0) if s is None else torch.empty_like(s)
    return [torch.empty_like(u), ds, torch.empty_like(weight), torch.empty_like(weight)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, s, weight, bias, mean, var, *ctx.constants = inputs
    _y, batch_mean, batch_var = output
    if mean is None:
        mean, var = batch_mean, batch_var
    ctx.version = _y._version  # of the result as it is handed out
    ctx.mark_non_differentiable(batch_mean, batch_var)
    ctx.save_for_backward(u, s, weight, bias, mean, var)


def _first_order(ctx: Any, grad: Tensor, *_unused: Any) -> tuple[Any, ...]:
    grads: Sequence[Tensor] = norm_backward_op(grad, *ctx.saved_tensors, *ctx.constants)
    needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:4], strict=True)]
    return (*needed, *[None] * 6)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.batch, ctx.eps, ctx.slope, _kernels = inputs
    ctx.save_for_backward(*tensors)


def _second_order(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    grad, u, s, weight, bias, mean, var = ctx.saved_tensors
    if ctx.batch:
        mean = var = None

    def function(u: Tensor, s: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        return plain(u, s, weight, bias, mean, var, ctx.eps, ctx.slope)

    return (*second_order(function, (u, s, weight, bias), grad, cotangents), *[None] * 6)


def _made_from(y: Tensor) -> tuple[tuple[Tensor | None, ...], list[Any]] | None:
    """The tensors and constants that make a result again, or None if it cannot be."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    node: Any = y.grad_fn
    if node is None or "polyfusion_norm_activation_default" not in node.name():
        return None
    in_interpreter = node.constants[-1] == "triton" and not y.is_cuda
    if in_interpreter or _hooked() or y._version != node.version:
        return None
    try:
        return node.saved_tensors, node.constants
    except RuntimeError:  # freed by a backward, or modified
        return None


def _hooked() -> bool:
    """Whether hooks of someone else's say what is kept for the backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@contextlib.contextmanager
def recompute_activation(y: Tensor) -> Iterator[None]:
    """Operators called within do not keep ``y``, a result of :func:`norm_activation`, for their
    backward: they keep what it was made from, which is kept anyway, and make it again.

    They do keep it where it was changed since, where something else already decides what is kept
    (``torch.utils.checkpoint``), and in Triton's interpreter, where a launch costs more."""
    sources = _made_from(y)
    if sources is None:
        yield
        return
    tensors, constants = sources
    made_from = (*tensors, *constants)
    versions = [None if x is None else x._version for x in tensors]
    address, shape = y.data_ptr(), y.shape

    def pack(kept: Tensor) -> Any:
        return made_from if kept.data_ptr() == address and kept.shape == shape else kept

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if versions != [None if x is None else x._version for x in tensors]:
            raise RuntimeError(
                "an argument of norm_activation, which is needed for the gradient of what followed "
                "it, has been modified by an inplace operation"
            )
        with torch.no_grad():
            return norm_op(*kept)[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


norm_op.register_autograd(_first_order, setup_context=_save)
norm_backward_op.register_autograd(_second_order, setup_context=_save_backward)
