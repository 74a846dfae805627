"""The calls of launchers to compile ahead, each on CPU tensors of a size that people use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shipped:
    """A call to compile.

    ``every``: compile every configuration to choose from, not just the first. ``operators`` are the
    public operators whose launches, in bfloat16, the call makes.
    """

    call: Callable[[], Any]
    every: bool
    operators: tuple[str, ...]


SHIPPED: dict[str, Shipped] = {}


def ship(
    name: str,
    dtype: torch.dtype,
    call: Callable[[], Any],
    *,
    tf32: bool = False,
    operators: tuple[str, ...] = (),
) -> None:
    """Put a call on the list as ``<name>_<dtype>``; with ``tf32`` again as ``<name>_tf32``.

    float16 compiles as bfloat16 does, so there the first configuration tells enough.
    """
    key = f"{name}_{str(dtype).removeprefix('torch.')}"
    shown = operators if dtype == torch.bfloat16 else ()
    SHIPPED[key] = Shipped(call, dtype != torch.float16, shown)
    if tf32 and dtype == torch.float32:
        SHIPPED[f"{name}_tf32"] = Shipped(lambda: _with_tf32(call), True, ())


def _with_tf32(call: Callable[[], Any]) -> None:
    """Call with float32 products in TensorFloat-32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        call()
    finally:
        matmul.fp32_precision = before
