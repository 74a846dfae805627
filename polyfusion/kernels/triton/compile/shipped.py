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
    SHIPPED[key] = Shipped(lambda: _in("ieee", call), dtype != torch.float16, shown)
    if tf32 and dtype == torch.float32:
        SHIPPED[f"{name}_tf32"] = Shipped(lambda: _in("tf32", call), True, ())


def _in(precision: str, call: Callable[[], Any]) -> None:
    """Call with products of float32 in this precision."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = precision
    try:
        call()
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
