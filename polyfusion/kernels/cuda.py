"""The CUDA extension's operators, in the shape in which the Triton launchers offer theirs.

``python -m polyfusion.build`` compiles it; here it is only found and loaded, at the first call.
Tests may run the same kernels on CPU tensors: :func:`emulation`.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from polyfusion import build
from polyfusion.ops._dispatch import KernelsUnavailable

FORMS = {"cp": 0, "cmf": 1, "shared": 2}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_emulated = False


@torch.compiler.assume_constant_result
@functools.cache
def _load(emulated: bool) -> str | None:
    """Load the library; why that fails, or ``None``."""
    try:
        library = build.find_library(emulated)
    except build.BuildError as error:
        return str(error)
    if library is None:
        return f"the CUDA extension is not built; build it with `{build.COMMAND}`"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA extension {library} does not load: {error}; delete it and build it again"
    return None


@contextlib.contextmanager
def emulation() -> Iterator[None]:
    """Let ``kernels="cuda"`` serve CPU tensors with the kernels emulated on the host, for tests.

    Raises:
        BuildError: the emulated kernels are not built and cannot be.
    """
    global _emulated
    build.build(emulated=True)
    if unusable := _load(True):
        raise build.BuildError(unusable)
    before, _emulated = _emulated, True
    try:
        yield
    finally:
        _emulated = before


def problem(tensors: Sequence[Tensor] = ()) -> str | None:
    """Why the extension cannot serve these tensors, or any, or ``None`` if it can."""
    on_cuda = [x.is_cuda for x in tensors]
    if not _emulated or any(on_cuda):
        causes = [] if torch.cuda.is_available() else ["there is no CUDA device"]
        unbuilt = _load(False)
        causes += [unbuilt] if unbuilt else []
        if causes:
            return ", and ".join(causes)
        if not all(on_cuda):
            return f"the tensors are on {tensors[0].device}; move them to a CUDA device"
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"the CUDA kernels compute in float16, bfloat16 and float32, not in {x.dtype}"
    return None


def _operators(tensor: Tensor) -> Any:
    return torch.ops.polyfusion_cuda if tensor.is_cuda else torch.ops.polyfusion_emulated


def _tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _check_two(views: Sequence[Tensor]) -> None:
    if len(views) != 2:
        raise KernelsUnavailable(
            f"kernels='cuda': the CUDA kernels fuse 2 views, got {len(views)}; "
            "use kernels='triton' or 'eager'"
        )


def _bits(needs: Sequence[bool]) -> int:
    return sum(need << i for i, need in enumerate(needs))


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
    _check_two(views)
    first, second = (linear, rows) if form == "cmf" else (rows, [])
    forward = _operators(out).gated_forward
    return forward(FORMS[form], views, first, second, out, bias, noise, _tf32())


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
    backward = _operators(out).gated_backward
    return backward(grad, FORMS[form], views, first, second, out, _bits(needs), _tf32())


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
    _check_two(views)
    _, views, core, factors = _frames_first(views, core, factors)
    return _operators(out).tucker_forward(views, core, factors, out, noise, _tf32())


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
    bits = _bits([needs[i] for i in order])
    backward = _operators(out).tucker_backward
    grads = backward(grad, views, core, factors, out, bits, _tf32())
    grads = [grads[i] for i in order]
    if exchanged and needs[2]:
        grads[2] = grads[2].transpose(1, 2).contiguous()
    return grads


def norm_forward(
    u: Tensor,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The activation, and the mean and biased variance used: the batch's unless given."""
    operators, (u_dense, s) = _operators(u), _one_format(u, s)
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    if mean is None or var is None:
        mean, var = operators.norm_statistics(u_dense, s)
    else:
        mean, var = mean.float().contiguous(), var.float().contiguous()
    y = operators.norm_apply(u_dense, s, mean, var, weight, bias, eps, slope)
    return _like(y, u), mean, var


def norm_backward(
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
) -> list[Tensor]:
    """Gradients of u, s (empty without it), weight and bias; ``batch``: through the statistics."""
    operators, (u_dense, s_dense, grad) = _operators(u), _one_format(u, s, grad)
    channels = [x.float().contiguous() for x in (mean, var, weight, bias)]
    sums = operators.norm_sums(grad, u_dense, s_dense, *channels, eps, slope)
    count = max(1, u.numel() // max(1, u.shape[1]))
    du, ds = operators.norm_backward(
        grad, u_dense, s_dense, *channels, sums if batch else None, count, eps, slope
    )
    return [
        _like(du, u),
        ds if s is None else _like(ds, s),
        sums[1].to(weight.dtype),
        sums[0].to(bias.dtype),
    ]


def final_forward(x: Tensor, weight: Tensor) -> Tensor:
    """tanh(conv_transpose2d(x, weight, stride=2, padding=1)) for a 4×4 weight, in x's format."""
    return _operators(x).final_forward(*_one_format(x), weight, _tf32())


def final_backward(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x and weight, given the result y; an empty tensor for one not needed."""
    x_dense, grad, y = _one_format(x, grad, y)
    dx, dweight = _operators(x).final_backward(grad, x_dense, weight, y, *needs, _tf32())
    return [_like(dx, x) if needs[0] else dx, dweight]


def _one_format(first: Tensor, *others: Tensor | None) -> list[Any]:
    """The maps in NCHW or channels_last, whichever the first has already."""
    last = not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    maps = (first, *others)
    return [None if x is None else x.contiguous(memory_format=memory_format) for x in maps]


def _like(result: Tensor, given: Tensor) -> Tensor:
    """The result with the strides that ``torch.empty_like(given)`` has."""
    wanted = torch.empty_like(given, device="meta").stride()
    return result if result.stride() == wanted else torch.empty_like(given).copy_(result)
