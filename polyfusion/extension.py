"""The CUDA extension: found, loaded at the first call, and never compiled here.

:mod:`polyfusion.kernels.cuda` calls its operators; :mod:`polyfusion.build` compiles it. For tests,
:func:`emulation` runs its kernels on CPU tensors.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from polyfusion import build
from polyfusion.dispatch import constant

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_emulated = False


@constant
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
    if not emulated and torch.cuda.is_available():
        try:
            _try()
        except RuntimeError as error:
            return (
                f"a trial launch of the CUDA extension {library} failed: "
                f"{str(error).strip().splitlines()[0]}; build it for this GPU with "
                f"`{build.COMMAND}`, which takes architectures from TORCH_CUDA_ARCH_LIST"
            )
    return None


def _try() -> None:
    """Launch a kernel on one value; a library for other architectures has none for this GPU."""
    x, weight = torch.zeros(1, 1, 1, 1, device="cuda"), torch.zeros(1, 1, 4, 4, device="cuda")
    torch.ops.polyfusion_cuda.final_forward(x, weight, False).cpu()


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


def operators(tensor: Tensor) -> Any:
    """The namespace of operators for a tensor's device."""
    return torch.ops.polyfusion_cuda if tensor.is_cuda else torch.ops.polyfusion_emulated
