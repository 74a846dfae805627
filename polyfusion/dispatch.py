"""Which kernels serve a call: ``kernels="auto" | "eager" | "triton" | "cuda"``.

An explicit choice works or raises and says why. ``auto`` takes the fastest that can serve the call:
Triton on a GPU, plain PyTorch on a CPU (Triton's interpreter is for checking, not for speed). Each
of the three backends is a package of :mod:`polyfusion.kernels`, with modules of the same names and
functions of the same names and arguments; :func:`backend` finds them.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

CHOICES = ("auto", "eager", "triton", "cuda")
"""What ``kernels=`` can be."""
YES = ("1", "true", "yes", "on", "y")
"""Values of ``TRITON_INTERPRET`` that ask for the interpreter."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What every operator computes in."""


class KernelsUnavailable(RuntimeError):
    """The kernels asked for cannot run here; the message says why and what to do."""


def check_choice(kernels: str) -> None:
    """Raise ``ValueError`` unless ``kernels`` is one of :data:`CHOICES`."""
    if kernels not in CHOICES:
        raise ValueError(f"kernels={kernels!r}: expected one of {', '.join(map(repr, CHOICES))}")


def constant(function: F) -> F:
    """Let ``torch.compile`` call a function while it traces, and keep the result.

    As ``torch.compiler.assume_constant_result`` does, which would import the compiler: a second or
    two for everybody who imports this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def triton_problem() -> str | None:
    """Why Triton cannot be used on this machine, or ``None`` if it can (found out once)."""
    return _find_triton_problem()


@functools.cache
def _find_triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it with `pip install triton` (Linux only)"
    asked = os.environ.get("TRITON_INTERPRET", "").lower()
    if torch.cuda.is_available():
        if asked in YES:
            return f"TRITON_INTERPRET={asked} would interpret the kernels; unset it on a GPU"
        return _find_trial_problem()
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"Triton does not import: {error}"
    if asked in ("", *YES):
        return None
    return "there is no CUDA device; set TRITON_INTERPRET=1 to run the kernels in the interpreter"


def _find_trial_problem() -> str | None:
    """Why a kernel of one line cannot be compiled and launched here, or ``None`` if it can.

    The launch itself is compiled by the machine's C compiler, with Python's headers.
    """
    try:
        backend("triton", "trial").launch()
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[-1]
        return (
            f"a trial launch of Triton failed ({type(error).__name__}: {line}); "
            "it needs a C compiler and Python's headers (gcc, python3-dev)"
        )
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in the CPU interpreter in this process."""
    return triton_problem() is None and not torch.cuda.is_available()


@functools.cache
def _say_if_interpreted() -> None:
    if interpreted():
        print(
            "polyfusion: no CUDA device, Triton kernels run in the CPU interpreter "
            "(correct, but slow)",
            file=sys.stderr,
        )


def cuda_problem(tensors: Sequence[torch.Tensor] = ()) -> str | None:
    """Why the CUDA extension cannot serve these tensors, or any, or ``None`` if it can."""
    from polyfusion import extension  # at the first need: it brings the build tools along

    return extension.problem(tensors)


def transformed() -> bool:
    """Whether a call here is inside forward-mode differentiation or a transform of ``torch.func``.

    PyTorch's own operators can be transformed; the fused kernels refuse (``ops/register.py``).
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def why_eager(tensor: torch.Tensor, unsupported: str | None = None) -> str | None:
    """Why ``auto`` does not take the fused kernels for a call on such a tensor; None: it does."""
    if unsupported is not None:
        return unsupported
    if not tensor.is_cuda:
        return f"on {tensor.device} PyTorch is faster, the interpreter is for checking"
    if tensor.dtype == torch.float64:
        return "float64 is for checking"
    if transformed():
        return "fused kernels have no forward-mode derivatives and no transforms of torch.func"
    problem = triton_problem()
    return problem if problem and cuda_problem([tensor]) else None


def resolve(
    kernels: str, tensors: Sequence[torch.Tensor], *, unsupported: str | None = None
) -> str:
    """Turn a ``kernels`` choice into ``"eager"``, ``"triton"`` or ``"cuda"`` for these tensors.

    ``unsupported`` says why no fused kernel serves this call, if so: ``auto`` then means eager, and
    an explicit fused choice raises it. Raises ``ValueError`` for an unknown choice and
    :class:`KernelsUnavailable` for a choice that cannot work here.
    """
    check_choice(kernels)
    if kernels == "eager":
        return "eager"
    on_cuda = tensors[0].is_cuda
    if kernels == "auto":
        if why_eager(tensors[0], unsupported):
            return "eager"
        return "cuda" if triton_problem() else "triton"  # which needs no compiler at run time
    if unsupported is not None:
        raise KernelsUnavailable(
            f"kernels={kernels!r}: {unsupported}; use kernels='eager' or 'auto'"
        )
    if kernels == "cuda":
        problem = cuda_problem(tensors)
    else:
        problem = triton_problem()
        if problem is None and not on_cuda and torch.cuda.is_available():
            problem = f"the tensors are on {tensors[0].device}; move them to a CUDA device"
        elif problem is None and not on_cuda and tensors[0].device.type != "cpu":
            problem = f"the tensors are on {tensors[0].device}; the interpreter takes a CPU's"
    if problem is not None:
        raise KernelsUnavailable(f"kernels={kernels!r}: {problem}")
    if kernels == "triton" and not on_cuda and not torch.compiler.is_compiling():
        _say_if_interpreted()
    return kernels


@functools.cache
def backend(chosen: str, stem: str) -> ModuleType:
    """Import a backend's module: ``polyfusion.kernels.<chosen>.<stem>``, say ``triton.tucker``."""
    return importlib.import_module(f"polyfusion.kernels.{chosen}.{stem}")
