"""The recomputed activation: what takes a result of ``norm_activation`` need not keep it.

A layer keeps u for its backward and would keep y, the activation made of it, for the convolution
that follows. y can be made again of what is kept anyway: u, s, weight, bias and the statistics.

The invariant, in two parts:

*y is dropped only where it will certainly be made again.* It is the very result of the operator,
unmodified (autograd's version counter says so), whose node of the graph still holds the sources. It
is kept where someone else's hooks decide what is (``torch.utils.checkpoint``), in a compiled graph
(its partitioner decides) and in Triton's interpreter, where a launch costs more than the memory.

*What is made again is what was dropped.* The sources are the same: had one been modified since, the
versions would differ and the backward raises, as autograd does for what it saves. The statistics
are those that the forward used, so nothing is summed again, and what remains is arithmetic on each
value by itself: the same launch, whose result is equal to the last bit.

PyTorch's own operators, ``kernels="eager"``, keep what they keep: they are faster for it. Where
there is memory to spare, :func:`keep_activations` saves the fused ones the time that this takes.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from polyfusion.ops.norm import norm_op
from polyfusion.ops.register import restore

_kept = ContextVar("polyfusion_activations_kept", default=False)


@contextlib.contextmanager
def keep_activations(keep: bool = True) -> Iterator[None]:
    """Within, operators keep every activation for their backward, and make none of them again."""
    token = _kept.set(keep)
    try:
        yield
    finally:
        _kept.reset(token)


@contextlib.contextmanager
def recompute_activation(y: Tensor) -> Iterator[None]:
    """Let operators called within keep the sources of ``y`` for their backward instead of ``y``.

    Does nothing unless ``y`` is a result of :func:`polyfusion.ops.norm_activation` that can be made
    again. The backward raises ``RuntimeError`` if a source has been modified since.
    """
    sources = _sources(y)
    if sources is None:
        yield
        return
    tensors = [x for x in sources if isinstance(x, Tensor)]
    versions = [x._version for x in tensors]
    # Autograd hands out detached tensors, so y is known by where and how it lies in memory.
    place = y.data_ptr(), y.shape, y.stride()

    def pack(kept: Tensor) -> Any:
        return sources if (kept.data_ptr(), kept.shape, kept.stride()) == place else kept

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if versions != [x._version for x in tensors]:
            raise RuntimeError(
                "an argument of norm_activation, which is needed for the gradient of what followed "
                "it, has been modified by an inplace operation"
            )
        with torch.no_grad():
            return norm_op(*kept)[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _sources(y: Tensor) -> tuple[Any, ...] | None:
    """The arguments of ``norm_op`` that make ``y`` again, or None if it must be kept."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _kept.get():
        return None
    node: Any = y.grad_fn
    # norm_op's autograd marks its nodes with the version of the result that they handed out.
    if getattr(node, "activation_version", None) != y._version or _hooked():
        return None
    if node.kernels == "triton" and not y.is_cuda:
        return None
    try:
        return (*restore(node), node.kernels)
    except RuntimeError:  # freed by a backward, or modified
        return None


def _hooked() -> bool:
    """Whether hooks of someone else's say what is kept for the backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
